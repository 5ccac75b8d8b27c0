//! AVX2 with FMA and F16C: 32 quantised values an instruction.
//!
//! `maddubs` multiplies unsigned weights of up to 6 bits by signed activations and adds pairs, which fits in 16 bits;
//! `madd` multiplies by the sub-block's scale. Q8_0's weights do not fit that way and are widened to 16 bits first.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::blocks::{q4_0, q4_k, q5_k, q6_k, q8_0, scales_mins};
use super::isa::Isa;
use super::tiles::tile_functions;
use super::{ActRow, Kernels, Tile, TileFn, vq};

pub(super) static KERNELS: Kernels = Kernels {
    name: "AVX2",
    isa: Isa::Avx2,
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

/// A weight row is unpacked once for this many activation rows; more would spill 16 registers.
const BATCH: usize = 2;

tile_functions!("avx2,fma,f16c");

/// Q4_K, or Q5_K where `FIVE`.
///
/// # Safety
/// `x` holds as many Q8_K values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn k_dot<const FIVE: bool, const N: usize>(w: &[u8], x: &[ActRow<'_>; N]) -> [f32; N] {
    let (bytes, qs) = if FIVE { (q5_k::BYTES, q5_k::QS) } else { (q4_k::BYTES, q4_k::QS) };
    let pairs = _mm256_set_epi64x(
        0x0f0e_0f0e_0d0c_0d0c,
        0x0b0a_0b0a_0908_0908,
        0x0706_0706_0504_0504,
        0x0302_0302_0100_0100,
    );
    let nibble = _mm256_set1_epi8(0x0f);
    let mut sums = [_mm256_setzero_ps(); N];
    let mut minima = [_mm256_setzero_ps(); N];
    for (b, w) in w.chunks_exact(bytes).enumerate() {
        // SAFETY: within the block.
        let packed = unsafe { w.as_ptr().add(q4_k::SCALES).cast::<[u8; 12]>().read() };
        let both = in_16_bits(scales_mins(packed));
        let scales = _mm256_permute4x64_epi64::<0x44>(both);
        let mins = _mm256_shuffle_epi8(_mm256_permute4x64_epi64::<0xee>(both), pairs);
        let mut ints = [_mm256_setzero_si256(); N];
        for chunk in 0..4 {
            // SAFETY: within the block.
            let q = unsafe { load(w.as_ptr().add(qs + 32 * chunk)) };
            let mut low = _mm256_and_si256(q, nibble);
            let mut high = _mm256_and_si256(_mm256_srli_epi16::<4>(q), nibble);
            if FIVE {
                // SAFETY: within the block.
                let fifth = unsafe { load(w.as_ptr().add(q5_k::QH)) };
                low = _mm256_or_si256(low, bits_at_4(fifth, 2 * chunk, 1));
                high = _mm256_or_si256(high, bits_at_4(fifth, 2 * chunk + 1, 1));
            }
            let scale = |j: usize| {
                let lane = (((2 * j + 1) << 8) | (2 * j)) as i16;
                _mm256_shuffle_epi8(scales, _mm256_set1_epi16(lane))
            };
            let (low_scale, high_scale) = (scale(2 * chunk), scale(2 * chunk + 1));
            for n in 0..N {
                // SAFETY: `x` has 256 values for each block.
                let (a, c) = unsafe {
                    let q = x[n].q.as_ptr().add(256 * b + 64 * chunk).cast::<u8>();
                    (load(q), load(q.add(32)))
                };
                let low = _mm256_madd_epi16(_mm256_maddubs_epi16(low, a), low_scale);
                let high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, c), high_scale);
                ints[n] = _mm256_add_epi32(ints[n], _mm256_add_epi32(low, high));
            }
        }
        for n in 0..N {
            // SAFETY: `x` has a scale and 16 sums for each block.
            let (d, sums_16) = unsafe {
                let d = _mm_mul_ps(half_pair(w.as_ptr()), _mm_set1_ps(*x[n].d.get_unchecked(b)));
                (d, load(x[n].sums.as_ptr().add(16 * b).cast()))
            };
            let (d, dmin) = (_mm256_broadcastss_ps(d), _mm256_broadcastss_ps(_mm_movehdup_ps(d)));
            let minimum = _mm256_cvtepi32_ps(_mm256_madd_epi16(mins, sums_16));
            sums[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(ints[n]), d, sums[n]);
            minima[n] = _mm256_fmadd_ps(minimum, dmin, minima[n]);
        }
    }
    for n in 0..N {
        sums[n] = _mm256_sub_ps(sums[n], minima[n]);
    }
    totals(sums)
}

