//! AVX-512 with VNNI: 64 quantised values an instruction.
//!
//! `dpbusd` multiplies unsigned weights by signed activations and adds four products to an i32, which for weights of
//! up to 6 bits fits in 16; `dpwssd` then multiplies that by the sub-block's scale and accumulates. Signed weights
//! are made unsigned by an offset, which the activations' sums take back, all in integers.

use std::arch::x86_64::*;

use half::f16;

use super::blocks::{q4_0, q4_k, q5_k, q6_k, q8_0, scales_mins};
use super::isa::Isa;
use super::{ActRow, Kernels, Tile};

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
    blend_f16,
};

/// A weight row is unpacked once for this many activation rows.
const BATCH: usize = 4;

/// A tile function from a row's dot product.
macro_rules! tile {
    ($name:ident, $dot:ident $(, $kind:expr)?) => {
        /// # Safety
        /// See `TileFn`.
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        unsafe fn $name(tile: &Tile<'_>) {
            let (batches, rest) = tile.x.as_chunks::<BATCH>();
            for (i, x) in batches.iter().enumerate() {
                for r in 0..tile.rows {
                    // SAFETY: `TileFn`'s conditions.
                    unsafe { tile.store(i * BATCH, r, $dot::<$({ $kind },)? BATCH>(tile.row(r), x)) };
                }
            }
            for (i, x) in rest.as_chunks::<1>().0.iter().enumerate() {
                for r in 0..tile.rows {
                    // SAFETY: `TileFn`'s conditions.
                    unsafe { tile.store(batches.len() * BATCH + i, r, $dot::<$({ $kind },)? 1>(tile.row(r), x)) };
                }
            }
        }
    };
}

tile!(f32_tile, float_dot, F32);
tile!(f16_tile, float_dot, F16);
tile!(bf16_tile, float_dot, BF16);
tile!(q8_0_tile, block_dot, false);
tile!(q4_0_tile, block_dot, true);
tile!(q4_k_tile, k_dot, false);
tile!(q5_k_tile, k_dot, true);
tile!(q6_k_tile, q6_k_dot);

/// Q4_K, or Q5_K where `FIVE`.
///
/// # Safety
/// `x` holds as many Q8_K values as `w` has.
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
    for (b, w) in w.chunks_exact(bytes).enumerate() {
        prefetch(w);
        let both = scales_mins(w[4..16].first_chunk().unwrap_or(&[0; 12]));
        let [s0, s1, m0, m1] = both.map(|word| word as i32);
        let both = _mm256_cvtepu8_epi16(_mm_set_epi32(m1, m0, s1, s0));
        let scales = _mm512_broadcast_i32x4(_mm256_castsi256_si128(both));
        let mins = _mm256_shuffle_epi8(_mm256_permute4x64_epi64::<0xee>(both), pairs);
        let mut ints = [_mm512_setzero_si512(); N];
        for half in 0..2 {
            // Two chunks: their low nibbles are sub-blocks 0 and 2 of this half, their high ones 1 and 3.
            // SAFETY: within the block.
            let q = unsafe { load(w.as_ptr().add(qs + 64 * half)) };
            let mut low = _mm512_and_si512(q, nibble);
            let mut high = _mm512_and_si512(_mm512_srli_epi16::<4>(q), nibble);
            if FIVE {
                // SAFETY: 32 bytes within the block.
                let fifth = unsafe { _mm256_loadu_si256(w.as_ptr().add(q5_k::QH).cast()) };
                let fifth = _mm512_broadcast_i64x4(fifth);
                let fifth = if half == 0 { fifth } else { _mm512_srli_epi16::<4>(fifth) };
                low = or_bits(low, _mm512_sllv_epi16(fifth, halves(4, 2)), 0x10);
                high = or_bits(high, _mm512_sllv_epi16(fifth, halves(3, 1)), 0x10);
            }
            let low_scales = _mm512_shuffle_epi8(scales, scale_of[half][0]);
            let high_scales = _mm512_shuffle_epi8(scales, scale_of[half][1]);
            for n in 0..N {
                // SAFETY: `x` has 256 values for each block.
                let (a, c) = unsafe {
                    let q = x[n].q.as_ptr().add(256 * b + 128 * half).cast::<u8>();
                    (load(q), load(q.add(64)))
                };
                let even = _mm512_shuffle_i64x2::<0x44>(a, c);
                let odd = _mm512_shuffle_i64x2::<0xee>(a, c);
                ints[n] = _mm512_dpwssd_epi32(ints[n], dot(low, even), low_scales);
                ints[n] = _mm512_dpwssd_epi32(ints[n], dot(high, odd), high_scales);
            }
        }
        for n in 0..N {
            // SAFETY: `x` has a scale and 16 sums for each block.
            let (d, sums_16) = unsafe {
                let d = _mm_mul_ps(half_pair(w, 0), _mm_set1_ps(*x[n].d.get_unchecked(b)));
                (d, _mm256_loadu_si256(x[n].sums.as_ptr().add(16 * b).cast()))
            };
            let minimum = _mm256_cvtepi32_ps(_mm256_madd_epi16(mins, sums_16));
            sums[n] =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints[n]), _mm512_broadcastss_ps(d), sums[n]);
            let dmin = _mm256_broadcastss_ps(_mm_movehdup_ps(d));
            minima[n] = _mm256_fmadd_ps(minimum, dmin, minima[n]);
        }
    }
    let minima = minima.map(|m| _mm512_zextps256_ps512(m));
    std::array::from_fn(|n| _mm512_reduce_add_ps(_mm512_sub_ps(sums[n], minima[n])))
}

