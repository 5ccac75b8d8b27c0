//! Weight rows into a [`Panel`], by type.

use std::arch::x86_64::*;

use super::dot::Dot;
use super::panel::Panel;
use super::{Blocks, K, Q6K, bits_at_4};
use crate::quant::blocks::{q4_0, q4_k, q5_k, q6_k, q8_0};
use crate::quant::source::Source;
use crate::quant::sums::LANES;

/// Weight rows of a panel: two vectors of 32-bit lanes.
pub(super) const ROWS: usize = 16;

/// How a weight type becomes a panel.
pub(super) trait Unpack {
    /// Bytes a block.
    const BYTES: usize;
    /// Blocks of a panel: one of 256 values with sub-blocks, or eight of 32.
    const BLOCKS: usize;
    /// Bits of a value.
    const BITS: u32;
    /// Values of a sub-block.
    const SUB: usize = 32;
    /// The factors are of minima with a scale of their own.
    const MINIMA: bool = false;
    /// What a block's values are stored with on top.
    const OFFSET: i16 = 0;

    /// Fills `panel` with `count` blocks of each row of `source`.
    ///
    /// # Safety
    /// They are there, and so are the instructions.
    unsafe fn unpack<D: Dot>(source: &Source<ROWS>, count: usize, panel: &mut Panel);

    /// Planes of a panel's blocks: values that have more bits than `D` multiplies go in by nibbles.
    #[inline]
    fn planes<D: Dot>() -> usize {
        if Self::BITS <= D::BITS { 1 } else { 2 }
    }
}

impl<const FIVE: bool> Unpack for K<FIVE> {
    const BYTES: usize = if FIVE { q5_k::BYTES } else { q4_k::BYTES };
    const BLOCKS: usize = 1;
    const BITS: u32 = if FIVE { 5 } else { 4 };
    const MINIMA: bool = true;

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn unpack<D: Dot>(source: &Source<ROWS>, _: usize, panel: &mut Panel) {
        let qs = if FIVE { q5_k::QS } else { q4_k::QS };
        for first in [0, 8] {
            // SAFETY: by the caller; what is loaded lies within the block.
            unsafe {
                let row = |r: usize| source.visit(first + r);
                k_scales::<D>(words(row), first, panel);
                for part in 0..2 {
                    let fifth = match FIVE {
                        true => words(|r| row(r).add(q5_k::QH + 16 * part)),
                        false => [_mm256_setzero_si256(); 4],
                    };
                    for chunk in 0..4 {
                        let q = words(|r| row(r).add(qs + 32 * chunk + 16 * part));
                        for (i, q) in q.into_iter().enumerate() {
                            let (mut low, mut high) = (nibbles(q), upper_nibbles(q));
                            if FIVE {
                                low = _mm256_or_si256(low, bits_at_4(fifth[i], 2 * chunk, 1));
                                high = _mm256_or_si256(high, bits_at_4(fifth[i], 2 * chunk + 1, 1));
                            }
                            let at = 16 * chunk + 4 * part + i;
                            put(panel, at, first, low);
                            put(panel, at + 8, first, high);
                        }
                    }
                }
            }
        }
    }
}

