//! Several activation rows: 16 weight rows are unpacked once, a lane each, and multiplied with all of them.
//!
//! A vector holds four values of each of 8 weight rows and is multiplied with four broadcast activations, so that
//! nothing is ever summed across lanes. Four activation rows by 16 weight rows are what fits the registers.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::dot::Dot;
use super::load;
use super::unpack::{ROWS, Unpack};
use crate::quant::source::Source;
use crate::quant::sums::LANES;
use crate::quant::{ActRow, MAX_TILE_ROWS, Tile, filled};

/// Activation rows that are multiplied together.
const BATCH: usize = 4;
/// Values that are unpacked at a time.
const STEP: usize = 256;

/// 256 values of each of [`ROWS`] weight rows.
#[repr(C, align(64))]
pub(super) struct Panel {
    /// Values, unsigned: `[value / 4][row][value % 4]`. Of a block that is in two planes, the lower nibbles of all its
    /// values and then the upper ones.
    pub(super) values: [[u8; 4 * ROWS]; 2 * STEP / 4],
    /// Each sub-block's integer scale, as [`Dot::scale`] gives it.
    pub(super) scales: [[i32; ROWS]; 16],
    /// Factors of the activations' sums over a sub-block's values, two 16-bit ones a lane.
    pub(super) factors: [[i32; ROWS]; STEP / 32],
    /// Each block's scale.
    pub(super) d: [[f32; ROWS]; LANES],
    /// The scale of the minima.
    pub(super) dmin: [f32; ROWS],
}

impl Panel {
    const EMPTY: Panel = Panel {
        values: [[0; 4 * ROWS]; 2 * STEP / 4],
        scales: [[0; ROWS]; 16],
        factors: [[0; ROWS]; STEP / 32],
        d: [[0.0; ROWS]; LANES],
        dmin: [0.0; ROWS],
    };
}

/// An activation row's products with the panel's weight rows, in the making: see [`crate::quant::sums`].
type Lanes = [[f32; ROWS]; LANES];

