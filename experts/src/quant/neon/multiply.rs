//! Products of bytes, which is what processors differ in.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{across, transposed};

/// How a processor multiplies signed bytes.
///
/// For several rows, 16 values of each of four weight rows and of four activation rows are arranged in the same way, so
/// that an instruction multiplies a vector of the ones with a vector of the others, and nothing is shuffled between.
pub(super) trait Multiply {
    /// The products of four weight rows with four activation rows, in the making.
    type Square: Copy;

    /// Adds `w · x`, in parts, to the lanes of `sums`.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn dot(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t;

    /// Four rows as [`Multiply::add`] takes them.
    ///
    /// # Safety
    /// As [`Multiply::dot`].
    unsafe fn arrange(rows: [int8x16_t; 4]) -> [int8x16_t; 4];

    /// Zeros.
    ///
    /// # Safety
    /// As [`Multiply::dot`].
    unsafe fn none() -> Self::Square;

    /// Adds the products of arranged rows.
    ///
    /// # Safety
    /// As [`Multiply::dot`].
    unsafe fn add(square: Self::Square, w: [int8x16_t; 4], x: [int8x16_t; 4]) -> Self::Square;

    /// The products: a vector an activation row, a lane a weight row.
    ///
    /// # Safety
    /// As [`Multiply::dot`].
    unsafe fn products(square: Self::Square) -> [int32x4_t; 4];
}

/// NEON and no more: products of 16 bits, added up in pairs.
pub(super) struct Plain;

impl Multiply for Plain {
    /// Parts of each activation row's product with each weight row.
    type Square = [[int32x4_t; 4]; 4];

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        vpadalq_s16(vpadalq_s16(sums, low), vmull_high_s8(w, x))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn arrange(rows: [int8x16_t; 4]) -> [int8x16_t; 4] {
        rows
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn none() -> Self::Square {
        [[vdupq_n_s32(0); 4]; 4]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add(mut square: Self::Square, w: [int8x16_t; 4], x: [int8x16_t; 4]) -> Self::Square {
        for (products, x) in square.iter_mut().zip(x) {
            for (product, w) in products.iter_mut().zip(w) {
                // SAFETY: by the caller.
                *product = unsafe { Self::dot(*product, w, x) };
            }
        }
        square
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn products([a, b, c, d]: Self::Square) -> [int32x4_t; 4] {
        [across(a), across(b), across(c), across(d)]
    }
}

/// `sdot`: each 32-bit lane adds four products.
pub(super) struct DotProd;

impl Multiply for DotProd {
    /// As [`Multiply::products`].
    type Square = [int32x4_t; 4];

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: by the caller. By name, since the intrinsic is not stable.
        unsafe {
            asm!(
                ".arch_extension dotprod",
                "sdot {sums:v}.4s, {w:v}.16b, {x:v}.16b",
                sums = inout(vreg) sums,
                w = in(vreg) w,
                x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sums
    }

    /// Vector `i` holds values `4 * i` to `4 * i + 3` of each row.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn arrange(rows: [int8x16_t; 4]) -> [int8x16_t; 4] {
        let [a, b, c, d] = rows;
        let word = |v| vreinterpretq_s32_s8(v);
        let [a, b, c, d] = transposed([word(a), word(b), word(c), word(d)]);
        let bytes = |v| vreinterpretq_s8_s32(v);
        [bytes(a), bytes(b), bytes(c), bytes(d)]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn none() -> Self::Square {
        [vdupq_n_s32(0); 4]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add(mut square: Self::Square, w: [int8x16_t; 4], x: [int8x16_t; 4]) -> Self::Square {
        for (w, x) in w.into_iter().zip(x) {
            // SAFETY: by the caller.
            unsafe {
                square[0] = dot_lane::<0>(square[0], w, x);
                square[1] = dot_lane::<1>(square[1], w, x);
                square[2] = dot_lane::<2>(square[2], w, x);
                square[3] = dot_lane::<3>(square[3], w, x);
            }
        }
        square
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn products(square: Self::Square) -> [int32x4_t; 4] {
        square
    }
}

/// Adds the products of each four bytes of `w` with the four of `x` in 32-bit lane `LANE`.
///
/// # Safety
/// The machine has the instruction.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn dot_lane<const LANE: usize>(
    mut sums: int32x4_t,
    w: int8x16_t,
    x: int8x16_t,
) -> int32x4_t {
    // SAFETY: by the caller.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {w:v}.16b, {x:v}.4b[{lane}]",
            sums = inout(vreg) sums,
            w = in(vreg) w,
            x = in(vreg) x,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// `smmla`: eight values of two rows with eight values of two others. One activation row has no use for it.
pub(super) struct I8mm;

impl Multiply for I8mm {
    /// Two weight rows each, then two activation rows each. In a vector the activation row changes first.
    type Square = [[int32x4_t; 2]; 2];

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: by the caller; a processor that has `smmla` has `sdot`, and it was looked for.
        unsafe { DotProd::dot(sums, w, x) }
    }

    /// The first eight values of two rows and of the others, then the last eight.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn arrange(rows: [int8x16_t; 4]) -> [int8x16_t; 4] {
        let [a, b, c, d] = rows;
        let wide = |v| vreinterpretq_s64_s8(v);
        let (a, b, c, d) = (wide(a), wide(b), wide(c), wide(d));
        let bytes = |v| vreinterpretq_s8_s64(v);
        [
            bytes(vzip1q_s64(a, b)),
            bytes(vzip1q_s64(c, d)),
            bytes(vzip2q_s64(a, b)),
            bytes(vzip2q_s64(c, d)),
        ]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn none() -> Self::Square {
        [[vdupq_n_s32(0); 2]; 2]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add(mut square: Self::Square, w: [int8x16_t; 4], x: [int8x16_t; 4]) -> Self::Square {
        for half in [0, 2] {
            for (i, products) in square.iter_mut().enumerate() {
                for (j, product) in products.iter_mut().enumerate() {
                    // SAFETY: by the caller.
                    *product = unsafe { matrix(*product, w[half + i], x[half + j]) };
                }
            }
        }
        square
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn products([upper, lower]: Self::Square) -> [int32x4_t; 4] {
        [
            vuzp1q_s32(upper[0], lower[0]),
            vuzp2q_s32(upper[0], lower[0]),
            vuzp1q_s32(upper[1], lower[1]),
            vuzp2q_s32(upper[1], lower[1]),
        ]
    }
}

/// Adds the products of two rows of eight bytes with two others.
///
/// # Safety
/// The machine has the instruction.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn matrix(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: by the caller. By name, since the intrinsic is not stable.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {sums:v}.4s, {w:v}.16b, {x:v}.16b",
            sums = inout(vreg) sums,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}
