//! Vector-quantised weights: how good the fits are.

use outrigger_experts::vq::{Fit, LayerMoments};
use outrigger_experts::{ActFormat, Activations, GgmlType, Mat, Pool, dequantize, matmul};

/// Numbers that look random, in -1 to 1.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Random codes under small scales.
fn codes(ty: GgmlType, rows: usize, cols: usize) -> Vec<u8> {
    let bytes = ty.row_bytes(cols).unwrap();
    let mut out: Vec<u8> = noise(7, rows * bytes).iter().map(|x| (x * 1e6) as i32 as u8).collect();
    for (r, row) in out.chunks_exact_mut(bytes).enumerate() {
        let scale = half::f16::from_f32(0.01 + r as f32 / 1024.0);
        row[..2].copy_from_slice(&scale.to_le_bytes());
    }
    out
}

fn values(ty: GgmlType, bytes: &[u8], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows * cols];
    let stored = bytes.chunks_exact(bytes.len() / rows).zip(out.chunks_exact_mut(cols));
    stored.for_each(|(row, out)| dequantize(ty, row, out));
    out
}

/// An expert whose inputs lie mostly in a few directions, and rows of them with their weights.
struct Case {
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    x: Vec<f32>,
    weights: Vec<f32>,
}

const N_EMBD: usize = 64;
const N_FF: usize = 96;
const ROWS: usize = 400;

fn case() -> Case {
    let directions = noise(11, 8 * N_EMBD);
    let mut x = noise(12, ROWS * N_EMBD).into_iter().map(|x| 0.1 * x).collect::<Vec<_>>();
    for (row, mix) in x.chunks_exact_mut(N_EMBD).zip(noise(13, ROWS * 8).chunks_exact(8)) {
        for (direction, share) in directions.chunks_exact(N_EMBD).zip(mix) {
            row.iter_mut().zip(direction).for_each(|(x, d)| *x += share * d);
        }
    }
    let weights = noise(14, ROWS).iter().map(|w| 0.5 + 0.4 * w).collect();
    let matrix = |seed| noise(seed, N_EMBD * N_FF).iter().map(|w| 0.2 * w).collect();
    Case { gate: matrix(21), up: matrix(22), down: matrix(23), x, weights }
}

