//! One activation row: weights are unpacked in registers as they stream by.
//!
//! `dpbusd` multiplies unsigned weights by signed activations and adds four products to an i32, which for weights of
//! up to 6 bits fits in 16; `dpwssd` then multiplies that by the sub-block's scale and accumulates. Signed weights
//! are made unsigned by an offset, which the activations' sums take back, all in integers.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::unpack::Unpack;
use super::{Blocks, K, Q6K, across_512, across_pairs, half_shifts, load, or_bits};
use crate::quant::avx2::{across, k_minima, k_scales, prefetch, term, total};
use crate::quant::blocks::{q4_0, q4_k, q5_k, q6_k, q8_0};
use crate::quant::sums::LANES;
use crate::quant::{ActRow, Tile};

/// Values of the longest row that is multiplied here.
pub(super) const MAX_COLS: usize = 32 << 10;

/// A weight type by eight blocks, or what is left of a row.
pub(super) trait Eights: Unpack {
    /// Activations are wanted as [`paired`] orders them.
    const PAIRED: bool = false;

    /// Adds `COUNT` blocks from `first` to the sums, each in a lane of its own. The compiler knows the count, so that
    /// everything stays in registers.
    ///
    /// # Safety
    /// `w` has them, `x` their values, scales and sums, and the machine the instructions.
    unsafe fn add<const COUNT: usize>(
        w: *const u8,
        x: &ActRow<'_>,
        first: usize,
        sums: __m256,
    ) -> __m256;
}

/// A tile of the one activation row `x`, of up to [`MAX_COLS`] values.
///
/// # Safety
/// See `TileFn`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn tile<E: Eights>(tile: &Tile<'_>, x: &ActRow<'_>) {
    let mut room = [const { MaybeUninit::uninit() }; MAX_COLS / 128];
    let x = ActRow { q: if E::PAIRED { paired(x.q, &mut room) } else { x.q }, ..*x };
    for r in 0..tile.rows {
        // SAFETY: `TileFn`'s conditions.
        unsafe { tile.store(0, r, [dot::<E>(tile.row(r), &x)]) };
    }
}

/// 128 activations, in whole cache lines.
#[repr(align(64))]
struct Chunk(#[expect(dead_code, reason = "read as bytes")] [[i8; 32]; 4]);

/// Of each 128 values the first 32, the third, the second and the last: 64 that the low nibbles of 64 bytes of a K block
/// belong to, then those of the high ones.
fn paired<'a>(q: &[i8], room: &'a mut [MaybeUninit<Chunk>]) -> &'a [i8] {
    let (chunks, _) = q.as_chunks::<128>();
    for (chunk, to) in chunks.iter().zip(&mut *room) {
        if let [a, b, c, d] = *chunk.as_chunks().0 {
            to.write(Chunk([a, c, b, d]));
        }
    }
    // SAFETY: these values were just written, so far as there is room.
    unsafe { std::slice::from_raw_parts(room.as_ptr().cast(), 128 * chunks.len().min(room.len())) }
}

/// `w · x`.
///
/// # Safety
/// `x` holds as many values in the type's format as `w` has, in the order that `E` wants.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn dot<E: Eights>(w: &[u8], x: &ActRow<'_>) -> f32 {
    let blocks = w.len() / E::BYTES;
    let rest = blocks / LANES * LANES;
    let mut sums = _mm256_setzero_ps();
    // SAFETY: by the caller, for the blocks that there are.
    unsafe {
        for first in (0..rest).step_by(LANES) {
            sums = E::add::<LANES>(w.as_ptr().add(first * E::BYTES), x, first, sums);
        }
        let w = w.as_ptr().add(rest * E::BYTES);
        sums = match blocks - rest {
            0 => sums,
            1 => E::add::<1>(w, x, rest, sums),
            2 => E::add::<2>(w, x, rest, sums),
            3 => E::add::<3>(w, x, rest, sums),
            4 => E::add::<4>(w, x, rest, sums),
            5 => E::add::<5>(w, x, rest, sums),
            6 => E::add::<6>(w, x, rest, sums),
            _ => E::add::<7>(w, x, rest, sums),
        };
    }
    total(sums)
}

