//! AVX2 with FMA and F16C: 32 quantised values an instruction.
//!
//! `maddubs` multiplies unsigned weights of up to 6 bits by signed activations and adds pairs, which fits in 16 bits;
//! `madd` multiplies by the sub-block's scale. Q8_0's weights do not fit that way and are widened to 16 bits first.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::blocks::{q4_0, q4_k, q5_k, q6_k, q8_0};
use super::isa::Isa;
use super::sums::LANES;
use super::tiles::{float_tiles, quant_tiles};
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

/// A float weight row is widened once for this many activation rows; more would spill 16 registers.
const BATCH: usize = 2;

float_tiles!("avx2,fma,f16c");
quant_tiles!(
    "avx2,fma,f16c",
    q8_0_tile: block_dot::<false>;
    q4_0_tile: block_dot::<true>;
    q4_k_tile: k_dot::<false>;
    q5_k_tile: k_dot::<true>;
    q6_k_tile: q6_k_dot;
);

/// Q4_K, or Q5_K where `FIVE`.
///
/// # Safety
/// `x` holds as many Q8_K values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn k_dot<const FIVE: bool>(w: &[u8], x: &ActRow<'_>) -> f32 {
    let bytes = if FIVE { q5_k::BYTES } else { q4_k::BYTES };
    let mut sums = _mm256_setzero_ps();
    for (e, eight) in w.chunks(LANES * bytes).enumerate() {
        let mut scaled = [_mm256_setzero_si256(); LANES];
        let mut minima = [_mm256_setzero_si256(); LANES];
        let (mut d, mut dmin) = ([0u16; LANES], [0u16; LANES]);
        for (i, w) in eight.chunks_exact(bytes).enumerate() {
            let b = LANES * e + i;
            // SAFETY: within the block, and `x` has 256 values and 16 sums for it.
            unsafe {
                let both = k_scales(w.as_ptr());
                scaled[i] = k_block::<FIVE>(w.as_ptr(), x.q.as_ptr().add(256 * b).cast(), both);
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

/// The lanes' parts of `sum over sub-blocks of scale * (w · x)`; `scales` as [`k_scales`] gives them.
///
/// # Safety
/// A block is at `w`, 256 values at `x`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn k_block<const FIVE: bool>(w: *const u8, x: *const u8, scales: __m256i) -> __m256i {
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
            let low = _mm256_madd_epi16(_mm256_maddubs_epi16(low, load(x)), scale(2 * chunk));
            let high = _mm256_maddubs_epi16(high, load(x.add(32)));
            let high = _mm256_madd_epi16(high, scale(2 * chunk + 1));
            ints = _mm256_add_epi32(ints, _mm256_add_epi32(low, high));
        }
    }
    ints
}

/// Q6_K.
///
/// # Safety
/// `x` holds as many Q8_K values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q6_k_dot(w: &[u8], x: &ActRow<'_>) -> f32 {
    let mut sums = _mm256_setzero_ps();
    for (e, eight) in w.chunks(LANES * q6_k::BYTES).enumerate() {
        let mut scaled = [_mm256_setzero_si256(); LANES];
        let mut d = [0u16; LANES];
        for (i, w) in eight.chunks_exact(q6_k::BYTES).enumerate() {
            let b = LANES * e + i;
            // SAFETY: within the block, and `x` has 256 values and 16 sums for it.
            unsafe {
                let scales = _mm_loadu_si128(w.as_ptr().add(q6_k::SCALES).cast());
                let sums_16 = load(x.sums.as_ptr().add(16 * b).cast());
                // Weights are stored +32.
                let offset = _mm256_madd_epi16(_mm256_cvtepi8_epi16(scales), sums_16);
                let ints = q6_k_block(w, x.q.as_ptr().add(256 * b).cast());
                scaled[i] = _mm256_sub_epi32(ints, _mm256_slli_epi32::<5>(offset));
            }
            d[i] = u16::from_le_bytes([w[q6_k::D], w[q6_k::D + 1]]);
        }
        sums = term(across(scaled), _mm256_mul_ps(halves(d), scales(x, e)), sums);
    }
    total(sums)
}

/// The lanes' parts of `sum over sub-blocks of scale * (w · x)`, with the weights' offset.
///
/// # Safety
/// `w` is a block, 256 values are at `x`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn q6_k_block(w: &[u8], x: *const u8) -> __m256i {
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
                ints = _mm256_add_epi32(ints, _mm256_madd_epi16(products, scales));
            }
        }
    }
    ints
}

