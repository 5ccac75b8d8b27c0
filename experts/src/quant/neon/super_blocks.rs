//! Blocks of 256 values, whose sub-blocks have integer scales.

use std::arch::aarch64::*;
use std::marker::PhantomData;

use super::multiply::Multiply;
use super::panel::{Batch, Lanes, Quad};
use super::{AHEAD, Weights, across, act_scales, halves, load, prefetch, scales, term, transposed};
use crate::quant::ActRow;
use crate::quant::blocks::{q4_k, q5_k, q6_k};
use crate::quant::sums;

/// What such a block holds.
pub(super) trait Format {
    /// Bytes a block.
    const BYTES: usize;
    /// Values of a sub-block: 32, or 16.
    const SUB: usize;
    /// Where the scale of the scales is.
    const D: usize;
    /// Sub-blocks have minima, and bytes 2 and 3 are their scale.
    const MINIMA: bool;

    /// Values `128 * half` and on.
    ///
    /// # Safety
    /// A block is at `w`.
    unsafe fn values(w: *const u8, half: usize) -> [int8x16_t; 8];

    /// The sub-blocks' scales, then zeros.
    ///
    /// # Safety
    /// A block is at `w`.
    unsafe fn scales(w: *const u8) -> [int32x4_t; 4];

    /// The sub-blocks' minima; zeros where there are none.
    ///
    /// # Safety
    /// A block is at `w`.
    unsafe fn minima(w: *const u8) -> int16x8_t;
}

/// Q4_K, or Q5_K where `FIVE`.
pub(super) struct K<const FIVE: bool>;

