//! Weight rows into a [`Panel`], by type.

use std::arch::x86_64::*;

use super::{Blocks, K, Q6K, load, or_bits};
use crate::quant::blocks::{q4_0, q4_k, q5_k, q6_k, q8_0};
use crate::quant::source::Source;
use crate::quant::sums::LANES;

/// Weight rows of a panel: two vectors of 32-bit lanes.
pub(super) const ROWS: usize = 32;

/// Values that are unpacked at a time.
pub(super) const STEP: usize = 256;

/// 256 values of each of [`ROWS`] weight rows.
#[repr(C, align(64))]
pub(super) struct Panel {
    /// Values, unsigned: `[value / 4][row][value % 4]`.
    pub(super) values: [[u8; 4 * ROWS]; STEP / 4],
    /// Each sub-block's integer scale.
    pub(super) scales: [[i32; ROWS]; 16],
    /// Factors of the activations' sums over a sub-block's values, two 16-bit ones a lane.
    pub(super) factors: [[i32; ROWS]; STEP / 32],
    /// Each block's scale.
    pub(super) d: [[f32; ROWS]; LANES],
    /// The scale of the minima.
    pub(super) dmin: [f32; ROWS],
}

impl Panel {
    pub(super) const EMPTY: Panel = Panel {
        values: [[0; 4 * ROWS]; STEP / 4],
        scales: [[0; ROWS]; 16],
        factors: [[0; ROWS]; STEP / 32],
        d: [[0.0; ROWS]; LANES],
        dmin: [0.0; ROWS],
    };
}

/// How a weight type becomes a panel.
pub(super) trait Unpack {
    /// Bytes a block.
    const BYTES: usize;
    /// Blocks of a panel: one of 256 values with sub-blocks, or eight of 32.
    const BLOCKS: usize;
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
    unsafe fn unpack(source: &Source<ROWS>, count: usize, panel: &mut Panel);
}

impl<const FIVE: bool> Unpack for K<FIVE> {
    const BYTES: usize = if FIVE { q5_k::BYTES } else { q4_k::BYTES };
    const BLOCKS: usize = 1;
    const MINIMA: bool = true;

    #[inline]
    #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn unpack(source: &Source<ROWS>, _: usize, panel: &mut Panel) {
        let nibble = _mm512_set1_epi8(0x0f);
        for first in [0, 16] {
            // SAFETY: by the caller; what is loaded lies within the block.
            unsafe {
                let row = |r: usize, at: usize| source.visit_line(first + r, at);
                k_scales(heads(|r| row(r, 0)), first, panel);
                let fifth = match FIVE {
                    true => lanes(|r| load(row(r, q5_k::QH))),
                    false => [_mm512_setzero_si512(); 16],
                };
                for half in 0..2 {
                    let qs = if FIVE { q5_k::QS } else { q4_k::QS } + 64 * half;
                    let q = lanes(|r| load(row(r, qs)));
                    for (i, q) in q.into_iter().enumerate() {
                        let (sub, i) = (4 * half + 2 * (i / 8), i % 8);
                        let mut low = _mm512_and_si512(q, nibble);
                        let mut high = _mm512_and_si512(_mm512_srli_epi16::<4>(q), nibble);
                        if FIVE {
                            low = or_bits(low, from_bit(fifth[i], sub), 0x10);
                            high = or_bits(high, from_bit(fifth[i], sub + 1), 0x10);
                        }
                        put(panel, 8 * sub + i, first, low);
                        put(panel, 8 * sub + 8 + i, first, high);
                    }
                }
            }
        }
    }
}