impl Case {
    fn fit<T>(&self, pool: &Pool, look: impl FnOnce(Fit<'_>) -> T) -> T {
        let layer = LayerMoments::new(pool, &self.x, N_EMBD);
        let bytes = self.bytes();
        look(Fit::new(pool, matrices(&bytes), &layer, &self.x, &self.weights))
    }

    fn bytes(&self) -> [Vec<u8>; 3] {
        [&self.gate, &self.up, &self.down]
            .map(|values| values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    /// What the expert makes of the rows with these matrices, weighted, in plain arithmetic.
    fn outputs(&self, gate: &[f32], up: &[f32], down: &[f32]) -> Vec<f32> {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let mut out = Vec::new();
        for (x, weight) in self.x.chunks_exact(N_EMBD).zip(&self.weights) {
            let hidden: Vec<f32> = gate
                .chunks_exact(N_EMBD)
                .zip(up.chunks_exact(N_EMBD))
                .map(|(gate, up)| {
                    let gate = dot(gate, x);
                    gate / (1.0 + (-gate).exp()) * dot(up, x)
                })
                .collect();
            out.extend(down.chunks_exact(N_FF).map(|down| weight * dot(down, &hidden)));
        }
        out
    }
}

fn matrices(bytes: &[Vec<u8>; 3]) -> [Mat<'_>; 3] {
    let [gate, up, down] = bytes;
    [(gate, N_FF, N_EMBD), (up, N_FF, N_EMBD), (down, N_EMBD, N_FF)]
        .map(|(bytes, rows, cols)| Mat { ty: GgmlType::F32, rows, cols, bytes })
}

fn difference(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

#[test]
fn the_reported_error_is_that_of_the_coded_matrices() {
    let case = case();
    let pool = Pool::new(2);
    let exact = case.outputs(&case.gate, &case.up, &case.down);
    case.fit(&pool, |fit| {
        let inputs = fit.inputs(3);
        let output = fit.output(Some(&inputs), Some(2));
        let read = |dim, bytes: &[u8], rows, cols| values(GgmlType::Vq(dim), bytes, rows, cols);
        let got = case.outputs(
            &read(3, &inputs.gate_proj, N_FF, N_EMBD),
            &read(3, &inputs.up_proj, N_FF, N_EMBD),
            &read(2, &output.down_proj, N_EMBD, N_FF),
        );
        let want = difference(&got, &exact);
        assert!((output.error / want - 1.0).abs() < 1e-2, "{} {want}", output.error);
        assert!((fit.energy() / difference(&exact, &vec![0.0; exact.len()]) - 1.0).abs() < 1e-3);
    });
}

#[test]
fn fewer_bits_are_worse_and_all_are_better_than_the_mean() {
    let case = case();
    let pool = Pool::new(1);
    case.fit(&pool, |fit| {
        let errors: Vec<f64> = GgmlType::vqs()
            .map(|ty| {
                let GgmlType::Vq(dim) = ty else { unreachable!("all are coded") };
                fit.output(Some(&fit.inputs(dim)), Some(dim)).error
            })
            .collect();
        assert!(errors.is_sorted(), "{errors:?}");
        let (_, mean) = fit.mean();
        assert!(errors[errors.len() - 1] < mean && mean <= fit.energy(), "{errors:?} {mean}");
        assert!(errors[0] < 0.01 * fit.energy(), "{errors:?} of {}", fit.energy());
    });
}

/// Making up for errors where the inputs are is the point of it: the same codes chosen for inputs that fill every
/// direction evenly must do worse on these.
#[test]
fn codes_that_know_the_inputs_beat_codes_that_do_not() {
    let case = case();
    let pool = Pool::new(1);
    let even = noise(15, 4 * ROWS * N_EMBD);
    let ones = vec![1.0; 4 * ROWS];
    let bytes = case.bytes();
    let exact = case.outputs(&case.gate, &case.up, &case.down);
    let read = |bytes: &[u8]| values(GgmlType::Vq(8), bytes, N_FF, N_EMBD);
    let knowing = case.fit(&pool, |fit| {
        let inputs = fit.inputs(8);
        difference(
            &case.outputs(&read(&inputs.gate_proj), &read(&inputs.up_proj), &case.down),
            &exact,
        )
    });
    let layer = LayerMoments::new(&pool, &even, N_EMBD);
    let inputs = Fit::new(&pool, matrices(&bytes), &layer, &even, &ones).inputs(8);
    let blind = difference(
        &case.outputs(&read(&inputs.gate_proj), &read(&inputs.up_proj), &case.down),
        &exact,
    );
    assert!(knowing < 0.5 * blind, "{knowing} {blind}");
}

#[test]
fn an_expert_that_no_row_went_to_is_coded_all_the_same() {
    let case = case();
    let pool = Pool::new(1);
    let (layer, bytes) = (LayerMoments::new(&pool, &case.x, N_EMBD), case.bytes());
    let fit = Fit::new(&pool, matrices(&bytes), &layer, &[], &[]);
    let inputs = fit.inputs(4);
    let output = fit.output(Some(&inputs), Some(4));
    assert_eq!((fit.energy(), output.error), (0.0, 0.0));
    let relative = |ty, bytes: &[u8], rows, cols, exact: &[f32]| {
        let zero = vec![0.0; exact.len()];
        difference(&values(ty, bytes, rows, cols), exact) / difference(exact, &zero)
    };
    let vq4 = GgmlType::Vq(4);
    assert!(relative(vq4, &inputs.gate_proj, N_FF, N_EMBD, &case.gate) < 0.4);
    assert!(relative(vq4, &output.down_proj, N_EMBD, N_FF, &case.down) < 0.2);
    assert!(fit.mean().0.iter().all(|y| *y == 0.0));
}

#[test]
fn the_pool_multiplies_codes_too() {
    let (ty, rows, cols) = (GgmlType::Vq(6), 300, 64);
    let bytes = codes(ty, rows, cols);
    let mut x = Activations::new(cols);
    x.set(&noise(3, 3 * cols));
    x.quantize(ActFormat::Q8_0);
    let w = Mat { ty, rows, cols, bytes: &bytes };
    let (mut one, mut two) = (vec![0.0; 3 * rows], vec![0.0; 3 * rows]);
    matmul(&Pool::new(1), w, &mut x, &mut one);
    matmul(&Pool::new(3), w, &mut x, &mut two);
    assert_eq!(one, two);
    assert!(one.iter().any(|y| *y != 0.0));
}
