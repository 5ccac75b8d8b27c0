//! The forward pass against Hugging Face transformers and llama.cpp.

use std::path::Path;

use outrigger::{Engine, EngineConfig};
use outrigger_experts::GgmlType;
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

/// With weights as F32 no activation is rounded to 8 bits, as transformers rounds none.
#[tokio::test]
async fn demo_model_agrees_with_transformers() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = dir.path().join("f32.gguf");
    fixtures::rewrite(&model, false, |_| Some(GgmlType::F32));
    let (logits, vocab) = demo_logits(&model).await;
    let found = agreement(&logits, &fixtures::f16s("demo/transformers.f16"), vocab);
    println!("{found:?}");
    assert!(found.mean_kl <= 1e-5, "{found:?}");
    assert!(found.top1 >= 0.99 && found.clear_top1 == 1.0, "{found:?}");
}

/// As it is, with activations rounded to 8 bits, which llama.cpp does too.
#[tokio::test]
async fn demo_model_with_every_expert_agrees_with_llama_cpp() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = dir.path().join("every.gguf");
    fixtures::rewrite(&model, true, |_| None);
    let (logits, vocab) = demo_logits(&model).await;
    let found = agreement(&logits, &fixtures::f16s("demo/llama.cpp-all-experts.f16"), vocab);
    println!("{found:?}");
    assert!(found.mean_kl <= 5e-4, "{found:?}");
    assert!(found.top1 >= 0.97 && found.clear_top1 >= 0.99, "{found:?}");
}

/// The median leaves out the few tokens where rounding activations swaps an expert for one that is nearly tied with it. How many
/// those are is chance, also between llama.cpp and transformers (`tests/fixtures/demo/README.md`).
#[tokio::test]
async fn rounded_activations_cost_most_tokens_little() {
    let (logits, vocab) = demo_logits(&fixtures::demo_model()).await;
    let found = agreement(&logits, &fixtures::f16s("demo/transformers.f16"), vocab);
    println!("{found:?}");
    assert!(found.median_kl <= 3e-4, "{found:?}");
}
