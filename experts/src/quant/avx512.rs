//! AVX-512 with VNNI: 64 quantised values an instruction.
//!
//! `dpbusd` multiplies unsigned weights by signed activations and adds four products to an i32, which for weights of
//! up to 6 bits fits in 16; `dpwssd` then multiplies that by the sub-block's scale and accumulates. Signed weights
//! are made unsigned by an offset, which the activations' sums take back, all in integers.

mod floats;

use std::arch::x86_64::*;

use super::avx2::{half_pair, in_16_bits};
use super::blocks::{q4_0, q4_k, q5_k, q6_k, q8_0, scales_mins};
use super::isa::Isa;
use super::tiles::tile_functions;
use super::{ActRow, Kernels, Tile, TileFn, vq};
use floats::{BF16, F16, F32, blend_f16, float_dot};

pub(super) static KERNELS: Kernels = Kernels {
    name: "AVX-512 VNNI",
    isa: Isa::Avx512,
    f32: f32_tile,
    f16: f16_tile,
    bf16: bf16_tile,
    q8_0: q8_0_tile,
    q4_0: q4_0_tile,
    q4_k: q4_k_tile,
    q5_k: q5_k_tile,
    q6_k: q6_k_tile,
    vq: vq::tile::<Q8>,
    blend_f16,
};

/// What unpacked codes are multiplied by.
struct Q8;

impl vq::Q8 for Q8 {
    const TILE: TileFn = q8_0_tile;
}

/// A weight row is unpacked once for this many activation rows.
const BATCH: usize = 4;

tile_functions!("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni");

/// Q4_K, or Q5_K where `FIVE`.
///
/// # Safety
/// Each `x` holds as many Q8_K values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn k_dot<const FIVE: bool, const N: usize>(w: &[u8], x: &[ActRow<'_>; N]) -> [f32; N] {
    let (bytes, qs) = if FIVE { (q5_k::BYTES, q5_k::QS) } else { (q4_k::BYTES, q4_k::QS) };
    // Which scale each 16-bit lane takes, for (sub-blocks 0 and 2) and (1 and 3) of a half; 0 in odd lanes.
    let scale_of = |sub: i32| {
        let lane = |s: i32| 0x8080_0000_u32 as i32 | ((2 * s + 1) << 8) | (2 * s);
        let (a, b) = (lane(sub), lane(sub + 2));
        _mm512_set_epi32(b, b, b, b, b, b, b, b, a, a, a, a, a, a, a, a)
    };
    let scale_of = [[scale_of(0), scale_of(1)], [scale_of(4), scale_of(5)]];
    let pairs = _mm256_set_epi64x(
        0x0f0e_0f0e_0d0c_0d0c,
        0x0b0a_0b0a_0908_0908,
        0x0706_0706_0504_0504,
        0x0302_0302_0100_0100,
    );
    let nibble = _mm512_set1_epi8(0x0f);
    let mut sums = [_mm512_setzero_ps(); N];
    let mut minima = [_mm256_setzero_ps(); N];
    for b in 0..w.len() / bytes {
        let mut ints = [_mm512_setzero_si512(); N];
        // SAFETY: all within block `b` of the weights, and `x` has 256 values, a scale and 16 sums for each.
        unsafe {
            let w = w.as_ptr().add(b * bytes);
            prefetch(w, bytes);
            let packed = w.add(q4_k::SCALES).cast::<[u8; 12]>().read();
            let scales_mins = in_16_bits(scales_mins(packed));
            let scales = _mm512_broadcast_i32x4(_mm256_castsi256_si128(scales_mins));
            for (half, [low_lanes, high_lanes]) in scale_of.into_iter().enumerate() {
                // Two chunks: their low nibbles are sub-blocks 0 and 2 of this half, their high ones 1 and 3.
                let q = load(w.add(qs + 64 * half));
                let mut low = _mm512_and_si512(q, nibble);
                let mut high = _mm512_and_si512(_mm512_srli_epi16::<4>(q), nibble);
                if FIVE {
                    let fifth = w.add(q5_k::QH);
                    let fifth = _mm512_broadcast_i64x4(_mm256_loadu_si256(fifth.cast()));
                    let fifth = if half == 0 { fifth } else { _mm512_srli_epi16::<4>(fifth) };
                    low = or_bits(low, _mm512_sllv_epi16(fifth, halves(4, 2)), 0x10);
                    high = or_bits(high, _mm512_sllv_epi16(fifth, halves(3, 1)), 0x10);
                }
                let low_scales = _mm512_shuffle_epi8(scales, low_lanes);
                let high_scales = _mm512_shuffle_epi8(scales, high_lanes);
                for n in 0..N {
                    let q = x[n].q.as_ptr().add(256 * b + 128 * half).cast();
                    let (a, c) = (load(q), load(q.add(64)));
                    let even = _mm512_shuffle_i64x2::<0x44>(a, c);
                    let odd = _mm512_shuffle_i64x2::<0xee>(a, c);
                    let with_low = _mm512_dpwssd_epi32(ints[n], dot(low, even), low_scales);
                    ints[n] = _mm512_dpwssd_epi32(with_low, dot(high, odd), high_scales);
                }
            }
            let mins = _mm256_permute4x64_epi64::<0xee>(scales_mins);
            let mins = _mm256_shuffle_epi8(mins, pairs);
            for n in 0..N {
                let d = _mm_mul_ps(half_pair(w), _mm_set1_ps(*x[n].d.get_unchecked(b)));
                let sums_16 = _mm256_loadu_si256(x[n].sums.as_ptr().add(16 * b).cast());
                let minimum = _mm256_cvtepi32_ps(_mm256_madd_epi16(mins, sums_16));
                let dmin = _mm256_broadcastss_ps(_mm_movehdup_ps(d));
                let (scaled, d) = (_mm512_cvtepi32_ps(ints[n]), _mm512_broadcastss_ps(d));
                sums[n] = _mm512_fmadd_ps(scaled, d, sums[n]);
                minima[n] = _mm256_fmadd_ps(minimum, dmin, minima[n]);
            }
        }
    }
    for n in 0..N {
        sums[n] = _mm512_sub_ps(sums[n], _mm512_zextps256_ps512(minima[n]));
    }
    totals(sums)
}