/// Q8_0, or Q4_0 where `NIBBLES`.
///
/// # Safety
/// `x` holds as many Q8_0 values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block_dot<const NIBBLES: bool>(w: &[u8], x: &ActRow<'_>) -> f32 {
    let bytes = if NIBBLES { q4_0::BYTES } else { q8_0::BYTES };
    let mut sums = _mm256_setzero_ps();
    for (e, eight) in w.chunks(LANES * bytes).enumerate() {
        let mut ints = [_mm256_setzero_si256(); LANES];
        let mut d = [0u16; LANES];
        for (i, w) in eight.chunks_exact(bytes).enumerate() {
            // SAFETY: within the block, and `x` has 32 values for it.
            unsafe {
                let [first, second] = widened::<NIBBLES>(w.as_ptr());
                let x = x.q.as_ptr().add(32 * (LANES * e + i)).cast::<u8>();
                let second = _mm256_madd_epi16(second, widen(x.add(16)));
                ints[i] = _mm256_add_epi32(_mm256_madd_epi16(first, widen(x)), second);
            }
            d[i] = u16::from_le_bytes([w[0], w[1]]);
        }
        sums = term(across(ints), _mm256_mul_ps(halves(d), scales(x, e)), sums);
    }
    total(sums)
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

/// `sums + integers * scales`, a block a lane.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn term(integers: __m256i, scales: __m256, sums: __m256) -> __m256 {
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(integers), scales, sums)
}

/// The sum over each vector, in order.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn across(v: [__m256i; LANES]) -> __m256i {
    let by_2 = |a, b| _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let by_4 = |a, b| _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    let low = by_4(by_2(v[0], v[1]), by_2(v[2], v[3]));
    let high = by_4(by_2(v[4], v[5]), by_2(v[6], v[7]));
    let parts = _mm256_permute2x128_si256::<0x20>(low, high);
    _mm256_add_epi32(parts, _mm256_permute2x128_si256::<0x31>(low, high))
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
    let mut totals = [0.0; N];
    for n in 0..N {
        let [a, b, c, d] = sums[n];
        totals[n] = total(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
    }
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

/// The sum over a vector, by halves.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn total(v: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

/// Scales and minima of a block of Q4_K or Q5_K in 16 bits: scales 0 to 3, minima 0 to 3, scales 4 to 7, minima 4 to 7.
/// The masks of ggml's `ggml_vec_dot_q4_K_q8_K`, on all words at once.
///
/// # Safety
/// A block is at `w`.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn k_scales(w: *const u8) -> __m256i {
    // SAFETY: by the caller; the packed scales end the first 16 bytes.
    let head = unsafe { _mm_loadu_si128(w.cast()) };
    let low =
        _mm_shuffle_epi8(head, _mm_set_epi32(0x0f0e_0d0c, 0x0f0e_0d0c, 0x0b0a_0908, 0x0706_0504));
    let low = _mm_srlv_epi32(low, _mm_set_epi32(4, 0, 0, 0));
    let low = _mm_and_si128(low, _mm_set_epi64x(0x0f0f_0f0f_0f0f_0f0f, 0x3f3f_3f3f_3f3f_3f3f));
    // The upper two bits of the second halves are above the first halves.
    let high = _mm_shuffle_epi8(head, _mm_set_epi32(0x0b0a_0908, 0x0706_0504, -1, -1));
    let high = _mm_and_si128(_mm_srli_epi32::<2>(high), _mm_set1_epi8(0x30));
    _mm256_cvtepu8_epi16(_mm_or_si128(low, high))
}

/// The lanes' parts of `sum over sub-blocks of minimum * sum`, of [`k_scales`] and the sums over 16 values.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn k_minima(scales: __m256i, sums_16: __m256i) -> __m256i {
    let pairs = _mm_set_epi64x(0x0f0e_0f0e_0d0c_0d0c, 0x0b0a_0b0a_0908_0908);
    let mins = _mm256_shuffle_epi8(scales, _mm256_broadcastsi128_si256(pairs));
    _mm256_madd_epi16(mins, sums_16)
}

/// # Safety
/// 32 bytes are there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(from: *const u8) -> __m256i {
    // SAFETY: by the caller.
    unsafe { _mm256_loadu_si256(from.cast()) }
}