/// A tile of weights that `U` unpacks.
///
/// # Safety
/// See `TileFn`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn tile<U: Unpack, D: Dot>(tile: &Tile<'_>) {
    let mut panel = Panel::EMPTY;
    let mut room = [const { MaybeUninit::<Lanes>::uninit() }; MAX_TILE_ROWS];
    let sums = filled(&mut room[..tile.x.len()], [[0.0; ROWS]; LANES]);
    let blocks = tile.row_bytes / U::BYTES;
    for first in (0..tile.rows).step_by(ROWS) {
        let rows = ROWS.min(tile.rows - first);
        // The next panel follows in memory.
        let mut source =
            Source::new(tile.w[first * tile.row_bytes..].as_ptr(), tile.row_bytes, rows);
        for b in (0..blocks).step_by(U::BLOCKS) {
            let count = U::BLOCKS.min(blocks - b);
            source.go_to(b * U::BYTES, count * U::BYTES);
            // SAFETY: `TileFn`'s conditions: the weight rows have `count` blocks from `b`, and so have the activations.
            unsafe {
                U::unpack::<D>(&source, count, &mut panel);
                let (batches, rest) = tile.x.as_chunks::<BATCH>();
                let (batch_sums, rest_sums) = sums.as_chunks_mut::<BATCH>();
                for (x, sums) in batches.iter().zip(batch_sums) {
                    multiply::<U, D, BATCH>(&panel, x, b, count, sums);
                }
                match rest.len() {
                    1 => multiply_rest::<U, D, 1>(&panel, rest, b, count, rest_sums),
                    2 => multiply_rest::<U, D, 2>(&panel, rest, b, count, rest_sums),
                    3 => multiply_rest::<U, D, 3>(&panel, rest, b, count, rest_sums),
                    _ => {}
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: `out` is valid for `rows` products of activation row `i` from weight row `first`.
            unsafe { store(sums, tile.out.add(i * tile.stride + first), rows) };
        }
    }
}

/// # Safety
/// See [`multiply`]; there are `N` of both.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_rest<U: Unpack, D: Dot, const N: usize>(
    panel: &Panel,
    x: &[ActRow<'_>],
    b: usize,
    count: usize,
    sums: &mut [Lanes],
) {
    let (Some(x), Some(sums)) = (x.first_chunk(), sums.first_chunk_mut()) else { return };
    // SAFETY: by the caller.
    unsafe { multiply::<U, D, N>(panel, x, b, count, sums) }
}

/// Adds the products of the panel's `count` blocks, which are blocks `b` and on of their rows.
///
/// # Safety
/// Each `x` has those blocks.
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply<U: Unpack, D: Dot, const N: usize>(
    panel: &Panel,
    x: &[ActRow<'_>; N],
    b: usize,
    count: usize,
    sums: &mut [Lanes; N],
) {
    // SAFETY: by the caller.
    unsafe {
        if U::BLOCKS == 1 {
            super_block::<U, D, N>(panel, x, b, sums);
        } else {
            for i in 0..count {
                block::<U, D, N>(panel, x, b + i, i, sums);
            }
        }
    }
}

/// Block `b` of 256 values, whose sub-blocks have integer scales.
///
/// # Safety
/// Each `x` has it.
#[inline]
#[target_feature(enable = "avx2,fma")]
#[allow(clippy::needless_range_loop)]
unsafe fn super_block<U: Unpack, D: Dot, const N: usize>(
    panel: &Panel,
    x: &[ActRow<'_>; N],
    b: usize,
    sums: &mut [Lanes; N],
) {
    let mut q = [std::ptr::null(); N];
    for n in 0..N {
        q[n] = x[n].q.as_ptr().wrapping_add(STEP * b);
    }
    let mut ints = [[_mm256_setzero_si256(); 2]; N];
    let part = D::room(U::BITS).min(U::SUB / 4);
    // SAFETY: by the caller.
    unsafe {
        for (i, w) in panel.values[..STEP / 4].chunks_exact(part).enumerate() {
            let at = 4 * part * i;
            let scales = vectors(&panel.scales[at / U::SUB]);
            ints = dots::<D, N>(w, &q, at, ints, scales);
        }
        let minima = times_sums::<D, N>(&panel.factors[..STEP / U::SUB / 2], x, b);
        let (d, dmin) = (floats(&panel.d[0]), floats(&panel.dmin));
        for n in 0..N {
            let x_d = _mm256_set1_ps(*x[n].d.get_unchecked(b));
            if U::MINIMA {
                let minus = subtract([_mm256_setzero_si256(); 2], minima[n]);
                add(&mut sums[n], b, x_d, [(ints[n], d), (minus, dmin)]);
            } else {
                add(&mut sums[n], b, x_d, [(subtract(ints[n], minima[n]), d)]);
            }
        }
    }
}

/// Block `b` of 32 values, which is the panel's block `i`.
///
/// # Safety
/// Each `x` has it.
#[inline]
#[target_feature(enable = "avx2,fma")]
#[allow(clippy::needless_range_loop)]
unsafe fn block<U: Unpack, D: Dot, const N: usize>(
    panel: &Panel,
    x: &[ActRow<'_>; N],
    b: usize,
    i: usize,
    sums: &mut [Lanes; N],
) {
    let mut q = [std::ptr::null(); N];
    let mut ints = [[_mm256_setzero_si256(); 2]; N];
    let offset = _mm256_set1_epi16(-U::OFFSET);
    // SAFETY: by the caller.
    unsafe {
        for n in 0..N {
            q[n] = x[n].q.as_ptr().add(32 * b);
            let sums = x[n].sums.as_ptr().add(2 * b).cast::<i32>().read_unaligned();
            ints[n] = [_mm256_madd_epi16(offset, _mm256_set1_epi32(sums)); 2];
        }
        let planes = U::planes::<D>();
        for (plane, w) in panel.values[8 * planes * i..].chunks_exact(8).take(planes).enumerate() {
            let scale = D::scale(_mm256_set1_epi32(1 << (4 * plane)));
            ints = dots::<D, N>(w, &q, 0, ints, [scale; 2]);
        }
        let d = floats(&panel.d[i]);
        for n in 0..N {
            let x_d = _mm256_set1_ps(*x[n].d.get_unchecked(b));
            add(&mut sums[n], b, x_d, [(ints[n], d)]);
        }
    }
}

/// Adds block `b`'s terms, integers times the weights' scale times the activations'. The first block of a lane takes no
/// notice of what an earlier panel left there.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add<const TERMS: usize>(
    sums: &mut Lanes,
    b: usize,
    x_d: __m256,
    terms: [([__m256i; 2], [__m256; 2]); TERMS],
) {
    let sum = &mut sums[b % LANES];
    let mut total = if b < LANES { [_mm256_setzero_ps(); 2] } else { floats(sum) };
    for (ints, d) in terms {
        for half in 0..2 {
            let scale = _mm256_mul_ps(d[half], x_d);
            total[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(ints[half]), scale, total[half]);
        }
    }
    set(sum, total);
}

#[inline]
#[target_feature(enable = "avx2")]
fn subtract(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
    [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])]
}

/// Adds the dot products of `4 * w.len()` values with those from `at` of each `x`, times a scale. One part has room for
/// them.
///
/// # Safety
/// Each `x` has them.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dots<D: Dot, const N: usize>(
    w: &[[u8; 4 * ROWS]],
    x: &[*const i8; N],
    at: usize,
    mut ints: [[__m256i; 2]; N],
    scale: [__m256i; 2],
) -> [[__m256i; 2]; N] {
    let mut parts = [[None; 2]; N];
    // SAFETY: by the caller.
    unsafe {
        for (i, w) in w.iter().enumerate() {
            let (low, high) = (load(w.as_ptr()), load(w.as_ptr().add(32)));
            for n in 0..N {
                let x = x[n].add(at + 4 * i).cast::<i32>().read_unaligned();
                let x = _mm256_set1_epi32(x);
                parts[n][0] = Some(D::products(parts[n][0], low, x));
                parts[n][1] = Some(D::products(parts[n][1], high, x));
            }
        }
        for n in 0..N {
            for half in 0..2 {
                if let Some(part) = parts[n][half] {
                    ints[n][half] = D::scaled(ints[n][half], part, scale[half]);
                }
            }
        }
    }
    ints
}