/// Q6_K.
///
/// # Safety
/// `x` holds as many Q8_K values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q6_k_dot<const N: usize>(w: &[u8], x: &[ActRow<'_>; N]) -> [f32; N] {
    let nibble = _mm256_set1_epi8(0x0f);
    let mut sums = [_mm256_setzero_ps(); N];
    for (b, w) in w.chunks_exact(q6_k::BYTES).enumerate() {
        let scale = |i: usize| _mm_set1_epi16(i16::from(w[q6_k::SCALES + i] as i8));
        let mut ints = [_mm256_setzero_si256(); N];
        for half in 0..2 {
            // SAFETY: within the block.
            let (q, r, pairs) = unsafe {
                let q = w.as_ptr().add(64 * half);
                (load(q), load(q.add(32)), load(w.as_ptr().add(q6_k::QH + 32 * half)))
            };
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
                for n in 0..N {
                    // SAFETY: `x` has 256 values for each block.
                    let a = unsafe { load(x[n].q.as_ptr().add(256 * b + 32 * j).cast()) };
                    let dots = _mm256_madd_epi16(_mm256_maddubs_epi16(q, a), scales);
                    ints[n] = _mm256_add_epi32(ints[n], dots);
                }
            }
        }
        // SAFETY: 16 scales within the block.
        let scales = unsafe { _mm_loadu_si128(w.as_ptr().add(q6_k::SCALES).cast()) };
        let scales = _mm256_cvtepi8_epi16(scales);
        for n in 0..N {
            // SAFETY: `x` has a scale and 16 sums for each block; the pair ends with the block.
            let (d, sums_16) = unsafe {
                let d = _mm_movehdup_ps(half_pair(w.as_ptr().add(q6_k::D - 2)));
                let d = _mm_mul_ps(d, _mm_set1_ps(*x[n].d.get_unchecked(b)));
                (d, load(x[n].sums.as_ptr().add(16 * b).cast()))
            };
            let offset = _mm256_slli_epi32::<5>(_mm256_madd_epi16(scales, sums_16));
            let ints = _mm256_cvtepi32_ps(_mm256_sub_epi32(ints[n], offset));
            sums[n] = _mm256_fmadd_ps(ints, _mm256_broadcastss_ps(d), sums[n]);
        }
    }
    totals(sums)
}

/// Q8_0, or Q4_0 where `NIBBLES`.
///
/// # Safety
/// `x` holds as many Q8_0 values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block_dot<const NIBBLES: bool, const N: usize>(
    w: &[u8],
    x: &[ActRow<'_>; N],
) -> [f32; N] {
    let bytes = if NIBBLES { q4_0::BYTES } else { q8_0::BYTES };
    let mut sums = [_mm256_setzero_ps(); N];
    for (b, w) in w.chunks_exact(bytes).enumerate() {
        // SAFETY: within the block.
        let [first, second] = unsafe { widened::<NIBBLES>(w.as_ptr()) };
        for n in 0..N {
            // SAFETY: `x` has 32 values and a scale for each block.
            let (a, c, d) = unsafe {
                let q = x[n].q.as_ptr().add(32 * b).cast::<u8>();
                (
                    widen(q),
                    widen(q.add(16)),
                    _mm_mul_ps(half_pair(w.as_ptr()), _mm_set1_ps(*x[n].d.get_unchecked(b))),
                )
            };
            let ints = _mm256_add_epi32(_mm256_madd_epi16(first, a), _mm256_madd_epi16(second, c));
            sums[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(ints), _mm256_broadcastss_ps(d), sums[n]);
        }
    }
    totals(sums)
}

