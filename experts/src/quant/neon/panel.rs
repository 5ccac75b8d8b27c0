//! Several activation rows: 32 weight rows are unpacked once and multiplied with all of them, four by four.

use std::arch::aarch64::*;
use std::mem::{MaybeUninit, zeroed};

use super::multiply::Multiply;
use super::{Weights, transposed};
use crate::quant::sums::LANES;
use crate::quant::{ActRow, MAX_TILE_ROWS, Tile, filled};

/// Weight rows of a panel, by four.
const QUADS: usize = 8;
const ROWS: usize = 4 * QUADS;
/// Values that are unpacked at a time.
const STEP: usize = 256;

/// 256 values of each of four weight rows; where lanes are not said to be values, they are rows.
#[derive(Clone, Copy)]
pub(super) struct Quad {
    /// 16 values of all four, as [`Multiply::arrange`] has them.
    pub(super) values: [[int8x16_t; 4]; STEP / 16],
    /// Each sub-block's integer scale.
    pub(super) scales: [int32x4_t; 16],
    /// Each sub-block's minimum.
    pub(super) minima: [int32x4_t; 8],
    /// Each block's scale.
    pub(super) d: [float32x4_t; LANES],
    /// The scale of the minima.
    pub(super) dmin: float32x4_t,
}

impl Quad {
    // SAFETY: vectors and floats may be zeros.
    const EMPTY: Quad = unsafe { zeroed() };
}

/// 256 values of each of four activation rows.
pub(super) struct Batch {
    /// As a quad's.
    pub(super) values: [[int8x16_t; 4]; STEP / 16],
    /// Sums over 32 values each, for types with minima.
    pub(super) sums: [int32x4_t; 8],
    /// Each block's scale.
    pub(super) d: [[f32; 4]; LANES],
}

impl Batch {
    // SAFETY: as above.
    const EMPTY: Batch = unsafe { zeroed() };
}

/// An activation row's products with the panel's weight rows, in the making: see [`crate::quant::sums`].
pub(super) type Lanes = [[float32x4_t; QUADS]; LANES];

/// A tile of weights of type `W`, `WIDE` quads at a time: as many as fit the registers.
///
/// # Safety
/// See `TileFn`.
#[target_feature(enable = "neon")]
pub(super) unsafe fn tile<M: Multiply, W: Weights, const WIDE: usize>(tile: &Tile<'_>) {
    const { assert!(QUADS.is_multiple_of(WIDE) && MAX_TILE_ROWS.is_multiple_of(4)) };
    let (mut quads, mut batch) = ([Quad::EMPTY; QUADS], Batch::EMPTY);
    let mut room = [const { MaybeUninit::<Lanes>::uninit() }; MAX_TILE_ROWS];
    let room = &mut room[..tile.x.len().next_multiple_of(4)];
    let sums = filled(room, [[vdupq_n_f32(0.0); QUADS]; LANES]);
    let blocks = tile.row_bytes / W::BYTES;
    for first in (0..tile.rows).step_by(ROWS) {
        let rows = ROWS.min(tile.rows - first);
        // Rows that are not there are the last one again.
        let row = |r: usize| tile.row(first + r.min(rows - 1)).as_ptr();
        // The next panel follows in memory, and is asked for in that order while this one is read.
        let mut ahead = tile.w.as_ptr().wrapping_add((first + ROWS) * tile.row_bytes);
        let quads = &mut quads[..rows.div_ceil(4).next_multiple_of(WIDE)];
        for b in (0..blocks).step_by(W::BLOCKS) {
            let count = W::BLOCKS.min(blocks - b);
            // SAFETY: `TileFn`'s conditions: the weight rows have `count` blocks from `b`, and so have the activations.
            unsafe {
                for (q, quad) in quads.iter_mut().enumerate() {
                    let at = [0, 1, 2, 3].map(|r| row(4 * q + r).wrapping_add(b * W::BYTES));
                    W::unpack::<M>(at, count, ahead, quad);
                    ahead = ahead.wrapping_add(4 * count * W::BYTES);
                }
                for (x, sums) in tile.x.chunks(4).zip(sums.as_chunks_mut().0) {
                    arrange::<M, W>(x, b, count, &mut batch);
                    for (q, quads) in quads.as_chunks::<WIDE>().0.iter().enumerate() {
                        W::multiply::<M, WIDE>(quads, &batch, b, count, q * WIDE, sums);
                    }
                }
            }
        }
        for (i, sums) in sums[..tile.x.len()].iter().enumerate() {
            // SAFETY: `out` is valid for `rows` products of activation row `i` from weight row `first`.
            unsafe { store(sums, tile.out.add(i * tile.stride + first), rows) };
        }
    }
}

/// Fills `batch` with `count` blocks, from block `b`, of up to four rows; those that are not there are the last one
/// again.
///
/// # Safety
/// Each `x` has them in the format of `W`, and the machine has the instructions.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn arrange<M: Multiply, W: Weights>(
    x: &[ActRow<'_>],
    b: usize,
    count: usize,
    batch: &mut Batch,
) {
    let x = [0, 1, 2, 3].map(|n| x[n.min(x.len() - 1)]);
    let len = STEP / W::BLOCKS;
    // SAFETY: by the caller.
    unsafe {
        for (i, values) in batch.values[..count * len / 16].iter_mut().enumerate() {
            let at = b * len + 16 * i;
            *values = M::arrange(x.map(|x| vld1q_s8(x.q.as_ptr().add(at))));
        }
        if W::MINIMA {
            for half in 0..2 {
                let at = 16 * b + 8 * half;
                let pairs = x.map(|x| vpaddlq_s16(vld1q_s16(x.sums.as_ptr().add(at))));
                batch.sums[4 * half..][..4].copy_from_slice(&transposed(pairs));
            }
        }
    }
    for (i, d) in batch.d[..count].iter_mut().enumerate() {
        *d = x.map(|x| x.d[b + i]);
    }
}

/// Writes `rows` products: the lanes' sums as [`crate::quant::sums`] adds them up.
///
/// # Safety
/// `out` is valid for them.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store(sums: &Lanes, out: *mut f32, rows: usize) {
    let mut totals = [vdupq_n_f32(0.0); QUADS];
    for (q, total) in totals.iter_mut().enumerate() {
        let pair = |i: usize| vaddq_f32(sums[i][q], sums[i + 4][q]);
        *total = vaddq_f32(vaddq_f32(pair(0), pair(2)), vaddq_f32(pair(1), pair(3)));
    }
    // SAFETY: by the caller; there are at most as many as fit a panel.
    unsafe { out.copy_from_nonoverlapping(totals.as_ptr().cast(), rows) };
}
