//! `outrigger replay`: a trace replayed through the cache counts what the engine counted, and what it refuses.
#![cfg(feature = "cli")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use outrigger::trace::Trace;
use outrigger::{Budget, CacheStats, Elsewhere, Engine, EngineConfig, SamplerConfig};
use serde_json::{Value, json};
use tempfile::TempDir;

const LAYERS: usize = 6;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf")
}

/// Runs a prompt in one batch and `steps` tokens one by one with part of the experts in memory, the others in the file;
/// what the cache counted, and the trace.
async fn record(dir: &TempDir, part: f64, steps: usize) -> (CacheStats, PathBuf) {
    let path = dir.path().join(format!("{part}.trace"));
    let mut config = EngineConfig::new(demo());
    config.expert_cache = Budget::Fraction(part);
    config.elsewhere = Elsewhere::Cold;
    config.trace = Some(path.clone());
    config.threads = 1;
    let engine = Engine::open(config).await.unwrap();
    let mut session = engine.session(SamplerConfig::greedy()).unwrap();
    session.push_text("Once upon a time there was a king who had three sons").unwrap();
    for _ in 0..steps {
        session.step().await.unwrap();
    }
    (engine.cache_stats(), path)
}

fn replay(args: &[&str], traces: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger"));
    command.env_remove("RUST_LOG").arg("replay").args(traces).args(args).output().unwrap()
}

fn replayed(args: &[&str], traces: &[&Path]) -> Vec<Value> {
    let Output { status, stdout, stderr } = replay(&[args, &["--json"]].concat(), traces);
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn refused(trace: &Path) -> String {
    let Output { status, stderr, .. } = replay(&[], &[trace]);
    assert_eq!(status.code(), Some(1));
    String::from_utf8(stderr).unwrap()
}

#[tokio::test]
async fn lru_replayed_counts_what_the_engine_counted() {
    let dir = TempDir::new().unwrap();
    // The least is below one token's working set.
    for part in [0.1, 0.25, 0.5] {
        let (stats, path) = record(&dir, part, 100).await;
        assert!(stats.layers.iter().all(|layer| layer.hits > 0 && layer.evictions > 0));
        let cache = format!("{}%", part * 100.0);
        let lines = replayed(&["--cache", &cache, "--policy", "lru"], &[&path]);
        let counted = stats.layers.iter().map(|layer| {
            json!({
                "hits": layer.hits,
                "misses": layer.misses,
                "evictions": layer.evictions,
                "bytes_read": layer.bytes_read,
            })
        });
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["layers"], counted.collect::<Value>(), "{cache}");
        assert_eq!(lines[0]["misses"], stats.total().misses);
    }
}

/// The fewest misses of a cache of `slots` that must hold what is used, by trying every choice of who leaves.
fn fewest_misses(uses: &[Vec<u16>], here: &[u16], slots: usize) -> usize {
    let Some((used, rest)) = uses.split_first() else { return 0 };
    let missed = used.iter().filter(|e| !here.contains(e)).count();
    let idle: Vec<u16> = here.iter().copied().filter(|e| !used.contains(e)).collect();
    let kept = idle.len().min(slots - used.len());
    let choices = (0..1u32 << idle.len()).filter(|choice| choice.count_ones() as usize == kept);
    let after = choices.map(|choice| {
        let stays = (0..idle.len()).filter(|i| choice >> i & 1 == 1).map(|i| idle[i]);
        let here: Vec<u16> = used.iter().copied().chain(stays).collect();
        fewest_misses(rest, &here, slots)
    });
    missed + after.min().expect("someone can leave")
}

