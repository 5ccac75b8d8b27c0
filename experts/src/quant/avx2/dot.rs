//! The integer products that AVX2 and AVX-VNNI work out in different ways.
//!
//! Both multiply unsigned weights by signed activations, four of each a 32-bit lane, and add them to a *part*, which is
//! later multiplied by a scale and added to 32-bit integers.

use std::arch::asm;
use std::arch::x86_64::*;

/// One way of multiplying.
pub(super) trait Dot {
    /// The most bits that a weight may have.
    const BITS: u32;

    /// Vectors of weights of `bits` bits whose products fit in one part.
    fn room(bits: u32) -> usize;

    /// 32-bit scales as [`Dot::scaled`] takes them.
    ///
    /// # Safety
    /// The machine has the instructions, here and below.
    unsafe fn scale(scale: __m256i) -> __m256i;

    /// `part + w · x`, or `w · x` where there is no part yet.
    ///
    /// # Safety
    /// See [`Dot::scale`].
    unsafe fn products(part: Option<__m256i>, w: __m256i, x: __m256i) -> __m256i;

    /// `ints + part * scale`.
    ///
    /// # Safety
    /// See [`Dot::scale`].
    unsafe fn scaled(ints: __m256i, part: __m256i, scale: __m256i) -> __m256i;

    /// `ints + a · b`, of two signed 16-bit values a lane.
    ///
    /// # Safety
    /// See [`Dot::scale`].
    unsafe fn pairs(ints: __m256i, a: __m256i, b: __m256i) -> __m256i;
}

/// AVX2: a part is two 16-bit sums a lane, so that eight vectors of 4-bit weights cost one widening.
pub(super) struct Pairs;

impl Dot for Pairs {
    const BITS: u32 = 7;

    #[inline]
    fn room(bits: u32) -> usize {
        // A vector adds two products of up to 2^bits * 128 to each sum.
        1 << (15 - 8 - bits)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scale(scale: __m256i) -> __m256i {
        _mm256_blend_epi16::<0xaa>(scale, _mm256_slli_epi32::<16>(scale))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn products(part: Option<__m256i>, w: __m256i, x: __m256i) -> __m256i {
        let both = _mm256_maddubs_epi16(w, x);
        let Some(mut part) = part else { return both };
        // Written out, since the compiler would regroup the sums and run out of registers.
        // SAFETY: by the caller; only registers are read and written.
        unsafe {
            asm!(
                "vpaddw {part}, {part}, {both}",
                part = inout(ymm_reg) part,
                both = in(ymm_reg) both,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        part
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scaled(ints: __m256i, part: __m256i, scale: __m256i) -> __m256i {
        _mm256_add_epi32(ints, _mm256_madd_epi16(part, scale))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn pairs(ints: __m256i, a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(ints, _mm256_madd_epi16(a, b))
    }
}

/// AVX-VNNI: a part is a 32-bit sum a lane. The instructions are written out, since intrinsics of theirs would be calls
/// wherever the surrounding function is AVX2's as well.
pub(super) struct Vnni;

impl Dot for Vnni {
    const BITS: u32 = 8;

    #[inline]
    fn room(_: u32) -> usize {
        usize::MAX
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scale(scale: __m256i) -> __m256i {
        scale
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn products(part: Option<__m256i>, w: __m256i, x: __m256i) -> __m256i {
        let mut part = part.unwrap_or(_mm256_setzero_si256());
        // SAFETY: by the caller; only registers are read and written.
        unsafe {
            asm!(
                "{{vex}} vpdpbusd {part}, {w}, {x}",
                part = inout(ymm_reg) part,
                w = in(ymm_reg) w,
                x = in(ymm_reg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        part
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scaled(ints: __m256i, part: __m256i, scale: __m256i) -> __m256i {
        _mm256_add_epi32(ints, _mm256_mullo_epi32(part, scale))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn pairs(mut ints: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe {
            asm!(
                "{{vex}} vpdpwssd {ints}, {a}, {b}",
                ints = inout(ymm_reg) ints,
                a = in(ymm_reg) a,
                b = in(ymm_reg) b,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        ints
    }
}