impl<const FIVE: bool> Eights for K<FIVE> {
    const PAIRED: bool = true;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[allow(clippy::needless_range_loop)]
    unsafe fn add<const COUNT: usize>(
        w: *const u8,
        x: &ActRow<'_>,
        first: usize,
        sums: __m256,
    ) -> __m256 {
        let mut scaled = [_mm512_setzero_si512(); LANES];
        let mut minima = [_mm256_setzero_si256(); LANES];
        // SAFETY: by the caller.
        unsafe {
            for i in 0..COUNT {
                let w = w.add(i * Self::BYTES);
                prefetch(w, Self::BYTES);
                let both = k_scales(w);
                scaled[i] = k_block::<FIVE>(w, x.q.as_ptr().add(256 * (first + i)), both);
                let sums_16 = _mm256_loadu_si256(x.sums.as_ptr().add(16 * (first + i)).cast());
                minima[i] = k_minima(both, sums_16);
            }
            // Straight from the blocks: a vector that is loaded after scalar stores waits for them.
            let d = |i: usize| match i < COUNT {
                true => w.add(i * Self::BYTES).cast::<i32>().read_unaligned(),
                false => 0,
            };
            let d = _mm256_set_epi32(d(7), d(6), d(5), d(4), d(3), d(2), d(1), d(0));
            let dmin = _mm256_cvtph_ps(_mm256_cvtepi32_epi16(_mm256_srli_epi32::<16>(d)));
            let d = _mm256_cvtph_ps(_mm256_cvtepi32_epi16(d));
            let x_d = scales(x, first, COUNT);
            let sums = term(across_512(scaled), _mm256_mul_ps(d, x_d), sums);
            let minima = _mm256_cvtepi32_ps(across(minima));
            _mm256_fnmadd_ps(minima, _mm256_mul_ps(dmin, x_d), sums)
        }
    }
}

/// The lanes' parts of `sum over sub-blocks of scale * (w · x)`; `scales` as [`k_scales`] gives them.
///
/// # Safety
/// A block is at `w`, 256 values at `x`, as [`paired`] orders them.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn k_block<const FIVE: bool>(w: *const u8, x: *const i8, scales: __m256i) -> __m512i {
    let qs = if FIVE { q5_k::QS } else { q4_k::QS };
    let nibble = _mm512_set1_epi8(0x0f);
    // Of `scales`, what each 16-bit lane of `both` below takes: four times one for low nibbles, four times one for high.
    let pairs = |a: i16, b: i16| _mm_set_epi16(b, b, b, b, a, a, a, a);
    let lanes = _mm512_inserti64x4::<1>(
        _mm512_castsi256_si512(_mm256_broadcastsi128_si256(pairs(0, 1))),
        _mm256_broadcastsi128_si256(pairs(2, 3)),
    );
    let scales = _mm512_castsi256_si512(scales);
    let mut ints = _mm512_setzero_si512();
    for half in 0..2 {
        // SAFETY: by the caller.
        unsafe {
            // Two chunks: their low nibbles are sub-blocks 0 and 2 of this half, their high ones 1 and 3.
            let q = load(w.add(qs + 64 * half));
            let mut low = _mm512_and_si512(q, nibble);
            let mut high = _mm512_and_si512(_mm512_srli_epi16::<4>(q), nibble);
            if FIVE {
                let fifth = w.add(q5_k::QH);
                let fifth = _mm512_broadcast_i64x4(_mm256_loadu_si256(fifth.cast()));
                let fifth = if half == 0 { fifth } else { _mm512_srli_epi16::<4>(fifth) };
                low = or_bits(low, _mm512_sllv_epi16(fifth, half_shifts(4, 2)), 0x10);
                high = or_bits(high, _mm512_sllv_epi16(fifth, half_shifts(3, 1)), 0x10);
            }
            let x = x.cast::<u8>().add(128 * half);
            let (low, high) = (products(low, load(x)), products(high, load(x.add(64))));
            // Four products of five bits and eight fit in 16: one multiplication by scales for both.
            let both = _mm512_packs_epi32(low, high);
            let lanes = _mm512_add_epi16(lanes, _mm512_set1_epi16(8 * half as i16));
            let scales = _mm512_permutexvar_epi16(lanes, scales);
            ints = _mm512_dpwssd_epi32(ints, both, scales);
        }
    }
    ints
}

impl Eights for Q6K {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[allow(clippy::needless_range_loop)]
    unsafe fn add<const COUNT: usize>(
        w: *const u8,
        x: &ActRow<'_>,
        first: usize,
        sums: __m256,
    ) -> __m256 {
        let mut scaled = [_mm512_setzero_si512(); LANES];
        // SAFETY: by the caller.
        unsafe {
            for i in 0..COUNT {
                let w = w.add(i * Self::BYTES);
                prefetch(w, q6_k::BYTES);
                let at = 256 * (first + i);
                scaled[i] = q6_k_block(w, x.q.as_ptr().add(at), x.sums.as_ptr().add(at / 16));
            }
            let d = _mm256_mul_ps(
                halves::<COUNT>(w.add(q6_k::D), Self::BYTES),
                scales(x, first, COUNT),
            );
            term(across_512(scaled), d, sums)
        }
    }
}

