//! Causal attention of some rows over a cache of keys and values.

use std::mem::MaybeUninit;

use super::kv::{BLOCK, KvSide, KvTensor, MAX_HEAD_DIM, QUERIES, Queries, QueryRoom};
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

    /// Tiles of a [`Part`].
    fn tiles(&self) -> usize {
        1 + self.head_dim.div_ceil(LANES)
    }
}

/// Positions that are summed up by themselves: what one task looks back over where there are more threads than heads.
const SPAN: usize = 32 * BLOCK;
/// With so many batches a thread, spans need no tasks of their own.
const BATCHES_PER_THREAD: usize = 2;

/// Sums over part of the positions that some queries see, relative to about each query's greatest score there: the state of
/// the online softmax of Milakov and Gimelshein (2018).
struct Part<'a> {
    /// No score there is greater by more than [`SLACK`].
    most: &'a mut [f32; QUERIES],
    /// First the weights' sums, by position modulo 32, then the values' weighted sums, `[head_dim / 32]`.
    tiles: &'a mut [Tile],
}

/// What a score may exceed the one that weights are relative to before sums are scaled down to it: a weight of 245. From
/// block to block greater scores are common, but few are so much greater (FlashAttention-4 does so too).
const SLACK: f32 = 5.5;

/// 32 lanes a query.
type Tile = [[f32; LANES]; QUERIES];

const NOTHING: Tile = [[0.0; LANES]; QUERIES];
const MAX_TILES: usize = 1 + MAX_HEAD_DIM.div_ceil(LANES);

/// Buffers that one session reuses from layer to layer: where few queries look back far, each of their spans is a task.
#[derive(Debug, Default)]
pub struct AttentionScratch {
    most: Vec<[f32; QUERIES]>,
    tiles: Vec<Tile>,
}

/// `out[r, h] = softmax(q[r, h] · k[0..=positions[r]] * scale) · v`; `q` and `out` are `[rows, n_heads, head_dim]`. A row's
/// result depends neither on the other rows nor on the number of threads.
///
/// # Panics
/// Where a length does not fit the shape or a position lies beyond the cache.
pub fn attend(
    pool: &Pool,
    shape: &Attention,
    q: &[f32],
    kv: (&KvTensor, &KvTensor),
    positions: &[usize],
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let Attention { n_heads, n_kv_heads, head_dim, .. } = *shape;
    assert_eq!(q.len(), positions.len() * n_heads * head_dim, "queries");
    assert_eq!(out.len(), q.len(), "outputs");
    assert!(n_heads.is_multiple_of(n_kv_heads), "{n_heads} heads share {n_kv_heads}");
    assert!(head_dim <= Attention::MAX_HEAD_DIM, "heads of {head_dim} values");
    kv.0.check(KvSide::Keys, (n_kv_heads, head_dim), positions);
    kv.1.check(KvSide::Values, (n_kv_heads, head_dim), positions);

    let batches = &Batches { shape, q, positions };
    let out = &SharedMut::new(out);
    let enough = batches.count() >= BATCHES_PER_THREAD * pool.threads();
    if enough || pool.threads() == 1 || batches.spans() == 1 {
        pool.run(batches.count(), &|b| whole(&batches.at(b), shape, kv, out));
    } else {
        by_spans(pool, batches, kv, scratch, out);
    }
}

/// A batch's spans one after another.
fn whole(
    batch: &Batch<'_>,
    shape: &Attention,
    kv: (&KvTensor, &KvTensor),
    out: &SharedMut<'_, f32>,
) {
    let tiles = shape.tiles();
    let mut room = [const { MaybeUninit::uninit() }; 2 * MAX_TILES];
    let (first, next) = filled(&mut room[..2 * tiles], NOTHING).split_at_mut(tiles);
    let (mut first_most, mut next_most) = ([0.0; QUERIES], [0.0; QUERIES]);
    let mut sum = Part { most: &mut first_most, tiles: first };
    let mut part = Part { most: &mut next_most, tiles: next };
    batch.attend(shape, kv, 0, &mut sum);
    for span in 1..batch.spans() {
        batch.attend(shape, kv, span, &mut part);
        sum.merge(&part);
    }
    batch.finish(shape.head_dim, &sum, out);
}