/// Factors times the activations' sums over the sub-blocks of block `b`.
///
/// # Safety
/// Each `x` has it.
#[inline]
#[target_feature(enable = "avx2")]
#[allow(clippy::needless_range_loop)]
unsafe fn times_sums<D: Dot, const N: usize>(
    factors: &[[i32; ROWS]],
    x: &[ActRow<'_>; N],
    b: usize,
) -> [[__m256i; 2]; N] {
    let mut pairs = [[0i32; STEP / 32]; N];
    let mut ints = [[_mm256_setzero_si256(); 2]; N];
    // SAFETY: by the caller: 16 sums.
    unsafe {
        for n in 0..N {
            let mut sums = load(x[n].sums.as_ptr().add(16 * b).cast());
            if factors.len() == STEP / 64 {
                // Over 32 values each, in the lower 16 bytes.
                let both = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
                let both = _mm256_packs_epi32(both, both);
                sums = _mm256_permute4x64_epi64::<0b1000>(both);
            }
            _mm256_storeu_si256(pairs[n].as_mut_ptr().cast(), sums);
        }
        for (pair, factors) in factors.iter().enumerate() {
            let factors = vectors(factors);
            for n in 0..N {
                let sums = _mm256_set1_epi32(pairs[n][pair]);
                for half in 0..2 {
                    ints[n][half] = D::pairs(ints[n][half], factors[half], sums);
                }
            }
        }
    }
    ints
}

/// Writes `rows` products: the lanes' sums as [`crate::quant::sums`] adds them up.
///
/// # Safety
/// `out` is valid for them.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn store(sums: &Lanes, out: *mut f32, rows: usize) {
    let add = |[a, b]: [__m256; 2], [c, d]: [__m256; 2]| [_mm256_add_ps(a, c), _mm256_add_ps(b, d)];
    let pair = |i: usize| add(floats(&sums[i]), floats(&sums[i + 4]));
    let mut total = [0.0; ROWS];
    set(&mut total, add(add(pair(0), pair(2)), add(pair(1), pair(3))));
    // SAFETY: by the caller.
    unsafe { out.copy_from_nonoverlapping(total.as_ptr(), rows) };
}

#[inline]
#[target_feature(enable = "avx2")]
fn vectors(from: &[i32; ROWS]) -> [__m256i; 2] {
    // SAFETY: 16 values are there.
    unsafe {
        let from = from.as_ptr().cast::<u8>();
        [load(from), load(from.add(32))]
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn floats(from: &[f32; ROWS]) -> [__m256; 2] {
    // SAFETY: 16 values are there.
    unsafe { [_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))] }
}

#[inline]
#[target_feature(enable = "avx2")]
fn set(to: &mut [f32; ROWS], values: [__m256; 2]) {
    // SAFETY: there is room for 16 values.
    unsafe {
        _mm256_storeu_ps(to.as_mut_ptr(), values[0]);
        _mm256_storeu_ps(to.as_mut_ptr().add(8), values[1]);
    }
}