impl<const FIVE: bool> Format for K<FIVE> {
    const BYTES: usize = if FIVE { q5_k::BYTES } else { q4_k::BYTES };
    const SUB: usize = 32;
    const D: usize = 0;
    const MINIMA: bool = true;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn values(w: *const u8, half: usize) -> [int8x16_t; 8] {
        let mut values = [vdupq_n_s8(0); 8];
        for chunk in 0..2 {
            for i in 0..2 {
                let qs = if FIVE { q5_k::QS } else { q4_k::QS };
                // SAFETY: by the caller.
                let q = unsafe { load(w.add(qs + 64 * half + 32 * chunk + 16 * i)) };
                let mut low = vandq_u8(q, vdupq_n_u8(0x0f));
                let mut high = vshrq_n_u8::<4>(q);
                if FIVE {
                    // SAFETY: by the caller.
                    let fifth = unsafe { load(w.add(q5_k::QH + 16 * i)) };
                    let sub = 4 * half + 2 * chunk;
                    low = with_upper(low, fifth, sub, 0x10);
                    high = with_upper(high, fifth, sub + 1, 0x10);
                }
                values[4 * chunk + i] = vreinterpretq_s8_u8(low);
                values[4 * chunk + 2 + i] = vreinterpretq_s8_u8(high);
            }
        }
        values
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(w: *const u8) -> [int32x4_t; 4] {
        // SAFETY: by the caller.
        let [first, _, third] = unsafe { packed(w) };
        let last = (third & 0x0f0f_0f0f) | ((first >> 2) & 0x3030_3030);
        let bytes = vcreate_u8(u64::from(first & 0x3f3f_3f3f) | u64::from(last) << 32);
        let scales = vreinterpretq_s16_u16(vmovl_u8(bytes));
        let none = vdupq_n_s32(0);
        [vmovl_s16(vget_low_s16(scales)), vmovl_high_s16(scales), none, none]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn minima(w: *const u8) -> int16x8_t {
        // SAFETY: by the caller.
        let [_, second, third] = unsafe { packed(w) };
        let last = ((third >> 4) & 0x0f0f_0f0f) | ((second >> 2) & 0x3030_3030);
        let bytes = vcreate_u8(u64::from(second & 0x3f3f_3f3f) | u64::from(last) << 32);
        vreinterpretq_s16_u16(vmovl_u8(bytes))
    }
}

/// The scales and minima of Q4_K and Q5_K as they are stored. What is left of `scale_min` of them runs on all bytes of a
/// word at once, and not on the vector units, which have enough to do.
///
/// # Safety
/// A block is at `w`.
#[inline]
unsafe fn packed(w: *const u8) -> [u32; 3] {
    const { assert!(q4_k::SCALES == q5_k::SCALES) };
    // SAFETY: by the caller.
    unsafe { w.add(q4_k::SCALES).cast::<[u32; 3]>().read_unaligned() }
}

/// Q6_K.
pub(super) struct Q6K;

impl Format for Q6K {
    const BYTES: usize = q6_k::BYTES;
    const SUB: usize = 16;
    const D: usize = q6_k::D;
    const MINIMA: bool = false;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn values(w: *const u8, half: usize) -> [int8x16_t; 8] {
        let mut values = [vdupq_n_s8(0); 8];
        for i in 0..2 {
            // SAFETY: by the caller.
            let pairs = unsafe { load(w.add(q6_k::QH + 32 * half + 16 * i)) };
            for k in 0..2 {
                // SAFETY: by the caller.
                let q = unsafe { load(w.add(64 * half + 32 * k + 16 * i)) };
                let low = with_upper(vandq_u8(q, vdupq_n_u8(0x0f)), pairs, 2 * k, 0x30);
                let high = with_upper(vshrq_n_u8::<4>(q), pairs, 2 * k + 4, 0x30);
                let signed = |q| vsubq_s8(vreinterpretq_s8_u8(q), vdupq_n_s8(32));
                values[2 * k + i] = signed(low);
                values[2 * k + 4 + i] = signed(high);
            }
        }
        values
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(w: *const u8) -> [int32x4_t; 4] {
        // SAFETY: by the caller.
        let scales = unsafe { vld1q_s8(w.add(q6_k::SCALES).cast()) };
        let (low, high) = (vmovl_s8(vget_low_s8(scales)), vmovl_high_s8(scales));
        [
            vmovl_s16(vget_low_s16(low)),
            vmovl_high_s16(low),
            vmovl_s16(vget_low_s16(high)),
            vmovl_high_s16(high),
        ]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn minima(_: *const u8) -> int16x8_t {
        vdupq_n_s16(0)
    }
}

/// Nibbles with bits `from` and up of the bytes of `upper` on top, those that `mask` names.
#[inline]
#[target_feature(enable = "neon")]
fn with_upper(nibbles: uint8x16_t, upper: uint8x16_t, from: usize, mask: u8) -> uint8x16_t {
    let moved = vshlq_u8(upper, vdupq_n_s8(4 - from as i8));
    vbslq_u8(vdupq_n_u8(mask), moved, nibbles)
}

/// A format as a weight type.
pub(super) struct Super<F>(PhantomData<F>);

impl<F: Format> Weights for Super<F> {
    const BYTES: usize = F::BYTES;
    const BLOCKS: usize = 1;
    const MINIMA: bool = F::MINIMA;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add<M: Multiply, const COUNT: usize>(
        w: *const u8,
        x: &ActRow<'_>,
        first: usize,
        sums: float32x4_t,
    ) -> float32x4_t {
        let mut scaled = [vdupq_n_s32(0); super::LANES];
        let mut minima = [vdupq_n_s32(0); super::LANES];
        // SAFETY: by the caller.
        unsafe {
            for i in 0..COUNT {
                let w = w.add(i * F::BYTES);
                prefetch(w.wrapping_add(AHEAD), F::BYTES);
                scaled[i] = block::<M, F>(w, x.q.as_ptr().add(256 * (first + i)));
                if F::MINIMA {
                    minima[i] = times_sums(F::minima(w), x.sums.as_ptr().add(16 * (first + i)));
                }
            }
            let x_d = act_scales::<COUNT>(x, first);
            let d = vmulq_f32(scales::<Self, COUNT>(w.add(F::D)), x_d);
            let sums = term(sums, across(scaled), d);
            if F::MINIMA {
                let d = vmulq_f32(scales::<Self, COUNT>(w.add(2)), x_d);
                vfmsq_f32(sums, vcvtq_f32_s32(across(minima)), d)
            } else {
                sums
            }
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack<M: Multiply>(w: [*const u8; 4], _: usize, ahead: *const u8, quad: &mut Quad) {
        // SAFETY: by the caller.
        unsafe {
            for half in 0..2 {
                prefetch(ahead.wrapping_add(2 * half * F::BYTES), 2 * F::BYTES);
                let [a, b, c, d] = w.map(|w| F::values(w, half));
                for i in 0..8 {
                    quad.values[8 * half + i] = M::arrange([a[i], b[i], c[i], d[i]]);
                }
            }
            let [a, b, c, d] = w.map(|w| F::scales(w));
            for i in 0..64 / F::SUB {
                quad.scales[4 * i..][..4].copy_from_slice(&transposed([a[i], b[i], c[i], d[i]]));
            }
            quad.d[0] = halves(w.map(|w| w.wrapping_add(F::D)));
            if F::MINIMA {
                let minima = w.map(|w| F::minima(w));
                let low = minima.map(|m| vmovl_s16(vget_low_s16(m)));
                let high = minima.map(|m| vmovl_high_s16(m));
                quad.minima[..4].copy_from_slice(&transposed(low));
                quad.minima[4..].copy_from_slice(&transposed(high));
                quad.dmin = halves(w.map(|w| w.wrapping_add(2)));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn multiply<M: Multiply, const WIDE: usize>(
        quads: &[Quad; WIDE],
        batch: &Batch,
        b: usize,
        _: usize,
        first: usize,
        sums: &mut [Lanes; 4],
    ) {
        let mut ints = [[vdupq_n_s32(0); 4]; WIDE];
        for sub in 0..256 / F::SUB {
            // SAFETY: by the caller.
            unsafe {
                let mut squares = [M::none(); WIDE];
                for at in sub * F::SUB / 16..(sub + 1) * F::SUB / 16 {
                    for (square, quad) in squares.iter_mut().zip(quads) {
                        *square = M::add(*square, quad.values[at], batch.values[at]);
                    }
                }
                for ((ints, square), quad) in ints.iter_mut().zip(squares).zip(quads) {
                    for (ints, products) in ints.iter_mut().zip(M::products(square)) {
                        *ints = vmlaq_s32(*ints, products, quad.scales[sub]);
                    }
                }
            }
        }
        for (q, (ints, quad)) in ints.into_iter().zip(quads).enumerate() {
            let minima = if F::MINIMA { minima(quad, batch) } else { ints };
            for n in 0..4 {
                let sum = &mut sums[n][b % sums::LANES][first + q];
                let before = if b < sums::LANES { vdupq_n_f32(0.0) } else { *sum };
                *sum = term(before, ints[n], vmulq_n_f32(quad.d[0], batch.d[0][n]));
                if F::MINIMA {
                    let d = vmulq_n_f32(quad.dmin, batch.d[0][n]);
                    *sum = vfmsq_f32(*sum, vcvtq_f32_s32(minima[n]), d);
                }
            }
        }
    }
}

/// The lanes' parts of `sum over sub-blocks of scale * (w · x)`.
///
/// # Safety
/// A block is at `w`, 256 values at `x`, and the machine has the instructions.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn block<M: Multiply, F: Format>(w: *const u8, x: *const i8) -> int32x4_t {
    let mut ints = vdupq_n_s32(0);
    // SAFETY: by the caller.
    unsafe {
        let scales = F::scales(w);
        for half in 0..2 {
            let values = F::values(w, half);
            let mut parts = [vdupq_n_s32(0); 8];
            for (i, values) in values.into_iter().enumerate() {
                let part = &mut parts[i / (F::SUB / 16)];
                *part = M::dot(*part, values, vld1q_s8(x.add(128 * half + 16 * i)));
            }
            let [a, b, c, d, e, f, g, h] = parts;
            if F::SUB == 32 {
                ints = vmlaq_s32(ints, across([a, b, c, d]), scales[half]);
            } else {
                ints = vmlaq_s32(ints, across([a, b, c, d]), scales[2 * half]);
                ints = vmlaq_s32(ints, across([e, f, g, h]), scales[2 * half + 1]);
            }
        }
    }
    ints
}

/// The lanes' parts of `sum over sub-blocks of minimum * sum`.
///
/// # Safety
/// The sums over each 16 of 256 values are at `sums_16`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn times_sums(minima: int16x8_t, sums_16: *const i16) -> int32x4_t {
    // SAFETY: by the caller.
    let sums = unsafe { vpaddq_s16(vld1q_s16(sums_16), vld1q_s16(sums_16.add(8))) };
    let low = vmull_s16(vget_low_s16(minima), vget_low_s16(sums));
    vmlal_high_s16(low, minima, sums)
}

/// The sums over sub-blocks of minimum times sum: a vector an activation row, a lane a weight row.
#[inline]
#[target_feature(enable = "neon")]
fn minima(quad: &Quad, batch: &Batch) -> [int32x4_t; 4] {
    let [mut a, mut b, mut c, mut d] = [vdupq_n_s32(0); 4];
    for (minima, sums) in quad.minima.into_iter().zip(batch.sums) {
        a = vmlaq_laneq_s32::<0>(a, minima, sums);
        b = vmlaq_laneq_s32::<1>(b, minima, sums);
        c = vmlaq_laneq_s32::<2>(c, minima, sums);
        d = vmlaq_laneq_s32::<3>(d, minima, sums);
    }
    [a, b, c, d]
}