/// Scales and minima of 8 rows, from the first 16 bytes of each row's block.
///
/// # Safety
/// See [`Dot::scale`].
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn k_scales<D: Dot>(heads: [__m256i; 4], first: usize, panel: &mut Panel) {
    let [both_d, scales, mins, low] = heads;
    let and = |v, bits: i8| _mm256_and_si256(v, _mm256_set1_epi8(bits));
    // As `super::k_scales`, a row a lane.
    let upper = |v| and(_mm256_srli_epi32::<2>(v), 0x30);
    let scales = [and(scales, 0x3f), _mm256_or_si256(and(low, 0x0f), upper(scales))];
    let low = _mm256_srli_epi32::<4>(low);
    let mins = [and(mins, 0x3f), _mm256_or_si256(and(low, 0x0f), upper(mins))];
    for (sub, to) in panel.scales[..8].iter_mut().enumerate() {
        let byte = shifted_down(scales[sub / 4], 8 * (sub % 4));
        // SAFETY: by the caller.
        let scale = unsafe { D::scale(_mm256_and_si256(byte, _mm256_set1_epi32(0xff))) };
        store(&mut to[first..], scale);
    }
    for (pair, to) in panel.factors[..4].iter_mut().enumerate() {
        // Bytes 0 and 1, or 2 and 3, 16 bits each.
        let bytes = shifted_down(mins[pair / 2], 16 * (pair % 2));
        let high = _mm256_slli_epi32::<8>(_mm256_and_si256(bytes, _mm256_set1_epi32(0xff00)));
        let low = _mm256_and_si256(bytes, _mm256_set1_epi32(0xff));
        store(&mut to[first..], _mm256_or_si256(low, high));
    }
    // Words of up to 16 bits, in order.
    let halves = |v| {
        let both = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(v, v));
        _mm256_cvtph_ps(_mm256_castsi256_si128(both))
    };
    let d = _mm256_and_si256(both_d, _mm256_set1_epi32(0xffff));
    store_floats(&mut panel.d[0][first..], halves(d));
    store_floats(&mut panel.dmin[first..], halves(_mm256_srli_epi32::<16>(both_d)));
}

impl Unpack for Q6K {
    const BYTES: usize = q6_k::BYTES;
    const BLOCKS: usize = 1;
    const BITS: u32 = 6;
    const SUB: usize = 16;

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn unpack<D: Dot>(source: &Source<ROWS>, _: usize, panel: &mut Panel) {
        for first in [0, 8] {
            // SAFETY: by the caller; what is loaded lies within the block.
            unsafe {
                let row = |r: usize| source.visit(first + r);
                let scales = words(|r| row(r).add(q6_k::SCALES));
                for (sub, scales) in (0..16).map(|sub| (sub, scales[sub / 4])) {
                    let scale = _mm256_srai_epi32::<24>(shifted_up(scales, 24 - 8 * (sub % 4)));
                    store(&mut panel.scales[sub][first..], D::scale(scale));
                }
                for (pair, factors) in panel.factors.iter_mut().enumerate() {
                    // Two scales times the offset of 32, 16 bits each.
                    let bytes = shifted_down(scales[pair / 2], 16 * (pair % 2));
                    let high = _mm256_slli_epi32::<16>(bytes);
                    let both = _mm256_blend_epi16::<0xaa>(_mm256_slli_epi32::<8>(bytes), high);
                    store(
                        &mut factors[first..],
                        _mm256_slli_epi16::<5>(_mm256_srai_epi16::<8>(both)),
                    );
                }
                let d =
                    |r: usize| source.row(first + r).add(q6_k::D).cast::<i16>().read_unaligned();
                store_floats(&mut panel.d[0][first..], halves(d));
                for (half, part) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    let pairs = words(|r| row(r).add(q6_k::QH + 32 * half + 16 * part));
                    for side in 0..2 {
                        let q = words(|r| row(r).add(64 * half + 32 * side + 16 * part));
                        for i in 0..4 {
                            let low = bits_at_4(pairs[i], 2 * side, 3);
                            let high = bits_at_4(pairs[i], 2 * side + 4, 3);
                            let at = 32 * half + 8 * side + 4 * part + i;
                            put(panel, at, first, _mm256_or_si256(nibbles(q[i]), low));
                            put(panel, at + 16, first, _mm256_or_si256(upper_nibbles(q[i]), high));
                        }
                    }
                }
            }
        }
    }
}

