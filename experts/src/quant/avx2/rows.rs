//! One activation row: weights are unpacked in registers as they stream by.
//!
//! `maddubs` multiplies unsigned weights of up to 6 bits by signed activations and adds pairs, which fits in 16 bits;
//! `madd` multiplies by the sub-block's scale. Q8_0's weights do not fit that way and are widened to 16 bits first.

use std::arch::x86_64::*;

use super::dot::Dot;
use super::{Blocks, K, Q6K, across, bits_at_4, k_minima, k_scales, load, prefetch, term, total};
use crate::quant::ActRow;
use crate::quant::blocks::{q4_0, q4_k, q5_k, q6_k, q8_0};
use crate::quant::sums::LANES;

/// How a weight type is multiplied with one activation row.
pub(super) trait Row {
    /// `w · x`.
    ///
    /// # Safety
    /// `x` holds as many values in the type's format as `w` has, and the machine has the instructions.
    unsafe fn dot<D: Dot>(w: &[u8], x: &ActRow<'_>) -> f32;
}

impl<const FIVE: bool> Row for K<FIVE> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot<D: Dot>(w: &[u8], x: &ActRow<'_>) -> f32 {
        let bytes = if FIVE { q5_k::BYTES } else { q4_k::BYTES };
        let mut sums = _mm256_setzero_ps();
        for (e, eight) in w.chunks(LANES * bytes).enumerate() {
            let mut scaled = [_mm256_setzero_si256(); LANES];
            let mut minima = [_mm256_setzero_si256(); LANES];
            let (mut d, mut dmin) = ([0u16; LANES], [0u16; LANES]);
            for (i, w) in eight.chunks_exact(bytes).enumerate() {
                let b = LANES * e + i;
                prefetch(w.as_ptr(), bytes);
                // SAFETY: within the block, and `x` has 256 values and 16 sums for it.
                unsafe {
                    let both = k_scales(w.as_ptr());
                    let x_q = x.q.as_ptr().add(256 * b).cast();
                    scaled[i] = k_block::<FIVE, D>(w.as_ptr(), x_q, both);
                    minima[i] = k_minima(both, load(x.sums.as_ptr().add(16 * b).cast()));
                }
                d[i] = u16::from_le_bytes([w[0], w[1]]);
                dmin[i] = u16::from_le_bytes([w[2], w[3]]);
            }
            let x_d = scales(x, e);
            sums = term(across(scaled), _mm256_mul_ps(halves(d), x_d), sums);
            let minima = _mm256_cvtepi32_ps(across(minima));
            sums = _mm256_fnmadd_ps(minima, _mm256_mul_ps(halves(dmin), x_d), sums);
        }
        total(sums)
    }
}

/// The lanes' parts of `sum over sub-blocks of scale * (w · x)`; `scales` as [`k_scales`] gives them.
///
/// # Safety
/// A block is at `w`, 256 values at `x`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn k_block<const FIVE: bool, D: Dot>(
    w: *const u8,
    x: *const u8,
    scales: __m256i,
) -> __m256i {
    let qs = if FIVE { q5_k::QS } else { q4_k::QS };
    let nibble = _mm256_set1_epi8(0x0f);
    let scales = [
        _mm256_permute2x128_si256::<0x00>(scales, scales),
        _mm256_permute2x128_si256::<0x11>(scales, scales),
    ];
    let mut ints = _mm256_setzero_si256();
    for chunk in 0..4 {
        // SAFETY: by the caller.
        unsafe {
            let q = load(w.add(qs + 32 * chunk));
            let mut low = _mm256_and_si256(q, nibble);
            let mut high = _mm256_and_si256(_mm256_srli_epi16::<4>(q), nibble);
            if FIVE {
                let fifth = load(w.add(q5_k::QH));
                low = _mm256_or_si256(low, bits_at_4(fifth, 2 * chunk, 1));
                high = _mm256_or_si256(high, bits_at_4(fifth, 2 * chunk + 1, 1));
            }
            let scale = |j: usize| {
                let lane = (((2 * (j % 4) + 1) << 8) | (2 * (j % 4))) as i16;
                _mm256_shuffle_epi8(scales[j / 4], _mm256_set1_epi16(lane))
            };
            let x = x.add(64 * chunk);
            let low = _mm256_maddubs_epi16(low, load(x));
            let high = _mm256_maddubs_epi16(high, load(x.add(32)));
            ints = D::pairs(ints, low, scale(2 * chunk));
            ints = D::pairs(ints, high, scale(2 * chunk + 1));
        }
    }
    ints
}

impl Row for Q6K {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot<D: Dot>(w: &[u8], x: &ActRow<'_>) -> f32 {
        let mut sums = _mm256_setzero_ps();
        for (e, eight) in w.chunks(LANES * q6_k::BYTES).enumerate() {
            let mut scaled = [_mm256_setzero_si256(); LANES];
            let mut d = [0u16; LANES];
            for (i, w) in eight.chunks_exact(q6_k::BYTES).enumerate() {
                let b = LANES * e + i;
                prefetch(w.as_ptr(), q6_k::BYTES);
                // SAFETY: within the block, and `x` has 256 values and 16 sums for it.
                unsafe {
                    let scales = _mm_loadu_si128(w.as_ptr().add(q6_k::SCALES).cast());
                    let sums_16 = load(x.sums.as_ptr().add(16 * b).cast());
                    // Weights are stored +32.
                    let offset = _mm256_madd_epi16(_mm256_cvtepi8_epi16(scales), sums_16);
                    let ints = q6_k_block::<D>(w, x.q.as_ptr().add(256 * b).cast());
                    scaled[i] = _mm256_sub_epi32(ints, _mm256_slli_epi32::<5>(offset));
                }
                d[i] = u16::from_le_bytes([w[q6_k::D], w[q6_k::D + 1]]);
            }
            sums = term(across(scaled), _mm256_mul_ps(halves(d), scales(x, e)), sums);
        }
        total(sums)
    }
}

