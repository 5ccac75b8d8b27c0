//! Causal attention of some rows over a cache of halves.

use half::f16;

use super::{exp_all, greatest};
use crate::GgmlType;
use crate::pool::{Pool, SharedMut};
use crate::quant::isa::multiversion;
use crate::quant::{ActRow, Kernels, Tile};

/// Positions whose scores are computed together.
const BLOCK: usize = 64;
/// Query heads that pass over a block of keys together.
const HEADS: usize = 8;

/// The shape of an attention layer and of its cache.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Query heads; a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
    /// Positions that the cache has room for, per key and value head.
    pub capacity: usize,
    /// What scores are multiplied with: 1 / sqrt(head_dim) as a rule.
    pub scale: f32,
}

/// `out[r, h] = softmax(q[r, h] · k[0..=positions[r]] * scale) · v`; `q` and `out` are `[rows, n_heads, head_dim]`, `k`
/// and `v` `[n_kv_heads, capacity, head_dim]`. A row's result does not depend on the other rows.
///
/// # Panics
/// Where a length does not fit the shape or a position lies beyond the cache.
pub fn attend(
    pool: &Pool,
    shape: &Attention,
    q: &[f32],
    k: &[f16],
    v: &[f16],
    positions: &[usize],
    out: &mut [f32],
) {
    let Attention { n_heads, n_kv_heads, head_dim, capacity, .. } = *shape;
    assert_eq!(q.len(), positions.len() * n_heads * head_dim, "queries");
    assert_eq!(out.len(), q.len(), "outputs");
    assert!(k.len() >= n_kv_heads * capacity * head_dim && v.len() == k.len(), "keys and values");
    assert!(n_heads.is_multiple_of(n_kv_heads), "{n_heads} heads share {n_kv_heads}");
    assert!(positions.iter().all(|p| *p < capacity), "a position beyond the cache's {capacity}");

    let group = n_heads / n_kv_heads * head_dim;
    let out = SharedMut::new(out);
    pool.run(positions.len() * n_kv_heads, &|task| {
        // Rows from the last: it sees most, and long tasks are best begun first.
        let (row, head) = (positions.len() - 1 - task / n_kv_heads, task % n_kv_heads);
        let at = (row * n_kv_heads + head) * group;
        let cache = head * capacity * head_dim..(head * capacity + positions[row] + 1) * head_dim;
        // SAFETY: each task has heads of its own.
        let out = unsafe { out.slice(at, group) };
        let q = &q[at..][..group];
        for (q, out) in q.chunks(HEADS * head_dim).zip(out.chunks_mut(HEADS * head_dim)) {
            heads(shape, q, &k[cache.clone()], &v[cache.clone()], out);
        }
    });
}

/// Up to `HEADS` query heads over the same keys and values, a block at a time: the online softmax of Milakov and
/// Gimelshein (2018), with the running sums in `out`.
fn heads(shape: &Attention, q: &[f32], k: &[f16], v: &[f16], out: &mut [f32]) {
    let head_dim = shape.head_dim;
    let kernels = Kernels::best();
    let (score, blend) = (kernels.tile(GgmlType::F16), kernels.blend_f16());
    let n = q.len() / head_dim;
    let mut rows = [ActRow::default(); HEADS];
    for (row, q) in rows.iter_mut().zip(q.chunks_exact(head_dim)) {
        row.values = q;
    }
    let mut most = [f32::NEG_INFINITY; HEADS];
    let mut sums = [0f32; HEADS];
    out.fill(0.0);

    for (k, v) in k.chunks(BLOCK * head_dim).zip(v.chunks(BLOCK * head_dim)) {
        let positions = k.len() / head_dim;
        let mut scores = [0f32; HEADS * BLOCK];
        // SAFETY: halves are two plain bytes each; the kernel is this machine's, the keys are `positions` rows of
        // `head_dim` halves, and `scores` has a row of BLOCK for each head.
        unsafe {
            score(&Tile {
                w: std::slice::from_raw_parts(k.as_ptr().cast(), k.len() * 2),
                row_bytes: head_dim * 2,
                rows: positions,
                x: &rows[..n],
                out: scores.as_mut_ptr(),
                stride: BLOCK,
            });
        }
        for (h, scores) in scores.chunks_exact_mut(BLOCK).take(n).enumerate() {
            let scores = &mut scores[..positions];
            let out = &mut out[h * head_dim..][..head_dim];
            let shrink = weigh(scores, shape.scale, &mut most[h], &mut sums[h]);
            if shrink != 1.0 {
                out.iter_mut().for_each(|out| *out *= shrink);
            }
            // SAFETY: the kernel is this machine's; `v` has `head_dim` values for each score.
            unsafe { blend(scores, v, out) };
        }
    }
    for (out, sum) in out.chunks_exact_mut(head_dim).zip(sums) {
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
}
