//! A split model says what the whole one says.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use outrigger::{Budget, Elsewhere, Engine, EngineConfig, LinkState, OnMiss, Token};
use outrigger_experts::{GgmlType, LayerStats};
use outrigger_tests::fixtures::{demo_model, rewrite, tiny_model, tokens};
use outrigger_tests::loopback::LoopbackServer;
use outrigger_tests::{all_logits, greedy, max_difference};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Sums are added in another order than at home, and nothing else differs.
const TOLERANCE: f32 = 1e-4;

async fn split_engine(model: &Path, servers: &[LoopbackServer], cache: f64) -> Arc<Engine> {
    split_engine_that(OnMiss::Wait, model, servers, cache).await
}

async fn split_engine_that(
    on_miss: OnMiss,
    model: &Path,
    servers: &[LoopbackServer],
    cache: f64,
) -> Arc<Engine> {
    let mut config = EngineConfig::new(model);
    config.servers = servers.iter().map(|server| server.address.to_string()).collect();
    config.expert_cache = Budget::Fraction(cache);
    config.elsewhere = Elsewhere::Absent;
    config.on_miss = on_miss;
    config.deadline = Duration::from_secs(20);
    let engine = Engine::open(config).await.expect("it opens");
    assert!(engine.wait_connected(Duration::from_secs(10)).await, "servers are up");
    engine
}

/// Consecutive ranges of `experts` experts, cut at random, one a server; each overlaps its neighbour.
fn shares(experts: u32, cuts: &[u32]) -> Vec<RangeInclusive<u32>> {
    let mut cuts: Vec<u32> = cuts.iter().map(|cut| 1 + cut % (experts - 1)).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let first = std::iter::once(0).chain(cuts.iter().copied());
    let last = cuts.iter().copied().chain([experts - 1]);
    first.zip(last).map(|(first, last)| first..=last).collect()
}

#[test]
fn any_placement_gives_the_same_logits() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let placements = (prop::collection::vec(0u32..64, 0..3), 0.0..=1.0, 1usize..24);
    let mut runner = TestRunner::new(Config::with_cases(12));
    for architecture in ["olmoe", "qwen2moe", "qwen3moe", "mixtral"] {
        let model = tiny_model(architecture);
        let ids = tokens(architecture);
        let whole = runtime.block_on(async {
            let engine = Engine::open(EngineConfig::new(&model)).await.expect("it opens");
            (all_logits(&engine, &ids, 1).await, engine.spec().n_experts as u32)
        });
        runner
            .run(&placements, |(cuts, cache, batch)| {
                let split = runtime.block_on(async {
                    let servers = start(&model, &shares(whole.1, &cuts)).await;
                    let engine = split_engine(&model, &servers, cache).await;
                    all_logits(&engine, &ids, batch).await
                });
                let difference = max_difference(&split, &whole.0);
                prop_assert!(difference <= TOLERANCE, "{architecture}: {difference}");
                Ok(())
            })
            .expect("every placement agrees");
    }
}

async fn start(model: &Path, shares: &[RangeInclusive<u32>]) -> Vec<LoopbackServer> {
    let mut servers = Vec::new();
    for share in shares {
        servers.push(LoopbackServer::start(model, Some(share.clone())).await);
    }
    servers
}

/// As in files whose first and last layers have more bits: each layer's activations go up in blocks of their own kind.
#[tokio::test(flavor = "multi_thread")]
async fn layers_may_want_different_blocks_of_activations() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = dir.path().join("mixed.gguf");
    rewrite(&model, false, |name| {
        let inputs = name.contains("ffn_gate_exps") || name.contains("ffn_up_exps");
        (inputs && !name.starts_with("blk.0.")).then_some(GgmlType::Q4_K)
    });
    let ids = &tokens("demo")[..32];
    let engine = Engine::open(EngineConfig::new(&model)).await.expect("it opens");
    let whole = all_logits(&engine, ids, 8).await;
    let server = LoopbackServer::start(&model, None).await;
    let engine = split_engine_that(OnMiss::Fail, &model, std::slice::from_ref(&server), 0.0).await;
    assert!(max_difference(&all_logits(&engine, ids, 8).await, &whole) <= TOLERANCE);
    let status = &engine.servers()[0];
    let spec = engine.spec();
    assert_eq!((status.state, status.experts), (LinkState::Up, spec.n_layers * spec.n_experts));
}

/// On a runtime's only thread, which runs nothing else while the device computes.
#[tokio::test]
async fn a_request_is_sent_before_the_device_computes_its_own_share() {
    let model = demo_model();
    let server = LoopbackServer::start(&model, None).await;
    let engine = split_engine(&model, std::slice::from_ref(&server), 0.5).await;
    let mut session = greedy(&engine);
    session.push_text("Once upon a time").expect("it fits");
    let mut step = std::pin::pin!(session.step());
    assert!(step.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    while server.metrics.text().contains("outrigger_server_rows_total 0\n") {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let used = |layer: &LayerStats| layer.hits + layer.misses;
    assert_eq!(engine.store().stats().layers.iter().map(used).sum::<u64>(), 0);
    assert_eq!(step.await.expect("a token").coverage, 1.0);
    assert_ne!(engine.store().stats().layers.iter().map(used).sum::<u64>(), 0);
}

const GENERATED: usize = 256;

/// Tokens of a greedy continuation, and the logits that each was taken from.
async fn continuation(engine: &Arc<Engine>) -> (Vec<Token>, Vec<f32>) {
    let mut session = greedy(engine);
    session.push_text("Once upon a time").expect("it fits");
    let (mut tokens, mut logits) = (Vec::new(), Vec::new());
    for _ in 0..GENERATED {
        tokens.push(session.step().await.expect("a token"));
        logits.extend_from_slice(session.logits());
    }
    (tokens, logits)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generation_is_identical_with_one_two_and_three_servers_and_any_cache() {
    let model: PathBuf = demo_model();
    let whole = Engine::open(EngineConfig::new(&model)).await.expect("it opens");
    let (expected, expected_logits) = continuation(&whole).await;
    for cuts in [&[][..], &[15], &[9, 21]] {
        let servers = start(&model, &shares(whole.spec().n_experts as u32, cuts)).await;
        for cache in [0.0, 0.25, 0.5, 1.0] {
            let engine = split_engine(&model, &servers, cache).await;
            let (found, logits) = continuation(&engine).await;
            let place = format!("{} servers, cache of {cache}", servers.len());
            let ids = |tokens: &[Token]| tokens.iter().map(|token| token.id).collect::<Vec<_>>();
            assert_eq!(ids(&found), ids(&expected), "{place}");
            let difference = max_difference(&logits, &expected_logits);
            assert!(difference <= TOLERANCE, "{place}: {difference}");
            assert!(found.iter().all(|t| t.coverage == 1.0 && !t.provisional), "{place}");
            let remote: u64 = found.iter().map(|token| token.tally.remote).sum();
            assert_eq!(remote == 0, cache == 1.0, "{place}: {remote} remote calls");
        }
    }
}