#[tokio::test]
async fn belady_is_the_best_that_can_be() {
    let dir = TempDir::new().unwrap();
    let (_, path) = record(&dir, 1.0, 7).await;
    // The batches after the prompt's: one row of four experts each.
    let trace = Trace::open(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let record = 6 + 4 + 8;
    let decoded = trace.batches.iter().filter(|batch| batch.experts.len() == 4).count() * record;
    let header = &bytes[..14 + 8 * LAYERS];
    let short = dir.path().join("short.trace");
    std::fs::write(&short, [header, &bytes[bytes.len() - decoded..]].concat()).unwrap();

    let mut expected = 0;
    for layer in 0..LAYERS {
        let of_layer = trace.batches.iter().filter(|batch| batch.layer == layer);
        let uses = of_layer.filter(|batch| batch.experts.len() == 4);
        let uses: Vec<Vec<u16>> = uses.map(|batch| batch.experts.clone()).collect();
        assert_eq!(uses.len(), 6);
        expected += fewest_misses(&uses, &[], 6);
    }
    // Six of 32 experts.
    let lines = replayed(&["--cache", "18.75%"], &[&short]);
    let misses = |line: &Value| line["misses"].as_u64().unwrap() as usize;
    let of = |policy: &str| misses(lines.iter().find(|line| line["policy"] == policy).unwrap());
    assert_eq!(of("belady"), expected);
    let alone = ["lru", "lfu", "aged", "gate", "successor"];
    assert!(alone.into_iter().all(|policy| of(policy) >= expected), "{lines:?}");
    assert!(alone.into_iter().any(|policy| of(policy) > expected), "{lines:?}");
}

#[tokio::test]
async fn several_traces_add_up_and_each_starts_cold() {
    let dir = TempDir::new().unwrap();
    let (_, path) = record(&dir, 1.0, 20).await;
    let once = replayed(&["--cache", "25%"], &[&path]);
    let twice = replayed(&["--cache", "25%"], &[&path, &path]);
    assert_eq!(once.len(), 8, "every policy, if none is named");
    for (once, twice) in once.iter().zip(&twice) {
        let (once, twice) = (once["misses"].as_u64(), twice["misses"].as_u64());
        assert_eq!(once.map(|misses| 2 * misses), twice);
    }
}

#[tokio::test]
async fn a_trace_that_is_cut_off_is_read_up_to_its_last_whole_batch() {
    let dir = TempDir::new().unwrap();
    let (_, path) = record(&dir, 1.0, 4).await;
    let whole = Trace::open(&path).unwrap();
    assert!(!whole.cut_off);
    assert_eq!((whole.batches.len(), whole.shape.expert_bytes.len()), (4 * LAYERS, LAYERS));
    let bytes = std::fs::read(&path).unwrap();
    for missing in [1, 17] {
        std::fs::write(&path, &bytes[..bytes.len() - missing]).unwrap();
        let cut = Trace::open(&path).unwrap();
        assert!(cut.cut_off && cut.shape == whole.shape);
        assert_eq!(cut.batches, whole.batches[..4 * LAYERS - 1]);
    }
    let Output { status, stderr, .. } = replay(&[], &[&path]);
    assert!(status.success());
    assert!(String::from_utf8(stderr).unwrap().contains("ends within a batch"));
    // Weights of a row add up to 1 in this model, up to their rounding.
    for batch in &whole.batches {
        for weights in batch.weights.chunks(4) {
            assert!((weights.iter().sum::<f32>() - 1.0).abs() < 4e-3, "{weights:?}");
        }
    }
}

#[tokio::test]
async fn what_is_no_trace_is_refused_and_named() {
    let dir = TempDir::new().unwrap();
    let (_, path) = record(&dir, 1.0, 2).await;
    let good = std::fs::read(&path).unwrap();
    let first = 14 + 8 * LAYERS;
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    for (bytes, says) in [
        (vec![], "expected a routing trace of version 1"),
        (changed(7, 2), "expected a routing trace of version 1"),
        (good[..first - 1].to_vec(), "expected a routing trace of version 1"),
        (changed(8, 0), "found 0 layers"),
        (changed(12, 33), "32 experts, 33 a row"),
        (changed(21, 0xff), "expected a model's dimensions"),
        (changed(first, 6), "found layer 6 in batch 0, expected 0 to 5"),
        (changed(first + 6, 32), "found expert 32 in batch 0, expected 0 to 31"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let said = refused(&path);
        assert!(said.contains(says) && said.contains(path.to_str().unwrap()), "{said}");
    }
    assert!(refused(&dir.path().join("none")).contains("none"));
}
