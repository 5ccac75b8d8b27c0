//! AVX2 with FMA and F16C, and with AVX-VNNI where it is: 32 quantised values an instruction.

mod dot;
mod floats;
mod kv;
mod panel;
mod rows;
mod unpack;

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::isa::Isa;
use super::sums::LANES;
use super::tiles::float_tiles;
use super::{Kernels, Tile, TileFn, vq};
use dot::{Dot, Pairs, Vnni};
use floats::{BF16, F16, F32, float_dot, widen};
use rows::Row;
use unpack::Unpack;

pub(super) static KERNELS: Kernels = kernels::<Pairs>("AVX2", Isa::Avx2);
pub(super) static VNNI_KERNELS: Kernels = kernels::<Vnni>("AVX2 VNNI", Isa::Avx2Vnni);

const fn kernels<D: Dot>(name: &'static str, isa: Isa) -> Kernels {
    Kernels {
        name,
        isa,
        f32: f32_tile,
        f16: f16_tile,
        bf16: bf16_tile,
        q8_0: quant_tile::<Blocks<false>, D>,
        q4_0: quant_tile::<Blocks<true>, D>,
        q4_k: quant_tile::<K<false>, D>,
        q5_k: quant_tile::<K<true>, D>,
        q6_k: quant_tile::<Q6K, D>,
        vq: vq::tile::<Q8<D>>,
        widen,
        halves: kv::halves,
        pairs: kv::pairs,
    }
}

/// What unpacked codes are multiplied by.
struct Q8<D>(PhantomData<D>);

impl<D: Dot> vq::Q8 for Q8<D> {
    const TILE: TileFn = quant_tile::<Blocks<false>, D>;
}

/// Q8_0, or Q4_0 where `NIBBLES`.
struct Blocks<const NIBBLES: bool>;

/// Q4_K, or Q5_K where `FIVE`.
struct K<const FIVE: bool>;

struct Q6K;

/// A float weight row is widened once for this many activation rows; more would spill 16 registers.
const BATCH: usize = 2;

float_tiles!("avx2,fma,f16c");

/// # Safety
/// See `TileFn`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quant_tile<W: Row + Unpack, D: Dot>(tile: &Tile<'_>) {
    // SAFETY: `TileFn`'s conditions.
    unsafe {
        // Unpacking by nibbles does not pay for two rows.
        if tile.x.len() > W::planes::<D>() {
            return panel::tile::<W, D>(tile);
        }
        for r in 0..tile.rows {
            for (i, x) in tile.x.iter().enumerate() {
                tile.store(i, r, [W::dot::<D>(tile.row(r), x)]);
            }
        }
    }
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

/// Asks for weights that come soon, as far behind those at `w`: the hardware's own prefetch stops at the end of each page, and
/// on some processors one core's alone brings half of what it could read.
#[inline]
#[target_feature(enable = "sse")]
pub(super) fn prefetch(w: *const u8, len: usize) {
    const AHEAD: usize = 8192;
    for line in (0..len).step_by(64) {
        // A prefetch of an address that is not mapped does nothing.
        _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD + line).cast());
    }
}

/// # Safety
/// 32 bytes are there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(from: *const u8) -> __m256i {
    // SAFETY: by the caller.
    unsafe { _mm256_loadu_si256(from.cast()) }
}
