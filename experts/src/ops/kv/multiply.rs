//! Queries times keys and weights times values, a block of positions at a time.

use std::mem::MaybeUninit;

use super::{BLOCK, GROUP, KEY_LINES, KvTensor, KvType, MAX_HEAD_DIM, groups};
use crate::activations::{magnitude, nearest};
use crate::quant::isa::multiversion;
use crate::quant::kv::{LANES, Line, Pairs};
use crate::quant::{Kernels, filled};

/// Queries that pass over a block together at most.
pub(in crate::ops) const QUERIES: usize = 8;

impl KvTensor {
    /// `scores[half, i, p] = queries[i] · keys[start + 32 * half + p]`, for both halves of the block or, where no more than
    /// 32 positions are `seen`, the first.
    pub(in crate::ops) fn score(
        &self,
        head: usize,
        (start, seen): (usize, usize),
        queries: &Queries<'_>,
        scores: &mut [[[f32; LANES]; QUERIES]; BLOCK / LANES],
    ) {
        let (block, count) = (self.block(head, start), queries.count);
        let both = block.chunks_exact(block.len() / scores.len()).zip(scores);
        for (lines, scores) in both.take(seen.div_ceil(LANES)) {
            let scores = &mut scores[..count];
            scores.as_flattened_mut().fill(0.0);
            match self.ty {
                KvType::F16 => Kernels::best().halves(lines, queries.values, scores),
                KvType::Q8_0 => {
                    for (g, lines) in lines.chunks_exact(KEY_LINES).enumerate() {
                        let (scales, lines) = lines.split_at(1);
                        let scales = &halves(scales);
                        let pairs = Pairs { lines, scales, x: queries.q(g), d: &queries.d[g] };
                        Kernels::best().pairs(&pairs, scores);
                    }
                }
            }
        }
    }

    /// `out[g, i, l] += sum over p < seen[i] of weights[i, p] * values[start + p, 32 * g + l]`; other weights are 0.
    pub(in crate::ops) fn blend(
        &self,
        head: usize,
        start: usize,
        weights: &[[f32; BLOCK]],
        seen: &[usize],
        out: &mut [[[f32; LANES]; QUERIES]],
    ) {
        let block = self.block(head, start);
        let last = seen.iter().copied().max().unwrap_or(0);
        let tiles = block.chunks_exact(block.len() / out.len()).zip(out);
        let tiles = tiles.map(|(lines, out)| (lines, &mut out[..weights.len()]));
        match self.ty {
            KvType::F16 => tiles.for_each(|(lines, out)| {
                Kernels::best().halves(&lines[..last], weights.as_flattened(), out);
            }),
            KvType::Q8_0 => {
                let (mut even, mut x) = ([[0.0; BLOCK]; QUERIES], [[0; BLOCK]; QUERIES]);
                let units = even_out(weights, &mut even);
                for (lines, out) in tiles {
                    let (scales, lines) = lines.split_at(BLOCK / LANES);
                    let mut d = units;
                    round_weights(&even[..weights.len()], seen, &halves(scales), &mut x, &mut d);
                    let pairs = Pairs {
                        lines: &lines[..last.div_ceil(2)],
                        scales: &[1.0; LANES],
                        x: x[..weights.len()].as_flattened().as_chunks().0,
                        d: &d,
                    };
                    Kernels::best().pairs(&pairs, out);
                }
            }
        }
    }
}

/// The halves in `lines`.
fn halves<const N: usize>(lines: &[Line]) -> [f32; N] {
    let mut wide = [0.0; N];
    Kernels::best().widen(lines.as_flattened(), &mut wide);
    wide
}

/// Queries in the form that keys are multiplied with.
pub(in crate::ops) struct Queries<'a> {
    count: usize,
    /// `[count, width]`, heads filled up with zeros to a multiple of 32.
    values: &'a [f32],
    /// `[groups, count, 16]` pairs: 15 bits and a sign, beside which the keys' 8 bits are what counts.
    q: &'a [[i16; 2]],
    /// `[groups, count]` scales.
    d: [[f32; QUERIES]; MAX_HEAD_DIM / GROUP],
}

/// Where [`Queries`] are, of which most have fewer and smaller heads than there is room for.
pub(in crate::ops) struct QueryRoom {
    values: [MaybeUninit<f32>; QUERIES * MAX_HEAD_DIM],
    q: [MaybeUninit<[i16; 2]>; QUERIES * MAX_HEAD_DIM / 2],
}