/// The lanes' parts of `sum over sub-blocks of scale * (w · x)`.
///
/// # Safety
/// A block is at `w`, 256 values at `x`, their 16 sums at `sums`.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn q6_k_block(w: *const u8, x: *const i8, sums: *const i16) -> __m512i {
    let nibble = _mm512_set1_epi8(0x0f);
    // Four scales for 64 values: 128 bits each.
    let lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    // SAFETY: by the caller.
    unsafe {
        let scales_16 = _mm256_cvtepi8_epi16(_mm_loadu_si128(w.add(q6_k::SCALES).cast()));
        let scales_32 = _mm512_cvtepu16_epi32(scales_16);
        let mut ints = _mm512_setzero_si512();
        for half in 0..2 {
            let low_lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(8 * half as i32));
            let high_lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(8 * half as i32 + 4));
            let q = load(w.add(64 * half));
            let pairs = _mm256_loadu_si256(w.add(q6_k::QH + 32 * half).cast());
            let pairs = _mm512_broadcast_i64x4(pairs);
            let low = _mm512_and_si512(q, nibble);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(q), nibble);
            let low = or_bits(low, _mm512_sllv_epi16(pairs, half_shifts(4, 2)), 0x30);
            let high = or_bits(high, _mm512_srlv_epi16(pairs, half_shifts(0, 2)), 0x30);
            let low_scales = _mm512_permutexvar_epi32(low_lanes, scales_32);
            let high_scales = _mm512_permutexvar_epi32(high_lanes, scales_32);
            let x = x.cast::<u8>().add(128 * half);
            ints = _mm512_dpwssd_epi32(ints, products(low, load(x)), low_scales);
            ints = _mm512_dpwssd_epi32(ints, products(high, load(x.add(64))), high_scales);
        }
        // Weights are stored +32.
        let offset = _mm256_madd_epi16(scales_16, _mm256_loadu_si256(sums.cast()));
        let offset = _mm256_slli_epi32::<5>(offset);
        _mm512_sub_epi32(ints, _mm512_zextsi256_si512(offset))
    }
}

impl<const NIBBLES: bool> Eights for Blocks<NIBBLES> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[allow(clippy::needless_range_loop)]
    unsafe fn add<const COUNT: usize>(
        w: *const u8,
        x: &ActRow<'_>,
        first: usize,
        sums: __m256,
    ) -> __m256 {
        let bytes = Self::BYTES;
        let offset = _mm512_set1_epi8(if NIBBLES { 8 } else { -128 });
        let mut ints = [_mm512_setzero_si512(); LANES / 2];
        prefetch(w, COUNT * bytes);
        // SAFETY: by the caller.
        unsafe {
            let x_q = x.q.as_ptr().cast::<u8>().add(32 * first);
            for pair in 0..COUNT / 2 {
                let q = block_pair::<NIBBLES>(w.add(2 * pair * bytes), bytes);
                let a = load(x_q.add(64 * pair));
                ints[pair] = _mm512_sub_epi32(products(q, a), products(offset, a));
            }
            if COUNT % 2 == 1 {
                let q = _mm512_zextsi256_si512(block::<NIBBLES>(w.add((COUNT - 1) * bytes)));
                let a =
                    _mm512_zextsi256_si512(_mm256_loadu_si256(x_q.add(32 * (COUNT - 1)).cast()));
                ints[COUNT / 2] = _mm512_sub_epi32(products(q, a), products(offset, a));
            }
            let d = _mm256_mul_ps(halves::<COUNT>(w, bytes), scales(x, first, COUNT));
            term(across_pairs(ints), d, sums)
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

/// The f16 at the beginning of `COUNT` blocks, then zeros.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn halves<const COUNT: usize>(w: *const u8, bytes: usize) -> __m256 {
    let d = |i: usize| match i < COUNT {
        // SAFETY: by the caller.
        true => unsafe { w.add(i * bytes).cast::<i16>().read_unaligned() },
        false => 0,
    };
    _mm256_cvtph_ps(_mm_set_epi16(d(7), d(6), d(5), d(4), d(3), d(2), d(1), d(0)))
}

/// The scales of blocks `first..first + count`, then zeros.
///
/// # Safety
/// `x` has them.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn scales(x: &ActRow<'_>, first: usize, count: usize) -> __m256 {
    // SAFETY: by the caller; the mask leaves out what is not there.
    unsafe { _mm256_maskz_loadu_ps(0xff >> (LANES - count), x.d.as_ptr().add(first)) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn products(w: __m512i, x: __m512i) -> __m512i {
    _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, x)
}