/// Each batch's spans side by side.
fn by_spans(
    pool: &Pool,
    batches: &Batches<'_>,
    kv: (&KvTensor, &KvTensor),
    scratch: &mut AttentionScratch,
    out: &SharedMut<'_, f32>,
) {
    let (shape, spans, tiles) = (batches.shape, batches.spans(), batches.shape.tiles());
    scratch.most.resize(batches.count() * spans, [0.0; QUERIES]);
    scratch.tiles.resize(batches.count() * spans * tiles, NOTHING);
    let (most, all) = (SharedMut::new(&mut scratch.most), SharedMut::new(&mut scratch.tiles));
    let part = |index: usize| {
        // SAFETY: each is one task's: of the span that makes it, then of the batch that merges it.
        let (most, tiles) = unsafe { (most.slice(index, 1), all.slice(index * tiles, tiles)) };
        Part { most: &mut most[0], tiles }
    };
    pool.run(batches.count() * spans, &|task| {
        let (batch, span) = (batches.at(task / spans), task % spans);
        if span < batch.spans() {
            batch.attend(shape, kv, span, &mut part(task));
        }
    });
    pool.run(batches.count(), &|b| {
        let batch = batches.at(b);
        let mut sum = part(b * spans);
        for span in 1..batch.spans() {
            sum.merge(&part(b * spans + span));
        }
        batch.finish(shape.head_dim, &sum, out);
    });
}

/// The queries of a pass, of which up to [`QUERIES`] that see the same head's keys pass over them together: heads of one row, or
/// rows of one head.
struct Batches<'a> {
    shape: &'a Attention,
    q: &'a [f32],
    positions: &'a [usize],
}

/// Some queries of one key and value head.
struct Batch<'a> {
    head: usize,
    count: usize,
    queries: [Query<'a>; QUERIES],
    /// Positions that any of them sees.
    last: usize,
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

impl<'a> Batches<'a> {
    /// Heads that share keys and values.
    fn group(&self) -> usize {
        self.shape.n_heads / self.shape.n_kv_heads
    }

    fn rows_together(&self) -> usize {
        (QUERIES / self.group()).max(1)
    }

    /// Batches that the heads of one row need.
    fn each(&self) -> usize {
        self.group().div_ceil(QUERIES)
    }

    fn spans(&self) -> usize {
        self.positions.iter().max().map_or(0, |last| last / SPAN + 1)
    }

    fn count(&self) -> usize {
        self.positions.len().div_ceil(self.rows_together()) * self.shape.n_kv_heads * self.each()
    }

    /// The last rows first: they see most, and what is begun late should be short.
    fn at(&self, index: usize) -> Batch<'a> {
        let Attention { n_heads, n_kv_heads, head_dim, .. } = *self.shape;
        let (group, rows_together, each) = (self.group(), self.rows_together(), self.each());
        let (chunk, head, part) =
            (index / each / n_kv_heads, index / each % n_kv_heads, index % each);
        let chunk = self.positions.len().div_ceil(rows_together) - 1 - chunk;
        let rows = chunk * rows_together..((chunk + 1) * rows_together).min(self.positions.len());
        let first = part * QUERIES;
        let count = (rows.len() * group - first).min(QUERIES);
        let mut queries = [Query::default(); QUERIES];
        for (i, query) in (first..).zip(&mut queries[..count]) {
            let row = rows.start + i / group;
            let at = (row * n_heads + head * group + i % group) * head_dim;
            *query = Query { values: &self.q[at..][..head_dim], at, sees: self.positions[row] + 1 };
        }
        let last = queries.iter().map(|query| query.sees).max().unwrap_or(0);
        Batch { head, count, queries, last }
    }
}

