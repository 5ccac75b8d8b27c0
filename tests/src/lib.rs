//! What the end-to-end tests share: fixtures, servers on loopback, a simulated network.
#![forbid(unsafe_code)]

pub mod double;
pub mod fixtures;
pub mod loopback;
pub mod process;
pub mod reference;
pub mod schedule;
pub mod simulated;

use std::sync::Arc;
use std::time::Duration;

use outrigger::{Budget, Elsewhere, Engine, EngineConfig, SamplerConfig, Session, Token};

/// Logits of every token, `[tokens, vocab]`, computed `batch` tokens a pass.
pub async fn all_logits(engine: &Arc<Engine>, tokens: &[u32], batch: usize) -> Vec<f32> {
    let mut session = greedy(engine);
    let mut logits = Vec::new();
    for part in tokens.chunks(batch) {
        session.push(part).expect("the tokens fit");
        session.advance_all(|rows| logits.extend_from_slice(rows)).await.expect("a pass");
    }
    logits
}

/// A device with a quarter of the demo model's experts, and the others nowhere but on `servers`.
pub fn quarter(servers: Vec<String>) -> EngineConfig {
    let mut config = EngineConfig::new(fixtures::demo_model());
    config.servers = servers;
    config.expert_cache = Budget::Fraction(0.25);
    config.elsewhere = Elsewhere::Absent;
    config.deadline = Duration::from_secs(5);
    config
}

/// The first token that a device has to say to a little text.
pub async fn first_token(config: EngineConfig) -> Token {
    let engine = Engine::open(config).await.expect("it opens");
    let mut session = greedy(&engine);
    session.push_text("Once upon a time").expect("it fits");
    session.step().await.expect("a token")
}

/// A session that always takes the likeliest token.
pub fn greedy(engine: &Arc<Engine>) -> Session {
    engine.session(SamplerConfig::greedy()).expect("greedy sampling is valid")
}

/// The largest absolute difference of two slices of the same length.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "lengths differ");
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
