//! Means over texts, and how sure they are. Pure arithmetic in f64.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A mean, and the interval that holds 95 % of its bootstrap resamples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Estimate {
    pub(super) value: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Estimate {
    /// The estimate of a growing function of the mean.
    pub(super) fn map(self, f: impl Fn(f64) -> f64) -> Estimate {
        Estimate { value: f(self.value), low: f(self.low), high: f(self.high) }
    }
}

/// Rows of a block: long enough that neighbouring predictions, which err together, are drawn together.
const BLOCK_ROWS: usize = 32;
/// A short text is cut into this many blocks all the same, or every resample would be the text itself.
const MIN_BLOCKS: usize = 8;
const RESAMPLES: usize = 1000;
/// Resamples beyond the interval on either side: 2.5 %.
const BEYOND: usize = 25;
const SEED: u64 = 0;

/// Estimates each column's mean over texts of the means over a text's rows. `texts` are not empty, nor is any of them.
///
/// Resamples by blocks of consecutive rows (Künsch 1989, The Jackknife and the Bootstrap for General Stationary
/// Observations), which wrap round at the end so that every row is drawn as often (Politis and Romano 1992). The same
/// rows always give the same intervals.
pub(super) fn estimate<const N: usize>(texts: &[Vec<[f64; N]>]) -> [Estimate; N] {
    let value = mean(texts.iter().map(|rows| mean(rows.iter().copied())));
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut resample = || mean(texts.iter().map(|rows| mean(draw(rows, &mut rng))));
    let resamples: Vec<[f64; N]> = (0..RESAMPLES).map(|_| resample()).collect();
    std::array::from_fn(|column| {
        let mut sorted: Vec<f64> = resamples.iter().map(|means| means[column]).collect();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted[BEYOND], sorted[RESAMPLES - 1 - BEYOND]);
        Estimate { value: value[column], low, high }
    })
}

/// As many rows as there are, by blocks.
fn draw<const N: usize>(rows: &[[f64; N]], rng: &mut ChaCha8Rng) -> impl Iterator<Item = [f64; N]> {
    let block = BLOCK_ROWS.min(rows.len().div_ceil(MIN_BLOCKS));
    let mut start = 0;
    (0..rows.len()).map(move |i| {
        if i % block == 0 {
            start = below(rows.len(), rng);
        }
        rows[(start + i % block) % rows.len()]
    })
}

/// A number below `n`, all of them as likely, but for 2^-64.
fn below(n: usize, rng: &mut ChaCha8Rng) -> usize {
    ((u128::from(rng.next_u64()) * n as u128) >> 64) as usize
}

/// Each column's mean; NaN of nothing.
pub(super) fn mean<const N: usize>(rows: impl Iterator<Item = [f64; N]>) -> [f64; N] {
    let (mut count, mut sums) = (0.0, [0.0; N]);
    for row in rows {
        count += 1.0;
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
    sums.map(|sum| sum / count)
}

#[cfg(test)]
mod tests;
