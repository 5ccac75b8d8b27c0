//! Generated models open, are sane, and depend on nothing but their seed.

use outrigger_experts::synth::{self, Shape};
use outrigger_experts::{GgmlType, Model};

/// The standard deviation of a matrix's values is 1 / sqrt(inputs), and their mean is near 0.
#[test]
fn tiny_opens_in_every_type_with_sane_weights() {
    let dir = tempfile::tempdir().unwrap();
    for ty in GgmlType::all() {
        let path = dir.path().join(format!("tiny-{ty}.gguf"));
        synth::write(Shape::Tiny, ty, &path, 1, |_, _| {}).unwrap();
        let model = Model::open(&path).unwrap();
        assert_eq!(model.spec.n_experts, 8);
        let expert = model.experts[1].expert(3);
        for tensor in [&expert.gate_proj, &expert.down_proj, &model.layers[0].q, &model.output] {
            let values = tensor.to_f32();
            let n = values.len() as f64;
            let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let square = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n;
            let expected = (tensor.cols() as f64).sqrt().recip();
            assert!(mean.abs() < 0.05 * expected, "{ty} {}: mean {mean}", tensor.name());
            let ratio = square.sqrt() / expected;
            assert!((0.95..1.05).contains(&ratio), "{ty} {}: spread off by {ratio}", tensor.name());
        }
        let norm = model.output_norm.to_f32();
        assert!(norm.iter().all(|x| (0.8..1.2).contains(x)), "{norm:?}");
    }
}

#[test]
fn the_seed_decides() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, seed| {
        let path = dir.path().join(name);
        synth::write(Shape::Tiny, GgmlType::Q4_K, &path, seed, |_, _| {}).unwrap();
        (std::fs::read(&path).unwrap(), Model::open(&path).unwrap().gguf.fingerprint())
    };
    let (first, again, other) = (write("a.gguf", 7), write("b.gguf", 7), write("c.gguf", 8));
    assert!(first.0.len() <= 4_000_000, "tiny has {} bytes", first.0.len());
    assert!(first == again);
    assert_ne!(first.1, other.1);
}

#[test]
fn progress_ends_at_the_total() {
    let dir = tempfile::tempdir().unwrap();
    let mut seen = Vec::new();
    let path = dir.path().join("tiny.gguf");
    synth::write(Shape::Tiny, GgmlType::Q8_0, &path, 1, |done, total| seen.push((done, total)))
        .unwrap();
    assert!(seen.is_sorted());
    let (done, total) = *seen.last().unwrap();
    assert_eq!(done, total);
}
