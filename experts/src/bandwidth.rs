//! How fast this machine reads memory: what decoding is measured against.

use std::hint::black_box;
use std::time::Instant;

use crate::pool::Pool;
use crate::quant::isa::multiversion;

/// Repeats; the best counts, since other work on the machine only ever slows one down.
const REPEATS: usize = 7;

/// Bytes that are read in a step: as many independent chains as hide their latency.
const STEP: usize = 512;

/// Bytes a second that the pool's threads read together from `bytes`, which should be much more than the caches hold.
pub fn read_bandwidth(pool: &Pool, bytes: &[u8]) -> f64 {
    let (steps, _) = bytes.as_chunks();
    let chunk = steps.len().div_ceil(pool.threads() * 8).max(1);
    let tasks = steps.len().div_ceil(chunk);
    let seconds = (0..REPEATS).map(|_| {
        let started = Instant::now();
        pool.run(tasks, &|task| {
            black_box(read(&steps[task * chunk..((task + 1) * chunk).min(steps.len())]));
        });
        started.elapsed().as_secs_f64()
    });
    bytes.len() as f64 / seconds.fold(f64::INFINITY, f64::min)
}

multiversion! {
    fn read(steps: &[[u8; STEP]]) -> u8 {
        let mut sums = [0u8; STEP];
        for step in steps {
            for (sum, byte) in sums.iter_mut().zip(step) {
                *sum ^= byte;
            }
        }
        sums.into_iter().fold(0, |sum, byte| sum ^ byte)
    }
}