/// Q6_K.
///
/// # Safety
/// `x` holds as many Q8_K values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn q6_k_dot<const N: usize>(w: &[u8], x: &[ActRow<'_>; N]) -> [f32; N] {
    let nibble = _mm512_set1_epi8(0x0f);
    // Four scales for 64 values: 128 bits each.
    let lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    let mut sums = [_mm512_setzero_ps(); N];
    for (b, w) in w.chunks_exact(q6_k::BYTES).enumerate() {
        prefetch(w);
        // SAFETY: 16 bytes within the block.
        let scales = unsafe { _mm_loadu_si128(w.as_ptr().add(q6_k::SCALES).cast()) };
        let scales_16 = _mm256_cvtepi8_epi16(scales);
        let scales_32 = _mm512_cvtepu16_epi32(scales_16);
        let mut ints = [_mm512_setzero_si512(); N];
        for half in 0..2 {
            // SAFETY: 64 bytes of nibbles and 32 of bit pairs within the block.
            let (q, pairs) = unsafe {
                let pairs = w.as_ptr().add(q6_k::QH + 32 * half);
                (load(w.as_ptr().add(64 * half)), _mm256_loadu_si256(pairs.cast()))
            };
            let pairs = _mm512_broadcast_i64x4(pairs);
            let low = _mm512_and_si512(q, nibble);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(q), nibble);
            let low = or_bits(low, _mm512_sllv_epi16(pairs, halves(4, 2)), 0x30);
            let high = or_bits(high, _mm512_srlv_epi16(pairs, halves(0, 2)), 0x30);
            let quarter = |k: usize| {
                let first = _mm512_set1_epi32(4 * k as i32);
                _mm512_permutexvar_epi32(_mm512_add_epi32(lanes, first), scales_32)
            };
            let (low_scales, high_scales) = (quarter(2 * half), quarter(2 * half + 1));
            for n in 0..N {
                // SAFETY: `x` has 256 values for each block.
                let (a, c) = unsafe {
                    let q = x[n].q.as_ptr().add(256 * b + 128 * half).cast::<u8>();
                    (load(q), load(q.add(64)))
                };
                ints[n] = _mm512_dpwssd_epi32(ints[n], dot(low, a), low_scales);
                ints[n] = _mm512_dpwssd_epi32(ints[n], dot(high, c), high_scales);
            }
        }
        for n in 0..N {
            // SAFETY: `x` has a scale and 16 sums for each block.
            let (d, sums_16) = unsafe {
                let d =
                    _mm_mul_ps(half_pair(w, q6_k::D - 2), _mm_set1_ps(*x[n].d.get_unchecked(b)));
                (_mm_movehdup_ps(d), _mm256_loadu_si256(x[n].sums.as_ptr().add(16 * b).cast()))
            };
            let offset = _mm256_slli_epi32::<5>(_mm256_madd_epi16(scales_16, sums_16));
            let ints = _mm512_sub_epi32(ints[n], _mm512_zextsi256_si512(offset));
            sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints), _mm512_broadcastss_ps(d), sums[n]);
        }
    }
    sums.map(|s| _mm512_reduce_add_ps(s))
}

