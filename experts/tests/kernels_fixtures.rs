//! Dequantisation against the `gguf` Python package's own, to the bit.

use std::path::Path;

use outrigger_experts::{GgmlType, dequantize, quantize};

#[test]
fn every_type_dequantizes_as_gguf_py_does() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/quant");
    for ty in GgmlType::all().filter(|ty| *ty != GgmlType::F32) {
        let read = |extension: &str| {
            let path = dir.join(format!("{}.{extension}", ty.name().to_lowercase()));
            std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let (blocks, values) = (read("bin"), read("f32"));
        let values: Vec<f32> =
            values.as_chunks::<4>().0.iter().map(|v| f32::from_le_bytes(*v)).collect();
        assert!(!values.is_empty());
        let mut ours = vec![0.0; values.len()];
        dequantize(ty, &blocks, &mut ours);
        for (i, (ours, theirs)) in ours.iter().zip(&values).enumerate() {
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{ty} value {i}: {ours}, not {theirs}");
        }
    }
}

#[test]
fn quantize_loses_no_more_than_its_steps() {
    // Largest error of a value in [-1, 1], from the number of levels and the rounding of the scales.
    let bounds = [
        (GgmlType::F32, 0.0),
        (GgmlType::F16, 0.0003),
        (GgmlType::BF16, 0.004),
        (GgmlType::Q8_0, 0.0045),
        (GgmlType::Q4_0, 0.13),
        (GgmlType::Q4_K, 0.09),
        (GgmlType::Q5_K, 0.06),
        (GgmlType::Q6_K, 0.035),
    ];
    let mut state = 1u32;
    let values: Vec<f32> = (0..4096)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    for (ty, bound) in bounds {
        let (mut bytes, mut back) = (Vec::new(), vec![0.0; values.len()]);
        quantize(ty, &values, &mut bytes);
        dequantize(ty, &bytes, &mut back);
        let error = values.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error <= bound, "{ty}: {error} is more than {bound}");
        assert!(error >= bound / 4.0, "{ty}: {error} makes the bound {bound} meaningless");
    }
}

#[test]
fn zeros_stay_zeros() {
    for ty in GgmlType::all() {
        let (mut bytes, mut back) = (Vec::new(), vec![1.0; 512]);
        quantize(ty, &[0.0; 512], &mut bytes);
        dequantize(ty, &bytes, &mut back);
        assert!(back.iter().all(|v| *v == 0.0), "{ty}");
    }
}
