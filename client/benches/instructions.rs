//! Pieces of work whose instructions `.ci/instructions` counts, by running them under callgrind, which counts what
//! happens within [`counted`].
//!
//! With a name, does that work; without, prints the kernels that run and the names. One thread, and no server: the
//! same instructions every time.
#![forbid(unsafe_code)]

use std::hint::black_box;
use std::time::Duration;

use outrigger::{Engine, EngineConfig, SamplerConfig};
use outrigger_experts::{Activations, GgmlType, Mat, Pool, matmul, quantize};
use outrigger_proto::encoding::{decode, decode_sums, encode_f48, encode_q8_k};
use outrigger_proto::v1::Encoding;
use outrigger_router::{Gate, Partial, Residency, Scoring, Site, combine, group, place};

const WORK: [(&str, fn()); 9] = [
    ("one row of Q4_K", || product(GgmlType::Q4_K, 1)),
    ("one row of Q8_0", || product(GgmlType::Q8_0, 1)),
    ("one row of Q6_K", || product(GgmlType::Q6_K, 1)),
    ("8 rows of Q4_K", || product(GgmlType::Q4_K, 8)),
    ("8 rows of Q8_0", || product(GgmlType::Q8_0, 8)),
    ("8 rows of Q6_K", || product(GgmlType::Q6_K, 8)),
    ("gate to combine", layer),
    ("a request and its answer on the wire", wire),
    ("a token of the demo model", token),
];

fn main() {
    let name = std::env::args().nth(1).unwrap_or_default();
    match WORK.iter().find(|(known, _)| *known == name) {
        Some((_, work)) => work(),
        None => {
            println!("{}", outrigger::cpu_features());
            WORK.iter().for_each(|(name, _)| println!("{name}"));
        }
    }
}

#[inline(never)]
fn counted(work: &mut dyn FnMut()) {
    work();
}

/// Counted the second time: what is done once and for all is no part of it.
fn count(mut work: impl FnMut()) {
    work();
    counted(&mut work);
}

/// 64 rows of 2048 weights times `n` rows.
fn product(ty: GgmlType, n: usize) {
    let (rows, cols) = (64, 2048);
    let mut bytes = Vec::new();
    quantize(ty, &noise(rows * cols), &mut bytes);
    let mut x = Activations::new(cols);
    x.set(&noise(n * cols));
    let mut out = vec![0.0; n * rows];
    let pool = Pool::new(1);
    count(|| matmul(&pool, Mat { ty, rows, cols, bytes: &bytes }, &mut x, black_box(&mut out)));
}

/// The router's part of a layer: 8 rows to 8 of 128 experts each, half of which are on one of two servers.
fn layer() {
    let (rows, n_experts, width) = (8, 128, 2048);
    let gate = Gate { scoring: Scoring::Softmax, n_experts, top_k: 8, normalise: true, scale: 1.0 };
    let logits = noise(rows * n_experts);
    let residency: Vec<_> =
        (0..n_experts).map(|e| [Residency::Hot, Residency::Absent][e % 2]).collect();
    let holds = vec![true; n_experts];
    let (trip, per_row) = (Duration::from_millis(5), Duration::from_micros(100));
    let sites = [1, 2].map(|server| Site { server, holds: &holds, trip, per_row });
    let cold_load = Duration::from_millis(1);
    let mut local = Partial::zeros(rows, width);
    let mut parts = [(2, local.clone()), (1, local.clone())];
    count(|| {
        let groups = group(&gate.route(black_box(&logits)));
        let placement = place(&groups, &residency, &sites, cold_load);
        local.cover(&placement.local);
        combine(&mut local, black_box(&mut parts));
    });
}

/// 8 rows there as blocks and back as sums.
fn wire() {
    let (rows, cols) = (8, 2048);
    let quants: Vec<i8> = noise(rows * cols).iter().map(|v| (127.0 * v) as i8).collect();
    let scales = noise(rows * cols / 256);
    let sums: Vec<f64> = noise(rows * cols).into_iter().map(f64::from).collect();
    count(|| {
        let there = encode_q8_k(black_box(&scales), black_box(&quants));
        let back = encode_f48(black_box(&sums));
        black_box(decode(Encoding::Q8K, rows, cols, &there)).expect("what was encoded");
        black_box(decode_sums(Encoding::F48, rows, cols, &back)).expect("what was encoded");
    });
}

/// A decoded token after a short text, every expert in memory.
fn token() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo.gguf");
    let config = EngineConfig { threads: 1, ..EngineConfig::new(model) };
    let engine = runtime.block_on(Engine::open(config)).expect("the demo model");
    let mut session = engine.session(SamplerConfig::greedy()).expect("greedy sampling is valid");
    session.push_text("Once upon a time").expect("the text fits");
    count(|| {
        black_box(runtime.block_on(session.step())).expect("a token");
    });
}

fn noise(n: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}