/// Q8_0, or Q4_0 where `NIBBLES`: eight blocks at a time share one vector of scales.
///
/// # Safety
/// `x` holds as many Q8_0 values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn block_dot<const NIBBLES: bool, const N: usize>(
    w: &[u8],
    x: &[ActRow<'_>; N],
) -> [f32; N] {
    let (bytes, offset) = if NIBBLES { (q4_0::BYTES, 8) } else { (q8_0::BYTES, -128) };
    let offset = _mm512_set1_epi8(offset);
    let mut sums = [_mm512_setzero_ps(); N];
    let eights = w.chunks_exact(8 * bytes);
    let rest = eights.remainder();
    let first_rest = (w.len() - rest.len()) / bytes;
    for (e, w) in eights.enumerate() {
        prefetch(w);
        let d: [i16; 8] =
            std::array::from_fn(|i| i16::from_le_bytes([w[i * bytes], w[i * bytes + 1]]));
        let d = _mm256_cvtph_ps(_mm_set_epi16(d[7], d[6], d[5], d[4], d[3], d[2], d[1], d[0]));
        // SAFETY: `x` has 8 scales for 8 blocks.
        let scales: [__m512; N] = std::array::from_fn(|n| unsafe {
            let d = _mm256_mul_ps(d, _mm256_loadu_ps(x[n].d.as_ptr().add(8 * e)));
            _mm512_castps256_ps512(d)
        });
        for pair in 0..4 {
            let (a, c) = (2 * pair as i32, 2 * pair as i32 + 1);
            let blocks = _mm512_set_epi32(c, c, c, c, c, c, c, c, a, a, a, a, a, a, a, a);
            // SAFETY: two whole blocks.
            let q = unsafe { block_pair::<NIBBLES>(w.as_ptr().add(2 * pair * bytes), bytes) };
            for n in 0..N {
                // SAFETY: `x` has 256 values for 8 blocks.
                let a = unsafe { load(x[n].q.as_ptr().add(256 * e + 64 * pair).cast()) };
                let ints = _mm512_sub_epi32(dot(q, a), dot(offset, a));
                let scale = _mm512_permutexvar_ps(blocks, scales[n]);
                sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints), scale, sums[n]);
            }
        }
    }
    for (b, w) in rest.chunks_exact(bytes).enumerate() {
        let b = first_rest + b;
        // SAFETY: one whole block.
        let q = unsafe { block::<NIBBLES>(w.as_ptr()) };
        for n in 0..N {
            // SAFETY: `x` has 32 values and a scale for each block.
            let (a, d) = unsafe {
                (
                    _mm256_loadu_si256(x[n].q.as_ptr().add(32 * b).cast()),
                    _mm_mul_ps(half_pair(w, 0), _mm_set1_ps(*x[n].d.get_unchecked(b))),
                )
            };
            let (q, a) = (_mm512_zextsi256_si512(q), _mm512_zextsi256_si512(a));
            let ints = _mm512_sub_epi32(dot(q, a), dot(offset, a));
            sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints), _mm512_broadcastss_ps(d), sums[n]);
        }
    }
    sums.map(|s| _mm512_reduce_add_ps(s))
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

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// F32, F16 or BF16 weights, `TYPE` says which.
///
/// # Safety
/// `x` holds as many f32 values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn float_dot<const TYPE: u8, const N: usize>(w: &[u8], x: &[ActRow<'_>; N]) -> [f32; N] {
    let cols = w.len() / if TYPE == F32 { 4 } else { 2 };
    let mut sums = [[_mm512_setzero_ps(); 4]; N];
    let mut at = 0;
    while at + 64 <= cols {
        for part in 0..4 {
            let at = at + 16 * part;
            // SAFETY: 16 values are left in `w` and `x`.
            unsafe {
                let w = floats::<TYPE>(w.as_ptr(), at, !0);
                for n in 0..N {
                    let x = _mm512_loadu_ps(x[n].values.as_ptr().add(at));
                    sums[n][part] = _mm512_fmadd_ps(w, x, sums[n][part]);
                }
            }
        }
        at += 64;
    }
    while at < cols {
        let mask = u16::MAX >> (16 - (cols - at).min(16));
        // SAFETY: the mask keeps to what is left.
        unsafe {
            let w = floats::<TYPE>(w.as_ptr(), at, mask);
            for n in 0..N {
                let x = _mm512_maskz_loadu_ps(mask, x[n].values.as_ptr().add(at));
                sums[n][0] = _mm512_fmadd_ps(w, x, sums[n][0]);
            }
        }
        at += 16;
    }
    sums.map(|[a, b, c, d]| {
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)))
    })
}

