//! What a session promises: settling, forking, truncating, and errors that lose nothing.

use std::path::PathBuf;
use std::sync::Arc;

use outrigger::{
    Budget, Elsewhere, Engine, EngineConfig, Error, KvType, OnMiss, SamplerConfig, Session,
};
use outrigger_server::ServerConfig;
use outrigger_tests::loopback::LoopbackServer;
use outrigger_tests::{all_logits, fixtures, greedy, max_difference};

async fn half_engine(servers: &[&LoopbackServer], on_miss: OnMiss) -> Arc<Engine> {
    let mut config = EngineConfig::new(fixtures::demo_model());
    config.servers = servers.iter().map(|server| server.address.to_string()).collect();
    config.expert_cache = Budget::Fraction(0.5);
    config.elsewhere = Elsewhere::Absent;
    config.on_miss = on_miss;
    // Far beyond what a busy machine makes of a call on loopback.
    config.deadline = std::time::Duration::from_secs(20);
    let engine = Engine::open(config).await.expect("it opens");
    assert!(engine.wait_connected(std::time::Duration::from_secs(5)).await, "servers are up");
    engine
}

async fn steps(session: &mut Session, count: usize) -> Vec<u32> {
    let mut ids = Vec::new();
    for _ in 0..count {
        ids.push(session.step().await.expect("a token").id);
    }
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_settling_logits_are_those_of_a_session_that_was_never_cut() {
    let whole = Engine::open(EngineConfig::new(fixtures::demo_model())).await.expect("it opens");
    let server = LoopbackServer::start(&fixtures::demo_model(), None).await;
    let engine = half_engine(&[&server], OnMiss::Degrade).await;
    // (tokens before the cut, tokens without the server, tokens after it is back and before settling)
    for (before, cut, after) in [(1, 1, 0), (3, 20, 0), (10, 7, 5), (2, 40, 1)] {
        let mut session = greedy(&engine);
        session.push_text("It was the best of times").expect("it fits");
        let settled = |session: &Session| session.settled() + 1 == session.len();
        steps(&mut session, before).await;
        assert!(settled(&session), "exact while connected");
        engine.set_offline(true);
        steps(&mut session, cut).await;
        assert!(!settled(&session), "what was said alone is provisional, and so is all after it");
        engine.set_offline(false);
        steps(&mut session, after).await;

        session.settle().await.expect("it heals");
        assert!(settled(&session));
        let ids: Vec<u32> = session.tokens().collect();
        let expected = all_logits(&whole, &ids[..ids.len() - 1], 512).await;
        let last = &expected[expected.len() - session.logits().len()..];
        let difference = max_difference(session.logits(), last);
        assert!(difference <= 1e-4, "cut {before}, {cut}, {after}: {difference}");
    }
}

// One thread: the server answers only when the device waits.
#[tokio::test]
async fn settling_that_is_dropped_half_way_loses_no_token() {
    let server = LoopbackServer::start(&fixtures::demo_model(), None).await;
    let engine = half_engine(&[&server], OnMiss::Degrade).await;
    let mut session = greedy(&engine);
    session.push_text("It was the best of times").expect("it fits");
    engine.set_offline(true);
    steps(&mut session, 20).await;
    engine.set_offline(false);
    assert!(engine.wait_connected(std::time::Duration::from_secs(5)).await, "the server is up");
    let before: Vec<u32> = session.tokens().collect();
    // It cannot end without an answer, and that has no time to come.
    let dropped = tokio::time::timeout(std::time::Duration::ZERO, session.settle()).await;
    assert!(dropped.is_err());
    assert_eq!(session.tokens().collect::<Vec<u32>>(), before);
    session.settle().await.expect("it heals");
    assert_eq!(session.tokens().collect::<Vec<u32>>(), before);
}

/// With nothing to wait for: whoever has waited long enough gets a turn before all layers are computed.
#[tokio::test]
async fn a_prompt_can_be_given_up_and_computed_later() {
    let engine = Engine::open(EngineConfig::new(fixtures::demo_model())).await.expect("it opens");
    let (mut given_up, mut whole) = (greedy(&engine), greedy(&engine));
    for session in [&mut given_up, &mut whole] {
        session.push_text("It was the best of times").expect("it fits");
    }
    let dropped = tokio::time::timeout(std::time::Duration::ZERO, given_up.step()).await;
    assert!(dropped.is_err());
    assert_eq!(steps(&mut given_up, 8).await, steps(&mut whole, 8).await);
}

#[test]
fn without_a_runtime_there_is_an_error() {
    let mut opening = std::pin::pin!(Engine::open(EngineConfig::new(fixtures::demo_model())));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match opening.as_mut().poll(&mut context) {
        std::task::Poll::Ready(Err(Error::NoRuntime)) => {}
        other => panic!("{:?}", other.map(|opened| opened.map(drop))),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_of_as_many_rows_as_the_server_takes_is_exact() {
    let roomy = LoopbackServer::start(&fixtures::demo_model(), None).await;
    check_long_prompt(&roomy).await;
    let config = ServerConfig { max_rows: 100, ..LoopbackServer::config(&fixtures::demo_model()) };
    check_long_prompt(&LoopbackServer::start_with(config, None).await).await;
}

async fn check_long_prompt(server: &LoopbackServer) {
    let engine = half_engine(&[server], OnMiss::Degrade).await;
    let whole = Engine::open(EngineConfig::new(fixtures::demo_model())).await.expect("it opens");
    let tokens: Vec<u32> = (0..1000).map(|i| i * 37 % 4000).collect();
    let (mut split, mut alone) = (greedy(&engine), greedy(&whole));
    for session in [&mut split, &mut alone] {
        session.push(&tokens).expect("it fits");
        let pass = session.advance().await.expect("a pass");
        assert_eq!(pass.fault, None);
    }
    assert_eq!(split.settled(), tokens.len());
    assert!(max_difference(split.logits(), alone.logits()) <= 1e-4);
}

#[tokio::test]
async fn a_fork_goes_its_own_way_and_a_truncated_session_goes_back() {
    let engine = Engine::open(EngineConfig::new(fixtures::demo_model())).await.expect("it opens");
    let mut session = greedy(&engine);
    session.push_text("Once upon a time").expect("it fits");
    let prompt = session.len();
    let first = steps(&mut session, 12).await;
    let mut fork = session.fork();
    fork.push_text(" But then").expect("it fits");
    steps(&mut fork, 5).await;

    // The fork left no trace: the original goes back and says the same again.
    let ids: Vec<u32> = session.tokens().collect();
    session.truncate(prompt - 1);
    assert!(session.logits().is_empty(), "the last token that is left was not computed last");
    assert!(matches!(session.step().await, Err(Error::NothingPending)));
    session.push(&ids[prompt - 1..prompt]).expect("it fits");
    assert_eq!(steps(&mut session, 12).await, first);
}

#[tokio::test]
async fn bad_input_is_refused_and_costs_nothing() {
    let mut config = EngineConfig::new(fixtures::demo_model());
    config.context = Some(16);
    let engine = Engine::open(config.clone()).await.expect("it opens");
    let mut session = greedy(&engine);
    assert!(matches!(session.step().await, Err(Error::Empty)));
    let refused = session.push(&[5, 1_000_000]);
    assert!(matches!(refused, Err(Error::TokenId { id: 1_000_000, .. })), "{refused:?}");
    let refused = session.push(&[5; 17]);
    assert!(matches!(refused, Err(Error::ContextFull { capacity: 16, wanted: 17 })), "{refused:?}");
    assert!(session.is_empty(), "nothing of it was kept");
    session.push(&[5; 16]).expect("it fits exactly");
    session.step().await.expect("the last token that the context has room for");
    assert!(matches!(session.step().await, Err(Error::ContextFull { .. })));

    config.context = Some(1_000_000);
    assert!(matches!(Engine::open(config.clone()).await, Err(Error::Context { .. })));
    config.context = None;
    for url in ["no port", "http://localhost:7070/experts"] {
        config.servers = vec![url.to_owned()];
        assert!(
            matches!(Engine::open(config.clone()).await, Err(Error::ServerUrl { .. })),
            "{url}"
        );
    }
    config.servers.clear();
    let like = || config.clone();
    for (name, config) in [
        ("prior", EngineConfig { prior: f32::NAN, ..like() }),
        ("prior", EngineConfig { prior: 7.0, ..like() }),
        ("threads", EngineConfig { threads: 0, ..like() }),
        ("sessions", EngineConfig { sessions: usize::MAX, ..like() }),
    ] {
        let refused = Engine::open(config).await.map(drop);
        assert!(
            matches!(refused, Err(Error::Setting { field, .. }) if field == name),
            "{refused:?}"
        );
    }
    let biased = SamplerConfig { logit_bias: vec![(1 << 30, 1.0)], ..SamplerConfig::greedy() };
    let refused = engine.session(biased).map(drop);
    assert!(matches!(refused, Err(Error::TokenId { id: 0x4000_0000, .. })), "{refused:?}");
    config.on_miss = OnMiss::Wait;
    assert!(Engine::open(config.clone()).await.is_ok(), "nothing is ever missing");
    (config.elsewhere, config.expert_cache) = (Elsewhere::Absent, Budget::Fraction(0.5));
    assert!(matches!(Engine::open(config).await, Err(Error::NobodyToWaitFor)));
}

/// A model whose weights are no numbers says so instead of something.
#[tokio::test(flavor = "multi_thread")]
async fn weights_that_are_no_numbers_are_an_error() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("damaged.gguf");
    let mut bytes = std::fs::read(fixtures::demo_model()).expect("it is there");
    let end = bytes.len();
    bytes[end - (1 << 20)..].fill(0xff);
    std::fs::write(&path, bytes).expect("there is room");
    let engine = Engine::open(EngineConfig::new(path)).await.expect("its header is whole");
    let mut session = greedy(&engine);
    session.push_text("Once upon a time").expect("it fits");
    let failed = session.step().await;
    assert!(matches!(failed, Err(Error::NotANumber { .. })), "{failed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_miss_fail_says_what_is_missing_and_loses_no_token() {
    let server = LoopbackServer::start(&fixtures::demo_model(), None).await;
    let engine = half_engine(&[&server], OnMiss::Fail).await;
    let mut session = greedy(&engine);
    session.push_text("Once upon a time").expect("it fits");
    engine.set_offline(true);
    let length = session.len();
    let failed = session.step().await;
    assert!(matches!(failed, Err(Error::Missing { .. })), "{failed:?}");
    assert_eq!(session.len(), length);
    engine.set_offline(false);
    assert_eq!(session.step().await.expect("a token").coverage, 1.0);
}

/// Mean of -log p of each token after the first, from logits `[tokens, vocab]`.
fn surprise(logits: &[f32], tokens: &[u32]) -> f64 {
    let vocab = logits.len() / tokens.len();
    let of = |(row, token): (&[f32], &u32)| {
        let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
        sum.ln() - f64::from(row[*token as usize])
    };
    let each = logits.chunks_exact(vocab).zip(&tokens[1..]).map(of);
    each.sum::<f64>() / (tokens.len() - 1) as f64
}

#[tokio::test]
async fn keys_and_values_in_eight_bits_say_nearly_the_same_in_any_batch() {
    check_eight_bits(fixtures::demo_model()).await;
    // Heads of 16 values, which fill no block of 32.
    check_eight_bits(fixtures::tiny_model("olmoe")).await;
}

async fn check_eight_bits(model: PathBuf) {
    let open =
        |kv_cache| Engine::open(EngineConfig { kv_cache, ..EngineConfig::new(model.clone()) });
    let halves = open(KvType::F16).await.expect("it opens");
    let bytes = open(KvType::Q8_0).await.expect("it opens");
    let mut session = greedy(&halves);
    session.push_text("It was the best of times").expect("it fits");
    steps(&mut session, 100).await;
    let tokens: Vec<u32> = session.tokens().collect();

    let exact = all_logits(&halves, &tokens, 512).await;
    let logits = all_logits(&bytes, &tokens, 512).await;
    assert_ne!(exact, logits);
    assert_eq!(logits, all_logits(&bytes, &tokens, 7).await, "in batches of seven");
    let (exact, ours) = (surprise(&exact, &tokens), surprise(&logits, &tokens));
    assert!((ours / exact - 1.0).abs() < 0.01, "{ours} for {exact}");
}

#[tokio::test]
async fn pushed_text_does_not_go_on_with_half_a_character() {
    let engine = Engine::open(EngineConfig::new(fixtures::demo_model())).await.expect("it opens");
    let is_half = |id: &u32| engine.tokenizer().piece(*id) == [0xc3];
    let half = (0..engine.spec().n_vocab as u32).find(is_half).expect("a token of every byte");
    let sampler = SamplerConfig { logit_bias: vec![(half, 1e6)], ..SamplerConfig::greedy() };
    let mut session = engine.session(sampler).expect("a sampler that means something");
    for text in ["Once", " upon"] {
        session.push_text(text).expect("it fits");
        let token = session.step().await.expect("a token");
        assert_eq!((token.id, token.text.as_str()), (half, ""), "after {text:?}");
    }
}