/// Q6_K.
///
/// # Safety
/// Each `x` holds as many Q8_K values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn q6_k_dot<const N: usize>(w: &[u8], x: &[ActRow<'_>; N]) -> [f32; N] {
    let nibble = _mm512_set1_epi8(0x0f);
    // Four scales for 64 values: 128 bits each.
    let lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    let mut sums = [_mm512_setzero_ps(); N];
    for b in 0..w.len() / q6_k::BYTES {
        let mut ints = [_mm512_setzero_si512(); N];
        // SAFETY: all within block `b` of the weights, and `x` has 256 values, a scale and 16 sums for each.
        unsafe {
            let w = w.as_ptr().add(b * q6_k::BYTES);
            prefetch(w, q6_k::BYTES);
            let scales_16 = _mm256_cvtepi8_epi16(_mm_loadu_si128(w.add(q6_k::SCALES).cast()));
            let scales_32 = _mm512_cvtepu16_epi32(scales_16);
            for half in 0..2 {
                let first = _mm512_set1_epi32(8 * half as i32);
                let low_lanes = _mm512_add_epi32(lanes, first);
                let high_lanes = _mm512_add_epi32(low_lanes, _mm512_set1_epi32(4));
                let q = load(w.add(64 * half));
                let pairs = _mm256_loadu_si256(w.add(q6_k::QH + 32 * half).cast());
                let pairs = _mm512_broadcast_i64x4(pairs);
                let low = _mm512_and_si512(q, nibble);
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(q), nibble);
                let low = or_bits(low, _mm512_sllv_epi16(pairs, halves(4, 2)), 0x30);
                let high = or_bits(high, _mm512_srlv_epi16(pairs, halves(0, 2)), 0x30);
                let low_scales = _mm512_permutexvar_epi32(low_lanes, scales_32);
                let high_scales = _mm512_permutexvar_epi32(high_lanes, scales_32);
                for n in 0..N {
                    let q = x[n].q.as_ptr().add(256 * b + 128 * half).cast::<u8>();
                    let (a, c) = (load(q), load(q.add(64)));
                    let with_low = _mm512_dpwssd_epi32(ints[n], dot(low, a), low_scales);
                    ints[n] = _mm512_dpwssd_epi32(with_low, dot(high, c), high_scales);
                }
            }
            let d = _mm_movehdup_ps(half_pair(w.add(q6_k::D - 2)));
            for n in 0..N {
                let d = _mm_mul_ps(d, _mm_set1_ps(*x[n].d.get_unchecked(b)));
                let sums_16 = _mm256_loadu_si256(x[n].sums.as_ptr().add(16 * b).cast());
                // Weights are stored +32.
                let offset = _mm256_slli_epi32::<5>(_mm256_madd_epi16(scales_16, sums_16));
                let exact = _mm512_sub_epi32(ints[n], _mm512_zextsi256_si512(offset));
                let d = _mm512_broadcastss_ps(d);
                sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), d, sums[n]);
            }
        }
    }
    totals(sums)
}

