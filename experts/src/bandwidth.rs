//! How fast this machine reads memory: what decoding is measured against.

use std::hint::black_box;
use std::time::Instant;

use crate::pool::Pool;

/// Repeats; the best counts, since other work on the machine only ever slows one down.
const REPEATS: usize = 7;

/// Bytes a second that the pool's threads read together from `bytes`, which should be much more than the caches hold.
pub fn read_bandwidth(pool: &Pool, bytes: &[u8]) -> f64 {
    let (lines, _) = bytes.as_chunks::<64>();
    let chunk = lines.len().div_ceil(pool.threads() * 8).max(1);
    let tasks = lines.len().div_ceil(chunk);
    let seconds = (0..REPEATS).map(|_| {
        let started = Instant::now();
        pool.run(tasks, &|task| {
            let mut sums = [0u8; 64];
            for line in &lines[task * chunk..((task + 1) * chunk).min(lines.len())] {
                for (sum, byte) in sums.iter_mut().zip(line) {
                    *sum ^= byte;
                }
            }
            black_box(sums);
        });
        started.elapsed().as_secs_f64()
    });
    bytes.len() as f64 / seconds.fold(f64::INFINITY, f64::min)
}