/// The lanes' parts of `sum over sub-blocks of scale * (w · x)`, with the weights' offset.
///
/// # Safety
/// `w` is a block, 256 values are at `x`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn q6_k_block<D: Dot>(w: &[u8], x: *const u8) -> __m256i {
    let nibble = _mm256_set1_epi8(0x0f);
    let scale = |i: usize| _mm_set1_epi16(i16::from(w[q6_k::SCALES + i] as i8));
    let mut ints = _mm256_setzero_si256();
    for half in 0..2 {
        // SAFETY: by the caller.
        unsafe {
            let q = w.as_ptr().add(64 * half);
            let (q, r) = (load(q), load(q.add(32)));
            let pairs = load(w.as_ptr().add(q6_k::QH + 32 * half));
            let low = [
                _mm256_and_si256(q, nibble),
                _mm256_and_si256(r, nibble),
                _mm256_and_si256(_mm256_srli_epi16::<4>(q), nibble),
                _mm256_and_si256(_mm256_srli_epi16::<4>(r), nibble),
            ];
            for (k, low) in low.into_iter().enumerate() {
                let q = _mm256_or_si256(low, bits_at_4(pairs, 2 * k, 3));
                let j = 4 * half + k;
                let scales = _mm256_set_m128i(scale(2 * j + 1), scale(2 * j));
                let products = _mm256_maddubs_epi16(q, load(x.add(32 * j)));
                ints = D::pairs(ints, products, scales);
            }
        }
    }
    ints
}

impl<const NIBBLES: bool> Row for Blocks<NIBBLES> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot<D: Dot>(w: &[u8], x: &ActRow<'_>) -> f32 {
        let bytes = if NIBBLES { q4_0::BYTES } else { q8_0::BYTES };
        let mut sums = _mm256_setzero_ps();
        for (e, eight) in w.chunks(LANES * bytes).enumerate() {
            prefetch(eight.as_ptr(), LANES * bytes);
            let mut ints = [_mm256_setzero_si256(); LANES];
            let mut d = [0u16; LANES];
            for (i, w) in eight.chunks_exact(bytes).enumerate() {
                // SAFETY: within the block, and `x` has 32 values for it.
                unsafe {
                    let x = x.q.as_ptr().add(32 * (LANES * e + i)).cast();
                    ints[i] = block::<NIBBLES, D>(w.as_ptr(), x);
                }
                d[i] = u16::from_le_bytes([w[0], w[1]]);
            }
            sums = term(across(ints), _mm256_mul_ps(halves(d), scales(x, e)), sums);
        }
        total(sums)
    }
}

/// The lanes' parts of `w · x`. Unsigned weights are what the instructions multiply: signed ones are given an offset,
/// or 16 bits where that is too much.
///
/// # Safety
/// A block is at `w`, 32 values at `x`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn block<const NIBBLES: bool, D: Dot>(w: *const u8, x: *const u8) -> __m256i {
    let zero = _mm256_setzero_si256();
    // SAFETY: by the caller.
    unsafe {
        let (q, offset) = if NIBBLES {
            let q = _mm_loadu_si128(w.add(q4_0::QS).cast());
            let q = _mm256_set_m128i(_mm_srli_epi16::<4>(q), q);
            (_mm256_and_si256(q, _mm256_set1_epi8(0x0f)), _mm256_set1_epi8(8))
        } else if D::BITS < 8 {
            let w = w.add(q8_0::QS);
            let first = D::pairs(zero, widen(w), widen(x));
            return D::pairs(first, widen(w.add(16)), widen(x.add(16)));
        } else {
            let offset = _mm256_set1_epi8(-128);
            (_mm256_xor_si256(load(w.add(q8_0::QS)), offset), offset)
        };
        let (x, one) = (load(x), D::scale(_mm256_set1_epi32(1)));
        let products = D::scaled(zero, D::products(None, q, x), one);
        _mm256_sub_epi32(products, D::scaled(zero, D::products(None, offset, x), one))
    }
}

/// The scales of the activations' blocks from `8 * e` on, as many as there are of eight, then zeros.
#[inline]
#[target_feature(enable = "avx2")]
fn scales(x: &ActRow<'_>, e: usize) -> __m256 {
    let d = &x.d[LANES * e..];
    let mut eight = [0.0; LANES];
    let count = d.len().min(LANES);
    eight[..count].copy_from_slice(&d[..count]);
    // SAFETY: eight values are there.
    unsafe { _mm256_loadu_ps(eight.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn halves(bits: [u16; LANES]) -> __m256 {
    // SAFETY: 16 bytes are there.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(bits.as_ptr().cast())) }
}

/// 16 signed bytes in 16 bits each.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widen(from: *const u8) -> __m256i {
    // SAFETY: by the caller.
    unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())) }
}
