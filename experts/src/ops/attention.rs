//! Causal attention of some rows over a cache of keys and values.

use std::array::{from_mut, from_ref};
use std::mem::MaybeUninit;
use std::ops::Range;

use super::kv::{BLOCK, KvTensor};
use super::{exp_all, greatest};
use crate::pool::{Pool, SharedMut};
use crate::quant::filled;
use crate::quant::isa::multiversion;

/// Queries that pass over a block together, heads of one row or rows of one head.
const QUERIES: usize = 8;

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
    pub const MAX_HEAD_DIM: usize = 512;
}

/// One head of one row.
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
            let mut room = [const { MaybeUninit::uninit() }; QUERIES * Attention::MAX_HEAD_DIM];
            let attended = filled(&mut room[..queries.len() * head_dim], 0.0);
            together(queries, shape, head, (k, v), attended);
            for (query, attended) in queries.iter().zip(attended.chunks_exact(head_dim)) {
                // SAFETY: each task has queries of its own.
                unsafe { out.slice(query.at, head_dim) }.copy_from_slice(attended);
            }
        }
    });
}

/// Some queries over the same keys and values, a block at a time: the online softmax of Milakov and Gimelshein (2018),
/// with the running sums in `out`, `[queries, head_dim]`, zeros at first.
fn together(
    queries: &[Query<'_>],
    shape: &Attention,
    head: usize,
    (k, v): (&KvTensor, &KvTensor),
    out: &mut [f32],
) {
    let dim = shape.head_dim;
    let last = queries.iter().map(|query| query.sees).max().unwrap_or(0);
    let mut room = [const { MaybeUninit::uninit() }; BLOCK * Attention::MAX_HEAD_DIM];
    let block = filled(&mut room[..BLOCK * dim], 0.0);
    let (mut most, mut sums) = ([f32::NEG_INFINITY; QUERIES], [0f32; QUERIES]);
    let mut scores = [[0f32; BLOCK]; QUERIES];
    let scores = &mut scores[..queries.len()];

    for start in (0..last).step_by(BLOCK) {
        k.read(head, start, block);
        score(queries, block, scores);
        let mut seen = [0; QUERIES];
        for (i, query) in queries.iter().enumerate() {
            seen[i] = query.sees.saturating_sub(start).min(BLOCK);
            if seen[i] == 0 {
                continue;
            }
            let scores = &mut scores[i][..seen[i]];
            let shrink = weigh(scores, shape.scale, &mut most[i], &mut sums[i]);
            if shrink != 1.0 {
                out[i * dim..][..dim].iter_mut().for_each(|out| *out *= shrink);
            }
        }
        v.read(head, start, block);
        blend(scores, &seen[..queries.len()], block, out);
    }
    for (out, sum) in out.chunks_exact_mut(dim).zip(sums) {
        out.iter_mut().for_each(|out| *out /= sum);
    }
}

multiversion! {
    /// Scores to weights relative to the greatest score so far; returns what earlier weights are to be multiplied
    /// with.
    fn weigh(scores: &mut [f32], scale: f32, most: &mut f32, sum: &mut f32) -> f32 {
        for score in scores.iter_mut() {
            *score *= scale;
        }
        let now = greatest(scores).max(*most);
        let shrink = if *most == now { 1.0 } else { (*most - now).exp() };
        *most = now;
        *sum = *sum * shrink + exp_all(scores, now);
        shrink
    }

    /// `scores[i, p] = queries[i] · keys[.., p]`; `keys` are `[head_dim, BLOCK]`.
    fn score(queries: &[Query<'_>], keys: &[f32], scores: &mut [[f32; BLOCK]]) {
        let (fours, rest) = queries.as_chunks::<4>();
        let (scores_of_fours, scores_of_rest) = scores.as_chunks_mut::<4>();
        for (queries, scores) in fours.iter().zip(scores_of_fours) {
            score_some::<4>(queries, keys, scores);
        }
        for (query, scores) in rest.iter().zip(scores_of_rest) {
            score_some::<1>(from_ref(query), keys, from_mut(scores));
        }
    }

    /// `out[i] += sum over p < seen[i] of weights[i, p] * values[p]`, `out` `[queries, head_dim]`, `values` `[BLOCK,
    /// head_dim]`. The order of the sum is that of `p`, whatever the other queries see.
    fn blend(weights: &[[f32; BLOCK]], seen: &[usize], values: &[f32], out: &mut [f32]) {
        let dim = values.len() / BLOCK;
        let fours = weights.chunks(4).zip(seen.chunks(4)).zip(out.chunks_mut(4 * dim));
        for ((weights, seen), out) in fours {
            let mut by_all = 0;
            if let Some(weights) = weights.first_chunk() {
                by_all = seen.iter().copied().min().unwrap_or(0);
                blend_some::<4, 32>(weights, 0..by_all, values, out);
            }
            for ((weights, seen), out) in weights.iter().zip(seen).zip(out.chunks_exact_mut(dim)) {
                blend_some::<1, 64>(&[*weights], by_all..*seen, values, out);
            }
        }
    }
}

/// [`score`] of `N` queries, some columns in registers at a time.
#[inline(always)]
fn score_some<const N: usize>(
    queries: &[Query<'_>; N],
    keys: &[f32],
    scores: &mut [[f32; BLOCK]; N],
) {
    const COLUMNS: usize = 32;
    let keys = keys.as_chunks::<BLOCK>().0;
    // Slices of one length, which needs no check within the loop.
    let queries = queries.each_ref().map(|query| &query.values[..keys.len()]);
    for first in (0..BLOCK).step_by(COLUMNS) {
        let mut sums = [[0f32; COLUMNS]; N];
        for i in 0..keys.len() {
            let keys = &keys[i][first..first + COLUMNS];
            for (sums, query) in sums.iter_mut().zip(queries) {
                let q = query[i];
                for (sum, key) in sums.iter_mut().zip(keys) {
                    *sum = key.mul_add(q, *sum);
                }
            }
        }
        for (scores, sums) in scores.iter_mut().zip(sums) {
            scores[first..first + COLUMNS].copy_from_slice(&sums);
        }
    }
}

/// [`blend`] of `N` queries at the positions `seen`, `LANES` outputs of each in registers at a time.
#[inline(always)]
fn blend_some<const N: usize, const LANES: usize>(
    weights: &[[f32; BLOCK]; N],
    seen: Range<usize>,
    values: &[f32],
    out: &mut [f32],
) {
    let dim = values.len() / BLOCK;
    let whole = dim / LANES * LANES;
    let rows = &values[seen.start * dim..seen.end * dim];
    let weights = weights.each_ref().map(|weights| &weights[seen.clone()]);
    for first in (0..whole).step_by(LANES) {
        let mut sums = [[0f32; LANES]; N];
        for (n, sums) in sums.iter_mut().enumerate() {
            sums.copy_from_slice(&out[n * dim + first..][..LANES]);
        }
        for (i, values) in rows.chunks_exact(dim).enumerate() {
            let values = &values[first..first + LANES];
            for (sums, weights) in sums.iter_mut().zip(weights) {
                let weight = weights[i];
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = value.mul_add(weight, *sum);
                }
            }
        }
        for (n, sums) in sums.iter().enumerate() {
            out[n * dim + first..][..LANES].copy_from_slice(sums);
        }
    }
    for (out, weights) in out.chunks_exact_mut(dim).zip(weights) {
        for (weight, values) in weights.iter().zip(rows.chunks_exact(dim)) {
            for (out, value) in out[whole..].iter_mut().zip(&values[whole..]) {
                *out = value.mul_add(*weight, *out);
            }
        }
    }
}
