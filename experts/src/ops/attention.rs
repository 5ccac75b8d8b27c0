//! Causal attention of some rows over a cache of keys and values.

use std::mem::MaybeUninit;

use super::kv::{BLOCK, KvTensor, MAX_HEAD_DIM, QUERIES, Queries};
use super::{exp, exp_all, greatest, sum_of};
use crate::pool::{Pool, SharedMut};
use crate::quant::filled;
use crate::quant::isa::multiversion;
use crate::quant::kv::LANES;

/// The shape of an attention layer.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Query heads; a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Values a head, at most [`Attention::MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// What scores are multiplied with: 1 / sqrt(head_dim) as a rule.
    pub scale: f32,
}

impl Attention {
    /// The most values a head.
    pub const MAX_HEAD_DIM: usize = MAX_HEAD_DIM;
}

/// One head of one row; those that pass over a block together are heads of one row or rows of one head.
#[derive(Clone, Copy, Default)]
struct Query<'a> {
    values: &'a [f32],
    /// Where its output begins.
    at: usize,
    /// Positions that it sees.
    sees: usize,
}

/// `out[r, h] = softmax(q[r, h] · k[0..=positions[r]] * scale) · v`; `q` and `out` are `[rows, n_heads, head_dim]`. A row's
/// result does not depend on the other rows.
///
/// # Panics
/// Where a length does not fit the shape or a position lies beyond the cache.
pub fn attend(
    pool: &Pool,
    shape: &Attention,
    q: &[f32],
    k: &KvTensor,
    v: &KvTensor,
    positions: &[usize],
    out: &mut [f32],
) {
    let Attention { n_heads, n_kv_heads, head_dim, .. } = *shape;
    assert_eq!(q.len(), positions.len() * n_heads * head_dim, "queries");
    assert_eq!(out.len(), q.len(), "outputs");
    assert!(n_heads.is_multiple_of(n_kv_heads), "{n_heads} heads share {n_kv_heads}");
    assert!(head_dim <= Attention::MAX_HEAD_DIM, "heads of {head_dim} values");

    let group = n_heads / n_kv_heads;
    let rows_together = (QUERIES / group).max(1);
    let chunks = positions.len().div_ceil(rows_together);
    let out = SharedMut::new(out);
    pool.run(chunks * n_kv_heads, &|task| {
        // Rows from the last: it sees most, and long tasks are best begun first.
        let (chunk, head) = (chunks - 1 - task / n_kv_heads, task % n_kv_heads);
        let rows = chunk * rows_together..((chunk + 1) * rows_together).min(positions.len());
        let count = rows.len() * group;
        let query = |i: usize| {
            let row = rows.start + i / group;
            let at = (row * n_heads + head * group + i % group) * head_dim;
            Query { values: &q[at..][..head_dim], at, sees: positions[row] + 1 }
        };
        for first in (0..count).step_by(QUERIES) {
            let mut queries = [Query::default(); QUERIES];
            let queries = &mut queries[..QUERIES.min(count - first)];
            queries.iter_mut().enumerate().for_each(|(i, to)| *to = query(first + i));
            together(queries, shape, head, (k, v), &out);
        }
    });
}

/// Some queries over the same keys and values, a block at a time: the online softmax of Milakov and Gimelshein (2018).
/// `out` is `[queries, head_dim]`.
fn together(
    queries: &[Query<'_>],
    shape: &Attention,
    head: usize,
    (k, v): (&KvTensor, &KvTensor),
    out: &SharedMut<'_, f32>,
) {
    let count = queries.len();
    let last = queries.iter().map(|query| query.sees).max().unwrap_or(0);
    let keyed = Queries::new(k, queries.iter().map(|query| query.values), shape.scale);
    let mut room = [const { MaybeUninit::uninit() }; MAX_HEAD_DIM.div_ceil(LANES)];
    let attended = filled(&mut room[..shape.head_dim.div_ceil(LANES)], [[0f32; LANES]; QUERIES]);
    let (mut most, mut sums) = ([f32::NEG_INFINITY; QUERIES], [[0f32; LANES]; QUERIES]);
    let mut scores = [[[0f32; LANES]; QUERIES]; BLOCK / LANES];
    let (mut weights, mut seen) = ([[0f32; BLOCK]; QUERIES], [0; QUERIES]);

    for start in (0..last).step_by(BLOCK) {
        k.score(head, start, &keyed, &mut scores);
        for (i, query) in queries.iter().enumerate() {
            seen[i] = query.sees.saturating_sub(start).min(BLOCK);
            let (first, second) = weights[i].split_at_mut(LANES);
            first.copy_from_slice(&scores[0][i]);
            second.copy_from_slice(&scores[1][i]);
        }
        let shrink = weigh(&mut weights[..count], &seen, &mut most, &mut sums);
        if shrink != [1.0; QUERIES] {
            scale(attended, &shrink);
        }
        v.blend(head, start, &weights[..count], &seen[..count], attended);
    }
    for (i, (query, sum)) in queries.iter().zip(sums).enumerate() {
        // SAFETY: each query's output is its own.
        let out = unsafe { out.slice(query.at, shape.head_dim) };
        let sum = sum_of(&sum);
        for (out, attended) in out.chunks_mut(LANES).zip(&*attended) {
            for (out, attended) in out.iter_mut().zip(&attended[i]) {
                *out = attended / sum;
            }
        }
    }
}

multiversion! {
    /// Scores of what is seen to weights relative to the greatest score so far, the others to 0; returns what earlier weights
    /// are to be multiplied with. Lanes are not added up before the end, and not compared with each other unless one is
    /// greater than all before, so that no query waits for another.
    fn weigh(
        scores: &mut [[f32; BLOCK]],
        seen: &[usize; QUERIES],
        most: &mut [f32; QUERIES],
        sums: &mut [[f32; LANES]; QUERIES],
    ) -> [f32; QUERIES] {
        let mut shrink = [1.0; QUERIES];
        for (i, scores) in scores.iter_mut().enumerate() {
            if seen[i] < BLOCK {
                scores[seen[i]..].fill(f32::NEG_INFINITY);
            }
            let mut lanes = [f32::NEG_INFINITY; LANES];
            for scores in scores.as_chunks::<LANES>().0 {
                for (lane, score) in lanes.iter_mut().zip(scores) {
                    *lane = if score > lane { *score } else { *lane };
                }
            }
            if lanes.iter().fold(false, |above, lane| above | (*lane > most[i])) {
                let now = greatest(&lanes);
                shrink[i] = exp(most[i] - now);
                sums[i].iter_mut().for_each(|sum| *sum *= shrink[i]);
                most[i] = now;
            }
            exp_all(scores, most[i]);
            if seen[i] < BLOCK {
                scores[seen[i]..].fill(0.0);
            }
            for weights in scores.as_chunks::<LANES>().0 {
                for (sum, weight) in sums[i].iter_mut().zip(weights) {
                    *sum += weight;
                }
            }
        }
        shrink
    }

    /// `out[g, i, l] *= by[i]`
    fn scale(out: &mut [[[f32; LANES]; QUERIES]], by: &[f32; QUERIES]) {
        for out in out {
            for (out, by) in out.iter_mut().zip(by) {
                *out = out.map(|out| out * by);
            }
        }
    }
}