/// Scales and minima of 16 rows, from the first 16 bytes of each row's block.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn k_scales(heads: [__m512i; 4], first: usize, panel: &mut Panel) {
    let [both_d, scales, mins, low] = heads;
    let and = |v, bits: i8| _mm512_and_si512(v, _mm512_set1_epi8(bits));
    // As `avx2::k_scales`, a row a lane.
    let upper = |v| and(_mm512_srli_epi32::<2>(v), 0x30);
    let scales = [and(scales, 0x3f), _mm512_or_si512(and(low, 0x0f), upper(scales))];
    let low = _mm512_srli_epi32::<4>(low);
    let mins = [and(mins, 0x3f), _mm512_or_si512(and(low, 0x0f), upper(mins))];
    for (sub, to) in panel.scales[..8].iter_mut().enumerate() {
        let down = _mm512_set1_epi32(8 * (sub as i32 % 4));
        let byte = _mm512_srlv_epi32(scales[sub / 4], down);
        store(&mut to[first..], _mm512_and_si512(byte, _mm512_set1_epi32(0xff)));
    }
    for (pair, to) in panel.factors[..4].iter_mut().enumerate() {
        // Bytes 0 and 1, or 2 and 3, 16 bits each.
        let bytes = _mm512_srlv_epi32(mins[pair / 2], _mm512_set1_epi32(16 * (pair as i32 % 2)));
        let high = _mm512_slli_epi32::<8>(_mm512_and_si512(bytes, _mm512_set1_epi32(0xff00)));
        let low = _mm512_and_si512(bytes, _mm512_set1_epi32(0xff));
        store(&mut to[first..], _mm512_or_si512(low, high));
    }
    let halves = |v| _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
    store_floats(&mut panel.d[0][first..], halves(both_d));
    store_floats(&mut panel.dmin[first..], halves(_mm512_srli_epi32::<16>(both_d)));
}

impl Unpack for Q6K {
    const BYTES: usize = q6_k::BYTES;
    const BLOCKS: usize = 1;
    const SUB: usize = 16;

