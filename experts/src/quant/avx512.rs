//! AVX-512 with VNNI: 64 quantised values an instruction; and AMX beside it, 16384 products an instruction.

pub(super) mod amx;
mod floats;
mod kv;
mod panel;
mod rows;
mod unpack;

use std::arch::x86_64::*;

use super::isa::Isa;
use super::tiles::float_tiles;
use super::{Kernels, Tile, TileFn, vq};
use floats::{BF16, F16, F32, float_dot, widen};
use rows::Eights;

pub(super) const KERNELS: Kernels = Kernels {
    name: "AVX-512 VNNI",
    isa: Isa::Avx512,
    f32: f32_tile,
    f16: f16_tile,
    bf16: bf16_tile,
    q8_0: quant_tile::<Blocks<false>>,
    q4_0: quant_tile::<Blocks<true>>,
    q4_k: quant_tile::<K<false>>,
    q5_k: quant_tile::<K<true>>,
    q6_k: quant_tile::<Q6K>,
    vq: vq::tile::<Q8>,
    widen,
    halves: kv::halves,
    pairs: kv::pairs,
};

pub(super) static AMX_KERNELS: Kernels = Kernels {
    name: "AVX-512 VNNI, AMX",
    isa: Isa::Amx,
    q4_k: amx::tile::<K<false>>,
    q5_k: amx::tile::<K<true>>,
    q6_k: amx::tile::<Q6K>,
    ..KERNELS
};

/// What unpacked codes are multiplied by.
struct Q8;

impl vq::Q8 for Q8 {
    const TILE: TileFn = quant_tile::<Blocks<false>>;
}

/// Q8_0, or Q4_0 where `NIBBLES`.
struct Blocks<const NIBBLES: bool>;

/// Q4_K, or Q5_K where `FIVE`.
struct K<const FIVE: bool>;

struct Q6K;

/// A float weight row is widened once for this many activation rows.
const BATCH: usize = 4;

float_tiles!("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni");

/// # Safety
/// See `TileFn`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn quant_tile<W: Eights>(tile: &Tile<'_>) {
    // SAFETY: `TileFn`'s conditions.
    unsafe {
        match tile.x {
            [x] if x.q.len() <= rows::MAX_COLS => rows::tile::<W>(tile, x),
            _ => panel::tile::<W>(tile),
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

/// The sum over each vector, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn across_512(v: [__m512i; 8]) -> __m256i {
    let by_2 = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let by_4 = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let low = by_4(by_2(v[0], v[1]), by_2(v[2], v[3]));
    let high = by_4(by_2(v[4], v[5]), by_2(v[6], v[7]));
    let even = _mm512_shuffle_i32x4::<0x88>(low, high);
    fold_128s(_mm512_add_epi32(even, _mm512_shuffle_i32x4::<0xdd>(low, high)))
}

/// The sums over the lower and the upper half of each vector, in order.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512vl")]
fn across_pairs(v: [__m512i; 4]) -> __m256i {
    let by_2 = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (a, b) = (by_2(v[0], v[1]), by_2(v[2], v[3]));
    let all = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    _mm256_permutevar8x32_epi32(fold_128s(all), order)
}

/// 128-bit parts 0 and 1 added up, then 2 and 3.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn fold_128s(v: __m512i) -> __m256i {
    let (even, odd) = (_mm512_shuffle_i32x4::<0x08>(v, v), _mm512_shuffle_i32x4::<0x0d>(v, v));
    _mm512_castsi512_si256(_mm512_add_epi32(even, odd))
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
fn half_shifts(lower: i16, upper: i16) -> __m512i {
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