/// Values `at..at + 16` of the weights, those that `mask` names.
///
/// # Safety
/// The values that `mask` names are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn floats<const TYPE: u8>(w: *const u8, at: usize, mask: u16) -> __m512 {
    // SAFETY: by the caller.
    unsafe {
        match TYPE {
            F32 => _mm512_maskz_loadu_ps(mask, w.cast::<f32>().add(at)),
            F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, w.cast::<i16>().add(at))),
            _ => {
                let bits = _mm256_maskz_loadu_epi16(mask, w.cast::<i16>().add(at));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
            }
        }
    }
}

/// # Safety
/// See `BlendFn`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn blend_f16(weights: &[f32], rows: &[f16], out: &mut [f32]) {
    let cols = out.len();
    for at in (0..cols).step_by(64) {
        let masks: [u16; 4] = std::array::from_fn(|part| {
            let left = cols.saturating_sub(at + 16 * part).min(16);
            ((1u32 << left) - 1) as u16
        });
        // SAFETY: the masks keep to what is there, in `out` and in each of the rows.
        unsafe {
            let out = out.as_mut_ptr().wrapping_add(at);
            let mut sums: [__m512; 4] = std::array::from_fn(|part| {
                _mm512_maskz_loadu_ps(masks[part], out.wrapping_add(16 * part))
            });
            for (t, weight) in weights.iter().enumerate() {
                let row = rows.as_ptr().cast::<u8>().wrapping_add(2 * (t * cols + at));
                let weight = _mm512_set1_ps(*weight);
                for (part, sum) in sums.iter_mut().enumerate() {
                    let value = floats::<F16>(row.wrapping_add(32 * part), 0, masks[part]);
                    *sum = _mm512_fmadd_ps(weight, value, *sum);
                }
            }
            for (part, sum) in sums.into_iter().enumerate() {
                _mm512_mask_storeu_ps(out.wrapping_add(16 * part), masks[part], sum);
            }
        }
    }
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

/// The two halves at `at`, in the lower lanes.
///
/// # Safety
/// Four bytes are there.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn half_pair(w: &[u8], at: usize) -> __m128 {
    // SAFETY: by the caller.
    let bits = unsafe { w.as_ptr().add(at).cast::<i32>().read_unaligned() };
    _mm_cvtph_ps(_mm_cvtsi32_si128(bits))
}

/// # Safety
/// 64 bytes are there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(from: *const u8) -> __m512i {
    // SAFETY: by the caller.
    unsafe { _mm512_loadu_si512(from.cast()) }
}

/// Asks for weights that come soon, before the hardware's own prefetch has learned the stream again on a new page.
#[inline]
#[target_feature(enable = "sse")]
fn prefetch(w: &[u8]) {
    const AHEAD: usize = 2048;
    for line in (0..w.len()).step_by(64) {
        // A prefetch of an address that is not mapped does nothing.
        _mm_prefetch::<_MM_HINT_T0>(w.as_ptr().wrapping_add(AHEAD + line).cast());
    }
}