    #[inline]
    #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn unpack(source: &Source<ROWS>, _: usize, panel: &mut Panel) {
        let nibble = _mm512_set1_epi8(0x0f);
        for first in [0, 16] {
            // SAFETY: by the caller; what is loaded lies within the block.
            unsafe {
                let row = |r: usize, at: usize| source.visit_line(first + r, at);
                let scales = heads(|r| row(r, q6_k::SCALES));
                for (sub, scales) in (0..16).map(|sub| (sub, scales[sub / 4])) {
                    let up = _mm512_set1_epi32(24 - 8 * (sub as i32 % 4));
                    let scale = _mm512_srai_epi32::<24>(_mm512_sllv_epi32(scales, up));
                    store(&mut panel.scales[sub][first..], scale);
                }
                for (pair, factors) in panel.factors.iter_mut().enumerate() {
                    // Two scales times the offset of 32, 16 bits each.
                    let bytes = _mm512_srlv_epi32(
                        scales[pair / 2],
                        _mm512_set1_epi32(16 * (pair as i32 % 2)),
                    );
                    let low = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(bytes));
                    let high = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(bytes));
                    let low = _mm512_and_si512(low, _mm512_set1_epi32(0xffff));
                    let both = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                    store(&mut factors[first..], _mm512_slli_epi16::<5>(both));
                }
                let d = |r: usize| row(r, q6_k::D).cast::<i16>().read_unaligned();
                store_floats(&mut panel.d[0][first..], halves(d));
                for half in 0..2 {
                    let q = lanes(|r| load(row(r, 64 * half)));
                    let pairs = lanes(|r| load_half(row(r, q6_k::QH + 32 * half)));
                    for k in 0..4 {
                        for i in 0..8 {
                            let q = q[8 * (k % 2) + i];
                            let q = if k < 2 { q } else { _mm512_srli_epi16::<4>(q) };
                            let q = _mm512_and_si512(q, nibble);
                            let q = or_bits(q, from_bit(pairs[i], 2 * k), 0x30);
                            put(panel, 32 * half + 8 * k + i, first, q);
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
    const OFFSET: i16 = if NIBBLES { 8 } else { 128 };

    #[inline]
    #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn unpack(source: &Source<ROWS>, count: usize, panel: &mut Panel) {
        for first in [0, 16] {
            for b in 0..count {
                // SAFETY: by the caller; what is loaded lies within the block.
                unsafe {
                    let row = |r: usize| source.row(first + r).add(b * Self::BYTES);
                    let d = |r: usize| {
                        source.visit_line(first + r, b * Self::BYTES).cast::<i16>().read_unaligned()
                    };
                    store_floats(&mut panel.d[b][first..], halves(d));
                    if NIBBLES {
                        let nibble = _mm512_set1_epi8(0x0f);
                        for (i, q) in heads(|r| row(r).add(q4_0::QS)).into_iter().enumerate() {
                            let high = _mm512_srli_epi16::<4>(q);
                            put(panel, 8 * b + i, first, _mm512_and_si512(q, nibble));
                            put(panel, 8 * b + 4 + i, first, _mm512_and_si512(high, nibble));
                        }
                    } else {
                        for part in 0..2 {
                            let q = heads(|r| row(r).add(q8_0::QS + 16 * part));
                            for (i, q) in q.into_iter().enumerate() {
                                let q = _mm512_xor_si512(q, _mm512_set1_epi8(-128));
                                put(panel, 8 * b + 4 * part + i, first, q);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Vector `i` of the result holds 32-bit word `i` of each of 16 rows' vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn lanes(row: impl Fn(usize) -> __m512i) -> [__m512i; 16] {
    let mut v = [_mm512_setzero_si512(); 16];
    for quarter in 0..4 {
        let r = 4 * quarter;
        let words = words_of_4([row(r), row(r + 1), row(r + 2), row(r + 3)]);
        for (i, words) in words.into_iter().enumerate() {
            v[r + i] = words;
        }
    }
    let mut out = [_mm512_setzero_si512(); 16];
    for i in 0..4 {
        // Each 128 bits of these are one word of four rows; words are four apart.
        let (a, b) = (v[i], v[4 + i]);
        let (c, d) = (v[8 + i], v[12 + i]);
        let (ab_even, ab_odd) =
            (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (cd_even, cd_odd) =
            (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        out[i] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
        out[4 + i] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
        out[8 + i] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
        out[12 + i] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
    }
    out
}

/// Vector `i` of the result holds 32-bit word `i` of 16 bytes at each of 16 rows.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn heads(row: impl Fn(usize) -> *const u8) -> [__m512i; 4] {
    let mut v = [_mm512_setzero_si512(); 4];
    for (i, v) in v.iter_mut().enumerate() {
        // SAFETY: by the caller.
        unsafe {
            let part = |q: usize| _mm_loadu_si128(row(4 * q + i).cast());
            *v = _mm512_castsi128_si512(part(0));
            *v = _mm512_inserti32x4::<1>(*v, part(1));
            *v = _mm512_inserti32x4::<2>(*v, part(2));
            *v = _mm512_inserti32x4::<3>(*v, part(3));
        }
    }
    words_of_4(v)
}

/// Within each 128 bits, vector `i` of the result holds word `i` of each of the four.
#[inline]
#[target_feature(enable = "avx512f")]
fn words_of_4([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(ab, cd),
        _mm512_unpackhi_epi64(ab, cd),
        _mm512_unpacklo_epi64(ab_high, cd_high),
        _mm512_unpackhi_epi64(ab_high, cd_high),
    ]
}

/// Bits `from` and up of each byte at bit 4 and up; the others are not what they were.
#[inline]
#[target_feature(enable = "avx512f")]
fn from_bit(v: __m512i, from: usize) -> __m512i {
    _mm512_rorv_epi32(v, _mm512_set1_epi32((from as i32 + 28) % 32))
}

/// One f16 of each of 16 rows. Straight into a vector: one that is loaded after scalar stores waits for them.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(d: impl Fn(usize) -> i16) -> __m512 {
    #[rustfmt::skip]
    let all = _mm256_set_epi16(
        d(15), d(14), d(13), d(12), d(11), d(10), d(9), d(8), d(7), d(6), d(5), d(4), d(3), d(2), d(1), d(0),
    );
    _mm512_cvtph_ps(all)
}

/// Four values of each of 16 rows from `first`.
#[inline]
#[target_feature(enable = "avx512f")]
fn put(panel: &mut Panel, at: usize, first: usize, values: __m512i) {
    let to = &mut panel.values[at][4 * first..][..64];
    // SAFETY: there is room for 64 bytes.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), values) };
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [i32], values: __m512i) {
    // SAFETY: the slice is checked to have room.
    unsafe { _mm512_storeu_si512(to[..16].as_mut_ptr().cast(), values) };
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_floats(to: &mut [f32], values: __m512) {
    // SAFETY: the slice is checked to have room.
    unsafe { _mm512_storeu_ps(to[..16].as_mut_ptr(), values) };
}

/// # Safety
/// 32 bytes are there.
#[inline]
#[target_feature(enable = "avx2,avx512f")]
unsafe fn load_half(from: *const u8) -> __m512i {
    // SAFETY: by the caller.
    unsafe { _mm512_zextsi256_si512(_mm256_loadu_si256(from.cast())) }
}