/// Q8_0, or Q4_0 where `NIBBLES`: eight blocks at a time share one vector of scales.
///
/// # Safety
/// Each `x` holds as many Q8_0 values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn block_dot<const NIBBLES: bool, const N: usize>(
    w: &[u8],
    x: &[ActRow<'_>; N],
) -> [f32; N] {
    let (bytes, offset) = if NIBBLES { (q4_0::BYTES, 8) } else { (q8_0::BYTES, -128) };
    let offset = _mm512_set1_epi8(offset);
    let mut sums = [_mm512_setzero_ps(); N];
    let blocks = w.len() / bytes;
    for e in 0..blocks / 8 {
        // SAFETY: all within eight blocks of the weights, and `x` has 256 values and 8 scales for them.
        unsafe {
            let w = w.as_ptr().add(8 * e * bytes);
            let d = eight_scales::<NIBBLES>(w);
            let mut scales = [_mm512_setzero_ps(); N];
            for n in 0..N {
                let d = _mm256_mul_ps(d, _mm256_loadu_ps(x[n].d.as_ptr().add(8 * e)));
                scales[n] = _mm512_castps256_ps512(d);
            }
            for pair in 0..4 {
                let (a, c) = (2 * pair as i32, 2 * pair as i32 + 1);
                let lanes = _mm512_set_epi32(c, c, c, c, c, c, c, c, a, a, a, a, a, a, a, a);
                let q = block_pair::<NIBBLES>(w.add(2 * pair * bytes), bytes);
                for n in 0..N {
                    let a = load(x[n].q.as_ptr().add(256 * e + 64 * pair).cast());
                    let exact = _mm512_sub_epi32(dot(q, a), dot(offset, a));
                    let scale = _mm512_permutexvar_ps(lanes, scales[n]);
                    sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, sums[n]);
                }
            }
        }
    }
    for b in blocks / 8 * 8..blocks {
        for n in 0..N {
            // SAFETY: within block `b`, and `x` has 32 values and a scale for it.
            unsafe {
                let w = w.as_ptr().add(b * bytes);
                let q = _mm512_zextsi256_si512(block::<NIBBLES>(w));
                let a = _mm256_loadu_si256(x[n].q.as_ptr().add(32 * b).cast());
                let a = _mm512_zextsi256_si512(a);
                let d = _mm_mul_ps(half_pair(w), _mm_set1_ps(*x[n].d.get_unchecked(b)));
                let exact = _mm512_sub_epi32(dot(q, a), dot(offset, a));
                let d = _mm512_broadcastss_ps(d);
                sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), d, sums[n]);
            }
        }
    }
    totals(sums)
}

