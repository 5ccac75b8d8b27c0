//! Blocks of 32 values with one scale.

use std::arch::aarch64::*;

use super::multiply::Multiply;
use super::panel::{Batch, Lanes, Quad};
use super::{AHEAD, Weights, across, act_scales, halves, load, prefetch, scales, term};
use crate::quant::ActRow;
use crate::quant::blocks::{q4_0, q8_0};
use crate::quant::sums;

/// Q8_0, or Q4_0 where `NIBBLES`.
pub(super) struct Blocks<const NIBBLES: bool>;

impl<const NIBBLES: bool> Weights for Blocks<NIBBLES> {
    const BYTES: usize = if NIBBLES { q4_0::BYTES } else { q8_0::BYTES };
    const BLOCKS: usize = sums::LANES;
    const MINIMA: bool = false;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add<M: Multiply, const COUNT: usize>(
        w: *const u8,
        x: &ActRow<'_>,
        first: usize,
        sums: float32x4_t,
    ) -> float32x4_t {
        prefetch(w.wrapping_add(AHEAD), COUNT * Self::BYTES);
        let mut ints = [vdupq_n_s32(0); super::LANES];
        // SAFETY: by the caller.
        unsafe {
            let x_q = x.q.as_ptr().add(32 * first);
            for (i, ints) in ints.iter_mut().take(COUNT).enumerate() {
                let [low, high] = values::<NIBBLES>(w.add(i * Self::BYTES));
                *ints = M::dot(*ints, low, vld1q_s8(x_q.add(32 * i)));
                *ints = M::dot(*ints, high, vld1q_s8(x_q.add(32 * i + 16)));
            }
            let d = vmulq_f32(scales::<Self, COUNT>(w), act_scales::<COUNT>(x, first));
            term(sums, across(ints), d)
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack<M: Multiply>(
        w: [*const u8; 4],
        count: usize,
        ahead: *const u8,
        quad: &mut Quad,
    ) {
        for b in 0..count {
            prefetch(ahead.wrapping_add(4 * b * Self::BYTES), 4 * Self::BYTES);
            let at = w.map(|w| w.wrapping_add(b * Self::BYTES));
            // SAFETY: by the caller.
            unsafe {
                let [r, s, t, u] = at.map(|w| values::<NIBBLES>(w));
                for i in 0..2 {
                    quad.values[2 * b + i] = M::arrange([r[i], s[i], t[i], u[i]]);
                }
                quad.d[b] = halves(at);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn multiply<M: Multiply, const WIDE: usize>(
        quads: &[Quad; WIDE],
        batch: &Batch,
        b: usize,
        count: usize,
        first: usize,
        sums: &mut [Lanes; 4],
    ) {
        for (i, x_d) in batch.d[..count].iter().enumerate() {
            // SAFETY: by the caller.
            unsafe {
                let mut squares = [M::none(); WIDE];
                for at in [2 * i, 2 * i + 1] {
                    for (square, quad) in squares.iter_mut().zip(quads) {
                        *square = M::add(*square, quad.values[at], batch.values[at]);
                    }
                }
                for (q, (square, quad)) in squares.into_iter().zip(quads).enumerate() {
                    for (n, ints) in M::products(square).into_iter().enumerate() {
                        let sum = &mut sums[n][i][first + q];
                        let before = if b == 0 { vdupq_n_f32(0.0) } else { *sum };
                        *sum = term(before, ints, vmulq_n_f32(quad.d[i], x_d[n]));
                    }
                }
            }
        }
    }
}

/// A block's values.
///
/// # Safety
/// It is at `w`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn values<const NIBBLES: bool>(w: *const u8) -> [int8x16_t; 2] {
    // SAFETY: by the caller.
    unsafe {
        if NIBBLES {
            let q = load(w.add(q4_0::QS));
            let signed = |q| vsubq_s8(vreinterpretq_s8_u8(q), vdupq_n_s8(8));
            [signed(vandq_u8(q, vdupq_n_u8(0x0f))), signed(vshrq_n_u8::<4>(q))]
        } else {
            let w = w.add(q8_0::QS).cast();
            [vld1q_s8(w), vld1q_s8(w.add(16))]
        }
    }
}