impl Batch<'_> {
    fn spans(&self) -> usize {
        self.last.div_ceil(SPAN)
    }

    /// Makes `part` the sums over a span's positions, a block at a time.
    fn attend(
        &self,
        shape: &Attention,
        (k, v): (&KvTensor, &KvTensor),
        span: usize,
        part: &mut Part<'_>,
    ) {
        let queries = &self.queries[..self.count];
        let (mut room, values) = (QueryRoom::NEW, queries.iter().map(|query| query.values));
        let keyed = Queries::new(k, values, shape.scale, &mut room);
        *part.most = [f32::NEG_INFINITY; QUERIES];
        part.tiles.fill(NOTHING);
        let mut scores = [NOTHING; BLOCK / LANES];
        let (mut weights, mut seen) = ([[0f32; BLOCK]; QUERIES], [0; QUERIES]);
        for start in (span * SPAN..self.last.min((span + 1) * SPAN)).step_by(BLOCK) {
            k.score(self.head, (start, self.last - start), &keyed, &mut scores);
            for (i, query) in queries.iter().enumerate() {
                seen[i] = query.sees.saturating_sub(start).min(BLOCK);
                let (first, second) = weights[i].split_at_mut(LANES);
                first.copy_from_slice(&scores[0][i]);
                second.copy_from_slice(&scores[1][i]);
            }
            let weights = &mut weights[..self.count];
            let [sums, attended @ ..] = &mut *part.tiles else { return };
            let shrink = weigh(weights, &seen, part.most, sums);
            if shrink != [1.0; QUERIES] {
                scale(attended, &shrink);
            }
            v.blend(self.head, start, weights, &seen[..self.count], attended);
        }
    }

    /// Writes the queries' outputs.
    fn finish(&self, head_dim: usize, sum: &Part<'_>, out: &SharedMut<'_, f32>) {
        let [sums, attended @ ..] = &*sum.tiles else { return };
        for (i, query) in self.queries[..self.count].iter().enumerate() {
            // SAFETY: each query's output is its own.
            let out = unsafe { out.slice(query.at, head_dim) };
            let sum = sum_of(&sums[i]);
            for (out, attended) in out.chunks_mut(LANES).zip(attended) {
                for (out, attended) in out.iter_mut().zip(&attended[i]) {
                    *out = attended / sum;
                }
            }
        }
    }
}

impl Part<'_> {
    /// Adds the sums over later positions, of which some queries may see none.
    fn merge(&mut self, later: &Part<'_>) {
        let (mut ours, mut theirs) = ([1.0; QUERIES], [1.0; QUERIES]);
        for i in 0..QUERIES {
            let (before, after) = (self.most[i], later.most[i]);
            if before > after {
                theirs[i] = (after - before).exp();
            } else if after > before {
                ours[i] = (before - after).exp();
                self.most[i] = after;
            }
        }
        add_scaled(self.tiles, &ours, later.tiles, &theirs);
    }
}

multiversion! {
    /// Scores of what is seen to weights relative to about the greatest score so far, the others to 0, and their sums; returns
    /// what earlier weights are to be multiplied with.
    fn weigh(
        scores: &mut [[f32; BLOCK]],
        seen: &[usize; QUERIES],
        most: &mut [f32; QUERIES],
        sums: &mut Tile,
    ) -> [f32; QUERIES] {
        let mut shrink = [1.0; QUERIES];
        for (i, scores) in scores.iter_mut().enumerate() {
            if seen[i] < BLOCK {
                scores[seen[i]..].fill(f32::NEG_INFINITY);
            }
            let far = most[i] + SLACK;
            if scores.iter().fold(false, |above, score| above | (*score > far)) {
                let now = greatest(scores);
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

    /// `tiles[g, i, l] *= by[i]`
    fn scale(tiles: &mut [Tile], by: &[f32; QUERIES]) {
        for tile in tiles {
            for (values, by) in tile.iter_mut().zip(by) {
                *values = values.map(|value| value * by);
            }
        }
    }

    /// `tiles[g, i, l] = tiles[g, i, l] * by[i] + more[g, i, l] * more_by[i]`
    fn add_scaled(
        tiles: &mut [Tile],
        by: &[f32; QUERIES],
        more: &[Tile],
        more_by: &[f32; QUERIES],
    ) {
        for (tile, more) in tiles.iter_mut().zip(more) {
            for (i, (values, more)) in tile.iter_mut().zip(more).enumerate() {
                for (value, more) in values.iter_mut().zip(more) {
                    *value = *value * by[i] + *more * more_by[i];
                }
            }
        }
    }
}