impl QueryRoom {
    pub(in crate::ops) const NEW: QueryRoom = QueryRoom {
        values: [const { MaybeUninit::uninit() }; _],
        q: [const { MaybeUninit::uninit() }; _],
    };
}

impl<'a> Queries<'a> {
    /// Of at most [`QUERIES`] heads, each multiplied with `scale`.
    pub(in crate::ops) fn new<'q>(
        keys: &KvTensor,
        heads: impl ExactSizeIterator<Item = &'q [f32]>,
        scale: f32,
        room: &'a mut QueryRoom,
    ) -> Queries<'a> {
        let (count, width) = (heads.len(), groups(keys.head_dim) * GROUP);
        let values = filled(&mut room.values[..count * width], 0.0);
        for (to, head) in values.chunks_exact_mut(width).zip(heads) {
            for (to, value) in to.iter_mut().zip(head) {
                *to = value * scale;
            }
        }
        let mut queries = Queries { count, values, q: &[], d: [[0.0; QUERIES]; _] };
        if keys.ty == KvType::Q8_0 {
            let q = filled(&mut room.q[..count * width / 2], [0; 2]);
            round(values, count, q, &mut queries.d);
            queries.q = q;
        }
        queries
    }

    /// `[count, 16]` pairs of group `g`.
    fn q(&self, g: usize) -> &[[i16; 2]] {
        let len = self.count * GROUP / 2;
        &self.q[g * len..][..len]
    }
}

/// `values`, `[count, width]`, as `q[g, i] * d[g, i]` for each group `g` of a query `i`.
fn round(values: &[f32], count: usize, q: &mut [[i16; 2]], d: &mut [[f32; QUERIES]]) {
    for (i, values) in values.chunks_exact(values.len() / count).enumerate() {
        for (g, values) in values.as_chunks::<GROUP>().0.iter().enumerate() {
            let (inverse, unit) = fifteen_bits(magnitude(values));
            d[g][i] = unit;
            let q = &mut q[(g * count + i) * GROUP / 2..][..GROUP / 2];
            round_all(values, inverse, q.as_flattened_mut());
        }
    }
}

/// What brings values of magnitude `most` to 15 bits and a sign, and what brings them back, where not a number shows.
#[inline(always)]
fn fifteen_bits(most: f32) -> (f32, f32) {
    (finite(f32::from(i16::MAX) / most), most / f32::from(i16::MAX))
}

/// `x`, or 0 where it is infinite or not a number.
#[inline(always)]
fn finite(x: f32) -> f32 {
    if x.is_finite() { x } else { 0.0 }
}

multiversion! {
    /// `weights[i, p]` as `even[i, p] * d[i]`, where each query's greatest is what 15 bits hold; returns `d`.
    fn even_out(weights: &[[f32; BLOCK]], even: &mut [[f32; BLOCK]; QUERIES]) -> [f32; QUERIES] {
        let mut d = [0.0; QUERIES];
        for ((even, weights), d) in even.iter_mut().zip(weights).zip(&mut d) {
            let (inverse, unit) = fifteen_bits(magnitude(weights));
            *d = unit;
            for (even, weight) in even.iter_mut().zip(weights) {
                *even = weight * inverse;
            }
        }
        d
    }

    /// `weights[i, p] * scales[p]` as `q[i, p] * d[i]`, where `d[i]` is what `weights[i]` are to be multiplied with at first: the
    /// greatest weight at the greatest scale that the query sees gets 15 bits.
    fn round_weights(
        weights: &[[f32; BLOCK]],
        seen: &[usize],
        scales: &[f32; BLOCK],
        q: &mut [[i16; BLOCK]; QUERIES],
        d: &mut [f32; QUERIES],
    ) {
        let (mut shares, mut most) = ([0.0; BLOCK], 0.0);
        for (i, (q, weights)) in q.iter_mut().zip(weights).enumerate() {
            if i == 0 || seen[i] != seen[i - 1] {
                most = magnitude(&scales[..seen[i]]);
                let inverse = finite(1.0 / most);
                // None, too, for what is not a number: where it is seen, `most` is none either.
                for (share, scale) in shares.iter_mut().zip(scales) {
                    *share = (scale * inverse).max(0.0);
                }
            }
            d[i] *= most;
            for ((q, weight), share) in q.iter_mut().zip(weights).zip(&shares) {
                *q = nearest(weight * share) as i16;
            }
        }
    }

    fn round_all(values: &[f32; GROUP], inverse: f32, q: &mut [i16]) {
        for (q, value) in q.iter_mut().zip(values) {
            *q = nearest(value * inverse) as i16;
        }
    }
}
