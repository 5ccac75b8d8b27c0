//! How much memory is left for experts.

use std::sync::Weak;
use std::time::Duration;

use outrigger_experts::{Budget, Model};

use crate::engine::Engine;
use crate::error::Result;

/// What a process needs besides weights, keys and values: code, vocabulary, activations, reads under way.
const BESIDES: u64 = 128 << 20;

/// One byte in so many goes to the kernel's tables of the pages that are mapped and cached; 0.9 % was measured.
const TABLES: u64 = 64;

/// What `asked` comes to where the process may use `limit` bytes: the trunk, which every token reads, the `sessions`
/// bytes of all sessions' keys and values, and the expert that is read before another makes room come first. A system
/// that runs out of memory would drop pages of the experts that the cache counts on, and read them again one by one. A
/// pack is not cut: it has no other place to read from.
///
/// # Errors
/// A fraction that is none.
pub(crate) fn expert_budget(
    model: &Model,
    asked: Budget,
    sessions: u64,
    limit: Option<u64>,
) -> Result<Budget> {
    let (spec, limit) = (&model.spec, limit.unwrap_or(u64::MAX));
    let experts: u64 = (0..spec.n_layers).map(|layer| model.expert_bytes(layer)).sum();
    let trunk: u64 = model.trunk().map(|tensor| tensor.byte_len() as u64).sum();
    let ahead =
        model.experts.iter().map(|layer| layer.bytes_per_expert() as u64).max().unwrap_or(0);
    let spare = limit.saturating_sub(trunk + sessions + ahead + BESIDES);
    let left = spare - spare / TABLES;
    let wanted = asked.bytes(experts)?;
    if wanted <= left || model.is_pack() {
        return Ok(asked);
    }
    let (fits, limit) = (Budget::Bytes(left), Budget::Bytes(limit));
    tracing::warn!(%asked, %fits, %limit, "the expert cache is cut to what memory has room for");
    Ok(fits)
}

/// How often the limit is looked at again.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Keeps the expert cache within what memory has room for as long as there is an engine, which was opened with the limit
/// `before`: a control group's may change meanwhile. An app may resize the cache too, until the limit changes the next
/// time.
pub(crate) async fn follow(
    engine: Weak<Engine>,
    mut before: Option<u64>,
    limit: impl Fn() -> Option<u64>,
) {
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let Some(engine) = engine.upgrade() else { return };
        let now = limit();
        if now != before {
            before = now;
            if let Err(error) = engine.fit_memory(now) {
                tracing::warn!(%error, "the expert cache keeps its size");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use crate::config::EngineConfig;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_cache_follows_the_limit_and_says_the_same() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf");
        let engine = Engine::open(EngineConfig::new(demo)).await.unwrap();
        let whole = engine.store().budget_bytes();
        let limit = Arc::new(AtomicU64::new(u64::MAX));
        let told = limit.clone();
        let tell = move || Some(told.load(Ordering::Relaxed));
        let following = tokio::spawn(follow(Arc::downgrade(&engine), Some(1), tell));
        let mut said = Vec::new();
        for room in [u64::MAX, 0, BESIDES, u64::MAX] {
            limit.store(room, Ordering::Relaxed);
            tokio::time::sleep(2 * LOOK_INTERVAL).await;
            let budget = engine.store().budget_bytes();
            assert_eq!(budget, if room == u64::MAX { whole } else { 0 });
            let mut session = engine.session(crate::SamplerConfig::greedy()).unwrap();
            session.push_text("Once upon a time").unwrap();
            said.push(session.step().await.unwrap().id);
        }
        assert_eq!(said, [said[0]; 4]);
        drop(engine);
        following.await.unwrap();
    }

    #[test]
    fn the_trunk_a_session_and_a_read_come_first() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf");
        let model = Model::open(&demo).unwrap();
        let all: u64 = (0..6).map(|layer| model.expert_bytes(layer)).sum();
        let trunk: u64 = model.trunk().map(|tensor| tensor.byte_len() as u64).sum();
        let (session, ahead) = (100_000, all / 6 / 32);
        let budget = |asked, limit| expert_budget(&model, asked, session, limit).unwrap();
        let (before, whole, half) =
            (trunk + session + ahead + BESIDES, Budget::Fraction(1.0), Budget::Fraction(0.5));
        assert_eq!(budget(whole, None), whole);
        assert_eq!(budget(whole, Some(before + all + all / 63 + 1)), whole);
        assert_eq!(budget(whole, Some(before + 64_000)), Budget::Bytes(63_000));
        assert_eq!(budget(half, Some(before + all)), half, "what was asked fits");
        assert_eq!(budget(half, Some(1000)), Budget::Bytes(0));
    }
}