/// The scales of eight blocks.
///
/// # Safety
/// They are at `w`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn eight_scales<const NIBBLES: bool>(w: *const u8) -> __m256 {
    // SAFETY: by the caller: 128 of 144 bytes, or two bytes of each of eight blocks.
    unsafe {
        if NIBBLES {
            // Nine words apart: all within the first 128 bytes.
            let at = _mm512_castsi128_si512(_mm_set_epi16(63, 54, 45, 36, 27, 18, 9, 0));
            let d = _mm512_permutex2var_epi16(load(w), at, load(w.add(64)));
            _mm256_cvtph_ps(_mm512_castsi512_si128(d))
        } else {
            let d = |i: usize| w.add(i * q8_0::BYTES).cast::<i16>().read_unaligned();
            _mm256_cvtph_ps(_mm_set_epi16(d(7), d(6), d(5), d(4), d(3), d(2), d(1), d(0)))
        }
    }
}

/// Two blocks' values, made unsigned by their offset.
///
/// # Safety
/// Two blocks of `bytes` are at `w`.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn block_pair<const NIBBLES: bool>(w: *const u8, bytes: usize) -> __m512i {
    // SAFETY: by the caller.
    unsafe {
        if NIBBLES {
            let first = _mm512_broadcast_i32x4(_mm_loadu_si128(w.add(q4_0::QS).cast()));
            let second = _mm_loadu_si128(w.add(bytes + q4_0::QS).cast());
            let q = _mm512_mask_broadcast_i32x4(first, 0xff00, second);
            let shifts = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
            _mm512_and_si512(_mm512_srlv_epi64(q, shifts), _mm512_set1_epi8(0x0f))
        } else {
            let first = _mm256_loadu_si256(w.add(q8_0::QS).cast());
            let second = _mm256_loadu_si256(w.add(bytes + q8_0::QS).cast());
            let q = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second);
            _mm512_xor_si512(q, _mm512_set1_epi8(-128))
        }
    }
}

/// One block's values, made unsigned by their offset.
///
/// # Safety
/// A block is at `w`.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
unsafe fn block<const NIBBLES: bool>(w: *const u8) -> __m256i {
    // SAFETY: by the caller.
    unsafe {
        if NIBBLES {
            let q = _mm256_broadcastsi128_si256(_mm_loadu_si128(w.add(q4_0::QS).cast()));
            let q = _mm256_srlv_epi64(q, _mm256_set_epi64x(4, 4, 0, 0));
            _mm256_and_si256(q, _mm256_set1_epi8(0x0f))
        } else {
            let q = _mm256_loadu_si256(w.add(q8_0::QS).cast());
            _mm256_xor_si256(q, _mm256_set1_epi8(-128))
        }
    }
}

/// The sum of each vector. Not a closure for `map`: one would not be inlined there, and sums that go through memory
/// hold up the next row's loads.
#[inline]
#[target_feature(enable = "avx512f")]
fn totals<const N: usize>(sums: [__m512; N]) -> [f32; N] {
    let mut totals = [0.0; N];
    for n in 0..N {
        totals[n] = _mm512_reduce_add_ps(sums[n]);
    }
    totals
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot(w: __m512i, x: __m512i) -> __m512i {
    _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, x)
}

/// `base`, whose `bits` are 0, with those of `more`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn or_bits(base: __m512i, more: __m512i, bits: i8) -> __m512i {
    // base | (more & bits)
    _mm512_ternarylogic_epi32::<0xf8>(base, more, _mm512_set1_epi8(bits))
}

/// One shift for the lower 256 bits and one for the upper.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn halves(lower: i16, upper: i16) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_set1_epi16(lower), _mm256_set1_epi16(upper))
}

/// # Safety
/// 64 bytes are there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(from: *const u8) -> __m512i {
    // SAFETY: by the caller.
    unsafe { _mm512_loadu_si512(from.cast()) }
}

/// Asks for a block that comes soon: the hardware's own prefetch stops at the end of each page.
#[inline]
#[target_feature(enable = "sse")]
fn prefetch(w: *const u8, len: usize) {
    const AHEAD: usize = 4096;
    for line in (0..len).step_by(64) {
        // A prefetch of an address that is not mapped does nothing.
        _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD + line).cast());
    }
}
