//! Shows that the process stays within the memory that it gives to experts:
//!
//! ```text
//! cargo run --release -p outrigger-experts --example residency -- MODEL.gguf [BUDGET, 25%] [TOKENS, 200]
//! ```
//!
//! Uses every layer's experts as tokens with random routing would, and prints, from
//! `/proc/self/smaps`, how much of the experts' tensors is in this process's memory. The model must
//! be a single file.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use outrigger_experts::{Budget, Elsewhere, ExpertStore, Model, Tensor};

#[path = "../tests/smaps/mod.rs"]
mod smaps;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = PathBuf::from(args.next().ok_or("which model file?")?).canonicalize()?;
    let budget: Budget = args.next().as_deref().unwrap_or("25%").parse()?;
    let tokens: usize = args.next().as_deref().unwrap_or("200").parse()?;

    let model = Arc::new(Model::open(&path)?);
    let store = ExpertStore::open(model.clone(), budget, Elsewhere::Cold)?;
    let (n_experts, n_used) = (model.spec.n_experts, model.spec.n_used);
    let tensors = model.experts.iter().flat_map(|layer| layer.tensors());
    let ranges: Vec<Range<usize>> = tensors.map(Tensor::range).collect();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let all: u64 = ranges.iter().map(|range| range.len() as u64).sum();
    let in_use = (n_used * store.expert_bytes(0)) as u64;
    println!("experts  {:9.1} MiB", mib(all));
    println!("budget   {:9.1} MiB", mib(store.budget_bytes()));
    println!("in use   {:9.1} MiB at a time", mib(in_use));
    if let Some(warning) = store.cliff() {
        println!("{warning}");
    }

    println!("{:>6} {:>12} {:>6} {:>12} {:>8}", "token", "rss MiB", "hits", "read MiB", "seconds");
    let (mut random, started) = (0x9e37_79b9_7f4a_7c15_u64, Instant::now());
    for token in 1..=tokens {
        let mut rss = 0;
        for layer in 0..model.experts.len() {
            let mut experts = Vec::with_capacity(n_used);
            while experts.len() < n_used {
                // xorshift64
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let expert = (random % n_experts as u64) as u16;
                if !experts.contains(&expert) {
                    experts.push(expert);
                }
            }
            let mut pinned = store.acquire(layer, &experts)?;
            while !pinned.arrivals().is_empty() {}
            if let Some(refused) = pinned.refused().first() {
                return Err(format!("expert {}: {}", refused.expert, refused.why).into());
            }
            if token % (tokens / 10).max(1) == 0 && layer + 1 == model.experts.len() {
                rss = smaps::rss(&path, &ranges);
            }
        }
        if rss > 0 {
            let total = store.stats().total();
            let hits = 100.0 * total.hits as f64 / (total.hits + total.misses) as f64;
            let (rss, read) = (mib(rss as u64), mib(total.bytes_read));
            let seconds = started.elapsed().as_secs_f64();
            println!("{token:>6} {rss:>12.1} {hits:>5.1}% {read:>12.1} {seconds:>8.1}");
        }
    }
    Ok(())
}
