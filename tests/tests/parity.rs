//! The forward pass against Hugging Face transformers and llama.cpp.

use std::path::Path;

use outrigger::{Engine, EngineConfig};
use outrigger_experts::GgmlType;
use outrigger_experts::gguf::{Gguf, Layout, Writer};
use outrigger_tests::{all_logits, fixtures, max_difference};

/// An f16 KV cache keeps llama.cpp itself below 1e-3 of these logits; a wrong formula is beyond 2e-3
/// (`tests/fixtures/README.md`).
const TOLERANCE: f32 = 2e-3;

async fn check_tiny(architecture: &str) {
    let config = EngineConfig::new(fixtures::tiny_model(architecture));
    let engine = Engine::open(config).await.expect("the fixture opens");
    let expected = fixtures::f32s(&format!("{architecture}/logits.f32"));
    let tokens = fixtures::tokens(architecture);
    for batch in [1, 7, tokens.len()] {
        let logits = all_logits(&engine, &tokens, batch).await;
        let difference = max_difference(&logits, &expected);
        assert!(difference <= TOLERANCE, "{architecture}, {batch} a pass: {difference}");
    }
}

#[tokio::test]
async fn olmoe_agrees_with_transformers() {
    check_tiny("olmoe").await;
}

#[tokio::test]
async fn qwen2moe_agrees_with_transformers() {
    check_tiny("qwen2moe").await;
}

#[tokio::test]
async fn qwen3moe_agrees_with_transformers() {
    check_tiny("qwen3moe").await;
}

#[tokio::test]
async fn mixtral_agrees_with_transformers() {
    check_tiny("mixtral").await;
}

/// How one program's predictions differ from another's.
#[derive(Debug)]
struct Agreement {
    mean_kl: f64,
    median_kl: f64,
    top1: f64,
    /// Top-1 agreement on tokens whose best prediction leads by more than 0.05 nats.
    clear_top1: f64,
}

fn agreement(logits: &[f32], oracle: &[f32], vocab: usize) -> Agreement {
    assert_eq!(logits.len(), oracle.len());
    let (mut kls, mut same, mut clear, mut clear_same) = (Vec::new(), 0, 0, 0);
    for (ours, theirs) in logits.chunks_exact(vocab).zip(oracle.chunks_exact(vocab)) {
        let (p, q) = (log_softmax(theirs), log_softmax(ours));
        kls.push(p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>());
        let agrees = best(ours) == best(theirs);
        same += usize::from(agrees);
        if lead(&p) > 0.05 {
            clear += 1;
            clear_same += usize::from(agrees);
        }
    }
    let rows = kls.len() as f64;
    kls.sort_by(f64::total_cmp);
    Agreement {
        mean_kl: kls.iter().sum::<f64>() / rows,
        median_kl: kls[kls.len() / 2],
        top1: same as f64 / rows,
        clear_top1: f64::from(clear_same as u32) / f64::from(clear),
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    logits.iter().map(|&l| f64::from(l) - max - sum.ln()).collect()
}

fn best(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("a vocabulary")
}

/// By how much the likeliest token leads, in nats.
fn lead(log_probabilities: &[f64]) -> f64 {
    let mut sorted = log_probabilities.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    sorted[0] - sorted[1]
}

async fn demo_logits(model: &Path) -> (Vec<f32>, usize) {
    let engine = Engine::open(EngineConfig::new(model)).await.expect("it opens");
    (all_logits(&engine, &fixtures::tokens("demo"), 64).await, engine.spec().n_vocab)
}

/// What the few tokens whose experts are nearly tied have no say in.
fn check_most(found: &Agreement) {
    assert!(found.median_kl <= 3e-4, "{found:?}");
    assert!(found.clear_top1 >= 0.99, "{found:?}");
    assert!(found.top1 >= 0.97, "{found:?}");
}

/// Writes the demo model with its weights' values as F32, with which no activation is rounded to 8 bits: transformers
/// rounds none either.
fn write_as_f32(path: &Path) {
    let model = Gguf::open(&fixtures::demo_model()).expect("it opens");
    let mut layout = Layout::new(path);
    for (key, value) in model.meta().iter() {
        layout.set(key, value.clone());
    }
    for tensor in model.tensors() {
        layout.tensor(tensor.name(), GgmlType::F32, tensor.dims()).expect("it fits");
    }
    let mut writer = Writer::create(layout).expect("it can be written");
    for tensor in model.tensors() {
        let values = model.tensor(tensor.name()).expect("it is there").to_f32();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write(&bytes).expect("room");
    }
    writer.finish().expect("it is whole");
}

#[tokio::test]
async fn demo_model_agrees_with_transformers() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = dir.path().join("f32.gguf");
    write_as_f32(&model);
    let (logits, vocab) = demo_logits(&model).await;
    let found = agreement(&logits, &fixtures::f16s("demo/transformers.f16"), vocab);
    println!("{found:?}");
    assert!(found.mean_kl <= 1e-5, "{found:?}");
    check_most(&found);
}

#[tokio::test]
async fn demo_model_agrees_with_llama_cpp() {
    let (logits, vocab) = demo_logits(&fixtures::demo_model()).await;
    let found = agreement(&logits, &fixtures::f16s("demo/llama.cpp.f16"), vocab);
    println!("{found:?}");
    assert!(found.mean_kl <= 1e-3, "{found:?}");
    check_most(&found);
}

/// Rounding activations to 8 bits swaps experts that are nearly tied, and the mean is that of the few tokens where it does
/// (`tests/fixtures/demo/README.md`): it may be what llama.cpp's is, which rounds them too.
#[tokio::test]
async fn rounded_activations_cost_what_they_cost_llama_cpp() {
    let (logits, vocab) = demo_logits(&fixtures::demo_model()).await;
    let exact = fixtures::f16s("demo/transformers.f16");
    let ours = agreement(&logits, &exact, vocab);
    let theirs = agreement(&fixtures::f16s("demo/llama.cpp.f16"), &exact, vocab);
    println!("{ours:?} {theirs:?}");
    assert!(ours.mean_kl <= 1.25 * theirs.mean_kl, "{ours:?} {theirs:?}");
    check_most(&ours);
}