/// A block's values in 16 bits each.
///
/// # Safety
/// A block is at `w`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widened<const NIBBLES: bool>(w: *const u8) -> [__m256i; 2] {
    // SAFETY: by the caller.
    unsafe {
        if NIBBLES {
            let q = _mm_loadu_si128(w.add(q4_0::QS).cast());
            let nibble = _mm_set1_epi8(0x0f);
            let high = _mm_srli_epi16::<4>(q);
            let low = _mm256_cvtepu8_epi16(_mm_and_si128(q, nibble));
            let high = _mm256_cvtepu8_epi16(_mm_and_si128(high, nibble));
            let offset = _mm256_set1_epi16(8);
            [_mm256_sub_epi16(low, offset), _mm256_sub_epi16(high, offset)]
        } else {
            [widen(w.add(q8_0::QS)), widen(w.add(q8_0::QS + 16))]
        }
    }
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

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// F32, F16 or BF16 weights, `TYPE` says which.
///
/// # Safety
/// `x` holds as many f32 values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float_dot<const TYPE: u8, const N: usize>(w: &[u8], x: &[ActRow<'_>; N]) -> [f32; N] {
    let bytes = if TYPE == F32 { 4 } else { 2 };
    let cols = w.len() / bytes;
    let mut sums = [[_mm256_setzero_ps(); 4]; N];
    for (i, w) in w.chunks_exact(8 * bytes).enumerate() {
        // SAFETY: 8 values are left in `w` and `x`.
        unsafe {
            let w = floats::<TYPE>(w.as_ptr());
            for n in 0..N {
                let x = _mm256_loadu_ps(x[n].values.as_ptr().add(8 * i));
                sums[n][i % 4] = _mm256_fmadd_ps(w, x, sums[n][i % 4]);
            }
        }
    }
    let mut whole = [_mm256_setzero_ps(); N];
    for n in 0..N {
        let [a, b, c, d] = sums[n];
        whole[n] = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
    }
    let mut totals = totals(whole);
    for i in cols / 8 * 8..cols {
        let low = [w[i * bytes], w[i * bytes + 1]];
        let weight = match TYPE {
            F32 => f32::from_le_bytes([low[0], low[1], w[4 * i + 2], w[4 * i + 3]]),
            F16 => f16::from_le_bytes(low).to_f32(),
            _ => bf16::from_le_bytes(low).to_f32(),
        };
        for n in 0..N {
            totals[n] += weight * x[n].values[i];
        }
    }
    totals
}

/// 8 weights.
///
/// # Safety
/// They are at `w`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn floats<const TYPE: u8>(w: *const u8) -> __m256 {
    // SAFETY: by the caller.
    unsafe {
        match TYPE {
            F32 => _mm256_loadu_ps(w.cast()),
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(w.cast())),
            _ => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(w.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
    }
}

/// # Safety
/// See `BlendFn`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn blend_f16(weights: &[f32], rows: &[f16], out: &mut [f32]) {
    let cols = out.len();
    let (parts, rest) = out.as_chunks_mut::<32>();
    let first_rest = 32 * parts.len();
    for (i, out) in parts.iter_mut().enumerate() {
        // SAFETY: 32 values are left in `out` and in each of the rows.
        unsafe {
            let mut sums = [_mm256_setzero_ps(); 4];
            for (part, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(out.as_ptr().add(8 * part));
            }
            for (t, weight) in weights.iter().enumerate() {
                let row = rows.as_ptr().add(t * cols + 32 * i);
                let weight = _mm256_set1_ps(*weight);
                for (part, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm256_fmadd_ps(weight, floats::<F16>(row.add(8 * part).cast()), *sum);
                }
            }
            for (part, sum) in sums.into_iter().enumerate() {
                _mm256_storeu_ps(out.as_mut_ptr().add(8 * part), sum);
            }
        }
    }
    for (i, out) in rest.iter_mut().enumerate() {
        for (t, weight) in weights.iter().enumerate() {
            *out += weight * rows[t * cols + first_rest + i].to_f32();
        }
    }
}

/// Bits `from` and up of each byte, those of `mask`, moved to bit 4 and up.
#[inline]
#[target_feature(enable = "avx2")]
fn bits_at_4(q: __m256i, from: usize, mask: i8) -> __m256i {
    let bits = _mm256_srl_epi16(q, _mm_cvtsi32_si128(from as i32));
    _mm256_slli_epi16::<4>(_mm256_and_si256(bits, _mm256_set1_epi8(mask)))
}

/// The sum of each vector. Not a closure for `map`: one would not be inlined there, and sums that go through memory
/// hold up the next row's loads.
#[inline]
#[target_feature(enable = "avx2")]
fn totals<const N: usize>(sums: [__m256; N]) -> [f32; N] {
    let mut totals = [0.0; N];
    for n in 0..N {
        let x = _mm256_castps256_ps128(sums[n]);
        let x = _mm_add_ps(x, _mm256_extractf128_ps::<1>(sums[n]));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        totals[n] = _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }
    totals
}

/// Eight scales and eight minima, 16 bits each.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn in_16_bits([scales, mins]: [u64; 2]) -> __m256i {
    _mm256_cvtepu8_epi16(_mm_set_epi64x(mins as i64, scales as i64))
}

/// Two halves, in the lower lanes.
///
/// # Safety
/// Four bytes are there.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn half_pair(at: *const u8) -> __m128 {
    // SAFETY: by the caller.
    let bits = unsafe { at.cast::<i32>().read_unaligned() };
    _mm_cvtph_ps(_mm_cvtsi32_si128(bits))
}

/// # Safety
/// 32 bytes are there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(from: *const u8) -> __m256i {
    // SAFETY: by the caller.
    unsafe { _mm256_loadu_si256(from.cast()) }
}