impl<const NIBBLES: bool> Unpack for Blocks<NIBBLES> {
    const BYTES: usize = if NIBBLES { q4_0::BYTES } else { q8_0::BYTES };
    const BLOCKS: usize = LANES;
    const BITS: u32 = if NIBBLES { 4 } else { 8 };
    const OFFSET: i16 = if NIBBLES { 8 } else { 128 };

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn unpack<D: Dot>(source: &Source<ROWS>, count: usize, panel: &mut Panel) {
        for (first, b) in [0, 8].into_iter().flat_map(|first| (0..count).map(move |b| (first, b))) {
            // SAFETY: by the caller; what is loaded lies within the block.
            unsafe {
                let row = |r: usize| source.visit(first + r).add(b * Self::BYTES);
                let d = |r: usize| {
                    source.row(first + r).add(b * Self::BYTES).cast::<i16>().read_unaligned()
                };
                store_floats(&mut panel.d[b][first..], halves(d));
                let at = 8 * Self::planes::<D>() * b;
                if NIBBLES {
                    for (i, q) in words(|r| row(r).add(q4_0::QS)).into_iter().enumerate() {
                        put(panel, at + i, first, nibbles(q));
                        put(panel, at + 4 + i, first, upper_nibbles(q));
                    }
                    continue;
                }
                for part in 0..2 {
                    let q = words(|r| row(r).add(q8_0::QS + 16 * part));
                    for (i, q) in q.into_iter().enumerate() {
                        let at = at + 4 * part + i;
                        let q = _mm256_xor_si256(q, _mm256_set1_epi8(-128));
                        if Self::planes::<D>() == 1 {
                            put(panel, at, first, q);
                        } else {
                            put(panel, at, first, nibbles(q));
                            put(panel, at + 8, first, upper_nibbles(q));
                        }
                    }
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(q: __m256i) -> __m256i {
    _mm256_and_si256(q, _mm256_set1_epi8(0x0f))
}

#[inline]
#[target_feature(enable = "avx2")]
fn upper_nibbles(q: __m256i) -> __m256i {
    nibbles(_mm256_srli_epi16::<4>(q))
}

#[inline]
#[target_feature(enable = "avx2")]
fn shifted_down(v: __m256i, bits: usize) -> __m256i {
    _mm256_srl_epi32(v, _mm_cvtsi32_si128(bits as i32))
}

#[inline]
#[target_feature(enable = "avx2")]
fn shifted_up(v: __m256i, bits: usize) -> __m256i {
    _mm256_sll_epi32(v, _mm_cvtsi32_si128(bits as i32))
}

/// Vector `i` of the result holds 32-bit word `i` of 16 bytes at each of 8 rows.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn words(row: impl Fn(usize) -> *const u8) -> [__m256i; 4] {
    let mut v = [_mm256_setzero_si256(); 4];
    for (i, v) in v.iter_mut().enumerate() {
        // SAFETY: by the caller.
        *v = unsafe { _mm256_loadu2_m128i(row(4 + i).cast(), row(i).cast()) };
    }
    let [a, b, c, d] = v;
    let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(ab, cd),
        _mm256_unpackhi_epi64(ab, cd),
        _mm256_unpacklo_epi64(ab_high, cd_high),
        _mm256_unpackhi_epi64(ab_high, cd_high),
    ]
}

/// One f16 of each of 8 rows. Straight into a vector: one that is loaded after scalar stores waits for them.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn halves(d: impl Fn(usize) -> i16) -> __m256 {
    _mm256_cvtph_ps(_mm_set_epi16(d(7), d(6), d(5), d(4), d(3), d(2), d(1), d(0)))
}

/// Four values of each of 8 rows from `first`.
#[inline]
#[target_feature(enable = "avx2")]
fn put(panel: &mut Panel, at: usize, first: usize, values: __m256i) {
    let to = &mut panel.values[at][4 * first..][..32];
    // SAFETY: there is room for 32 bytes.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), values) };
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(to: &mut [i32], values: __m256i) {
    // SAFETY: the slice is checked to have room.
    unsafe { _mm256_storeu_si256(to[..8].as_mut_ptr().cast(), values) };
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_floats(to: &mut [f32], values: __m256) {
    // SAFETY: the slice is checked to have room.
    unsafe { _mm256_storeu_ps(to[..8].as_mut_ptr(), values) };
}
