//! Every kernel of this machine against products worked out in f64 from dequantised weights and activations.

use outrigger_experts::{ActFormat, Activations, GgmlType, Kernels, Mat, dequantize, quantize};

/// Noise without a crate, the same every time.
struct Noise(u64);

impl Noise {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

fn types() -> impl Iterator<Item = GgmlType> {
    GgmlType::all().chain(GgmlType::vqs())
}

/// Where the f16 scales of a block are, or of a row where there are no blocks.
fn scales_of(ty: GgmlType) -> &'static [usize] {
    match ty {
        GgmlType::Q8_0 | GgmlType::Q4_0 | GgmlType::Vq(_) => &[0],
        GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
        GgmlType::Q6_K => &[208],
        GgmlType::F16 => &[0],
        GgmlType::F32 | GgmlType::BF16 => &[],
    }
}

/// Weights of any bits: `pattern` for every byte, or noise; scales are halves of either sign, floats are small.
fn weights(
    ty: GgmlType,
    rows: usize,
    cols: usize,
    pattern: Option<u8>,
    noise: &mut Noise,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    if matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16) {
        quantize(ty, &noise.floats(rows * cols), &mut bytes);
        return bytes;
    }
    let row_bytes = ty.row_bytes(cols).unwrap();
    bytes.resize(rows * row_bytes, 0);
    for byte in &mut bytes {
        *byte = pattern.unwrap_or_else(|| noise.bits() as u8);
    }
    let block_bytes = if ty.block_bytes() == 0 { row_bytes } else { ty.block_bytes() };
    for block in bytes.chunks_exact_mut(block_bytes) {
        for at in scales_of(ty) {
            let mut scale = Vec::new();
            quantize(GgmlType::F16, &[noise.float()], &mut scale);
            block[*at..at + 2].copy_from_slice(&scale);
        }
    }
    bytes
}

/// Activations in the type's format, and what they stand for. The blocks hold any i8, -128 too.
fn activations(
    format: ActFormat,
    rows: usize,
    cols: usize,
    pattern: Option<i8>,
    noise: &mut Noise,
) -> (Activations, Vec<f64>) {
    let mut x = Activations::new(cols);
    let len = match format {
        ActFormat::F32 => {
            let values = noise.floats(rows * cols);
            x.set(&values);
            return (x, values.into_iter().map(f64::from).collect());
        }
        ActFormat::Q8_0 => 32,
        ActFormat::Q8_K => 256,
    };
    let d = noise.floats(rows * cols / len);
    let q: Vec<i8> =
        (0..rows * cols).map(|_| pattern.unwrap_or_else(|| noise.bits() as i8)).collect();
    match format {
        ActFormat::Q8_0 => x.set_q8_0(rows, &d, &q),
        _ => x.set_q8_k(rows, &d, &q),
    }
    let values = q.iter().enumerate().map(|(i, q)| f64::from(d[i / len]) * f64::from(*q)).collect();
    (x, values)
}

/// Row lengths: one block, an odd number of them, many, for K types very many; for floats also no multiple of a vector.
fn lengths(ty: GgmlType) -> Vec<usize> {
    match ty.block_len() {
        1 => vec![1, 7, 16, 65, 100, 2048],
        32 => vec![32, 9 * 32, 15 * 32, 64 * 32],
        _ => vec![256, 5 * 256, 8 * 256, 131 * 256],
    }
}

/// Checks every kernel with each number of activation rows up to a batch and beyond.
fn check(ty: GgmlType, bytes_like: Option<u8>, acts_like: Option<i8>) {
    let mut noise = Noise(0x1234_5678_9abc_def1 ^ u64::from(ty.id()));
    for cols in lengths(ty) {
        let rows = 5;
        let bytes = weights(ty, rows, cols, bytes_like, &mut noise);
        let mut values = vec![0.0; rows * cols];
        for (row, values) in bytes.chunks(bytes.len() / rows).zip(values.chunks_mut(cols)) {
            dequantize(ty, row, values);
        }
        let w = Mat { ty, rows, cols, bytes: &bytes };
        for n in [1, 3, 4, 5, 19] {
            let (x, x_values) = activations(ty.act_format(), n, cols, acts_like, &mut noise);
            for kernels in Kernels::available() {
                let mut out = vec![f32::NAN; n * rows];
                kernels.matmul(w, &x, &mut out);
                for (at, y) in out.iter().enumerate() {
                    let (i, r) = (at / rows, at % rows);
                    let terms = values[r * cols..][..cols]
                        .iter()
                        .zip(&x_values[i * cols..][..cols])
                        .map(|(w, x)| f64::from(*w) * x);
                    let (sum, magnitude) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
                    let error = (f64::from(*y) - sum).abs();
                    assert!(
                        error <= 1e-5 * sum.abs() + 4e-7 * magnitude,
                        "{} {ty} cols {cols}, x row {i} of {n}, w row {r}: {y}, not {sum}",
                        kernels.name(),
                    );
                }
            }
        }
    }
}

#[test]
fn products_of_any_bits_are_right() {
    for ty in types() {
        check(ty, None, None);
    }
}

#[test]
fn products_of_extreme_values_are_right() {
    for ty in types() {
        for bytes in [0x00, 0xff, 0x7f, 0x80] {
            for acts in [-128, -127, 0, 127] {
                check(ty, Some(bytes), Some(acts));
            }
        }
    }
}

#[test]
fn products_of_quantised_weights_have_the_same_bits_on_every_instruction_set() {
    for ty in types().filter(|ty| ty.act_format() != ActFormat::F32) {
        for (cols, n) in lengths(ty).into_iter().flat_map(|cols| [1, 7, 64].map(|n| (cols, n))) {
            let mut noise = Noise(99);
            let rows = 45;
            let bytes = weights(ty, rows, cols, None, &mut noise);
            let w = Mat { ty, rows, cols, bytes: &bytes };
            let (x, _) = activations(ty.act_format(), n, cols, None, &mut noise);
            let products = |kernels: &Kernels| {
                let mut out = vec![f32::NAN; n * rows];
                kernels.matmul(w, &x, &mut out);
                out.iter().map(|y| y.to_bits()).collect::<Vec<_>>()
            };
            let mut all = Kernels::available();
            let scalar = products(all.next().unwrap());
            for kernels in all {
                assert!(products(kernels) == scalar, "{} {ty}, {n} rows of {cols}", kernels.name());
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch() {
    for ty in types() {
        let mut noise = Noise(77);
        let (rows, cols, n) = (37, 1280, 79);
        let bytes = weights(ty, rows, cols, None, &mut noise);
        let w = Mat { ty, rows, cols, bytes: &bytes };
        let values = noise.floats(n * cols);
        let product = |kernels: &Kernels, values: &[f32]| {
            let mut x = Activations::new(cols);
            x.set(values);
            x.quantize(ty.act_format());
            let mut out = vec![0.0; x.rows() * rows];
            kernels.matmul(w, &x, &mut out);
            out
        };
        for kernels in Kernels::available() {
            let all = product(kernels, &values);
            for i in 0..n {
                let one = product(kernels, &values[i * cols..][..cols]);
                assert_eq!(one, all[i * rows..][..rows], "{} {ty} row {i}", kernels.name());
            }
        }
    }
}
