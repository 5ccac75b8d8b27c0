//! Several activation rows: 32 weight rows are unpacked once, a lane each, and multiplied with all of them.
//!
//! A vector holds four values of each of 16 weight rows, and `dpbusd` multiplies them with four broadcast activations,
//! so that nothing is ever summed across lanes. Six activation rows by 32 weight rows are what fits the registers.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::load;
use super::unpack::{Panel, ROWS, STEP, Unpack};
use crate::quant::source::Source;
use crate::quant::sums::LANES;
use crate::quant::{ActRow, MAX_TILE_ROWS, Tile, filled};

/// Activation rows that are multiplied together.
const BATCH: usize = 6;
/// An activation row's products with the panel's weight rows, in the making: see [`crate::quant::sums`].
pub(super) type Lanes = [[f32; ROWS]; LANES];

/// Where an activation row's products with the panel's weight rows go once all `blocks` of their rows have added to them.
#[derive(Clone, Copy)]
pub(super) struct Out {
    at: *mut f32,
    /// How many products.
    rows: usize,
    stride: usize,
    blocks: usize,
}

impl Out {
    /// Those of the activation row `i` rows on.
    #[inline(always)]
    pub(super) fn row(self, i: usize) -> Out {
        Out { at: self.at.wrapping_add(i * self.stride), ..self }
    }
}

/// A tile of weights that `U` unpacks.
///
/// # Safety
/// See `TileFn`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn tile<U: Unpack>(tile: &Tile<'_>) {
    // SAFETY: `TileFn`'s conditions: the activation rows have the blocks that the weight rows have.
    unsafe {
        panel_by_panel::<U>(tile, |panel, b, count, sums, out| {
            let (batches, rest) = tile.x.as_chunks::<BATCH>();
            let (batch_sums, rest_sums) = sums.as_chunks_mut::<BATCH>();
            for (i, (x, sums)) in batches.iter().zip(batch_sums).enumerate() {
                multiply::<U, BATCH>(panel, x, b, count, sums, out.row(BATCH * i));
            }
            let rest_out = out.row(BATCH * batches.len());
            match rest.len() {
                1 => multiply_rest::<U, 1>(panel, rest, b, count, rest_sums, rest_out),
                2 => multiply_rest::<U, 2>(panel, rest, b, count, rest_sums, rest_out),
                3 => multiply_rest::<U, 3>(panel, rest, b, count, rest_sums, rest_out),
                4 => multiply_rest::<U, 4>(panel, rest, b, count, rest_sums, rest_out),
                5 => multiply_rest::<U, 5>(panel, rest, b, count, rest_sums, rest_out),
                _ => {}
            }
        });
    }
}

/// Unpacks the tile's weights panel by panel. `multiply` adds the products of the panel's blocks, `count` from `b` of their
/// rows, to each activation row's sums.
///
/// # Safety
/// See `TileFn`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn panel_by_panel<U: Unpack>(
    tile: &Tile<'_>,
    mut multiply: impl FnMut(&Panel, usize, usize, &mut [Lanes], Out),
) {
    let mut panel = Panel::EMPTY;
    let mut room = [const { MaybeUninit::<Lanes>::uninit() }; MAX_TILE_ROWS];
    let sums = filled(&mut room[..tile.x.len()], [[0.0; ROWS]; LANES]);
    let blocks = tile.row_bytes / U::BYTES;
    for first in (0..tile.rows).step_by(ROWS) {
        let rows = ROWS.min(tile.rows - first);
        let at = tile.out.wrapping_add(first);
        let out = Out { at, rows, stride: tile.stride, blocks };
        // The next panel follows in memory.
        let mut source =
            Source::new(tile.w[first * tile.row_bytes..].as_ptr(), tile.row_bytes, rows);
        for b in (0..blocks).step_by(U::BLOCKS) {
            let count = U::BLOCKS.min(blocks - b);
            source.go_to(b * U::BYTES, count * U::BYTES);
            // SAFETY: `TileFn`'s conditions: the weight rows have `count` blocks from `b`.
            unsafe { U::unpack(&source, count, &mut panel) };
            multiply(&panel, b, count, sums, out);
        }
    }
}

/// # Safety
/// See [`multiply`]; there are `N` of both.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn multiply_rest<U: Unpack, const N: usize>(
    panel: &Panel,
    x: &[ActRow<'_>],
    b: usize,
    count: usize,
    sums: &mut [Lanes],
    out: Out,
) {
    let (Some(x), Some(sums)) = (x.first_chunk(), sums.first_chunk_mut()) else { return };
    // SAFETY: by the caller.
    unsafe { multiply::<U, N>(panel, x, b, count, sums, out) }
}

/// Adds the products of the panel's `count` blocks, which are blocks `b` and on of their rows.
///
/// # Safety
/// Each `x` has those blocks, and `out` is the tile's for the first of them.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn multiply<U: Unpack, const N: usize>(
    panel: &Panel,
    x: &[ActRow<'_>; N],
    b: usize,
    count: usize,
    sums: &mut [Lanes; N],
    out: Out,
) {
    // SAFETY: by the caller.
    unsafe {
        if U::BLOCKS == 1 {
            super_block::<U, N>(panel, x, b, sums, out);
        } else {
            for i in 0..count {
                block::<U, N>(panel, x, b + i, i, sums, out);
            }
        }
    }
}

/// Block `b` of 256 values, whose sub-blocks have integer scales.
///
/// # Safety
/// See [`multiply`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[allow(clippy::needless_range_loop)]
unsafe fn super_block<U: Unpack, const N: usize>(
    panel: &Panel,
    x: &[ActRow<'_>; N],
    b: usize,
    sums: &mut [Lanes; N],
    out: Out,
) {
    let mut q = [std::ptr::null(); N];
    for n in 0..N {
        q[n] = x[n].q.as_ptr().wrapping_add(STEP * b);
    }
    let mut ints = [[_mm512_setzero_si512(); 2]; N];
    // SAFETY: by the caller.
    unsafe {
        for sub in 0..STEP / U::SUB {
            let at = sub * U::SUB;
            let zero = [[_mm512_setzero_si512(); 2]; N];
            let parts = dots(&panel.values[at / 4..][..U::SUB / 4], &q, at, zero);
            let scales = vectors(&panel.scales[sub]);
            for n in 0..N {
                for half in 0..2 {
                    let scaled = _mm512_mullo_epi32(parts[n][half], scales[half]);
                    ints[n][half] = _mm512_add_epi32(ints[n][half], scaled);
                }
            }
        }
        finish::<U, N>(panel, x, b, ints, sums, out);
    }
}

/// Adds block `b`'s terms of `ints`, its products with the sub-blocks' scales, to the sums.
///
/// # Safety
/// See [`multiply`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn finish<U: Unpack, const N: usize>(
    panel: &Panel,
    x: &[ActRow<'_>; N],
    b: usize,
    ints: [[__m512i; 2]; N],
    sums: &mut [Lanes; N],
    out: Out,
) {
    // SAFETY: by the caller.
    unsafe {
        let minima = times_sums(&panel.factors[..STEP / U::SUB / 2], x, b);
        let (d, dmin) = (floats(&panel.d[0]), floats(&panel.dmin));
        for n in 0..N {
            let x_d = _mm512_set1_ps(*x[n].d.get_unchecked(b));
            if U::MINIMA {
                let minus = subtract([_mm512_setzero_si512(); 2], minima[n]);
                add(&mut sums[n], b, out.row(n), x_d, [(ints[n], d), (minus, dmin)]);
            } else {
                add(&mut sums[n], b, out.row(n), x_d, [(subtract(ints[n], minima[n]), d)]);
            }
        }
    }
}

/// Block `b` of 32 values, which is the panel's block `i`.
///
/// # Safety
/// See [`multiply`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[allow(clippy::needless_range_loop)]
unsafe fn block<U: Unpack, const N: usize>(
    panel: &Panel,
    x: &[ActRow<'_>; N],
    b: usize,
    i: usize,
    sums: &mut [Lanes; N],
    out: Out,
) {
    let mut q = [std::ptr::null(); N];
    let mut ints = [[_mm512_setzero_si512(); 2]; N];
    // SAFETY: by the caller.
    unsafe {
        for n in 0..N {
            q[n] = x[n].q.as_ptr().add(32 * b);
            let sums = x[n].sums.as_ptr().add(2 * b).cast::<i32>().read_unaligned();
            let offset = _mm512_set1_epi16(-U::OFFSET);
            let offset = _mm512_dpwssd_epi32(ints[n][0], offset, _mm512_set1_epi32(sums));
            ints[n] = [offset; 2];
        }
        ints = dots(&panel.values[8 * i..][..8], &q, 0, ints);
        let d = floats(&panel.d[i]);
        for n in 0..N {
            let x_d = _mm512_set1_ps(*x[n].d.get_unchecked(b));
            add(&mut sums[n], b, out.row(n), x_d, [(ints[n], d)]);
        }
    }
}

/// Adds block `b`'s terms, integers times the weights' scale times the activations'. The first block of a lane takes no
/// notice of what an earlier panel left there.
///
/// # Safety
/// `out` is the row's.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f")]
unsafe fn add<const TERMS: usize>(
    sums: &mut Lanes,
    b: usize,
    out: Out,
    x_d: __m512,
    terms: [([__m512i; 2], [__m512; 2]); TERMS],
) {
    let mut total = if b < LANES { [_mm512_setzero_ps(); 2] } else { floats(&sums[b % LANES]) };
    for (ints, d) in terms {
        for half in 0..2 {
            let scale = _mm512_mul_ps(d[half], x_d);
            total[half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints[half]), scale, total[half]);
        }
    }
    match b + 1 < out.blocks {
        true => set(&mut sums[b % LANES], total),
        // SAFETY: by the caller.
        false => unsafe { put(out, across_lanes(sums, b, out.blocks, total)) },
    }
}

/// The sums of the lanes that have any of the blocks, as [`crate::quant::sums`] adds them up; that of block `b`, the last, is
/// `last`.
#[inline]
#[target_feature(enable = "avx512f")]
fn across_lanes(sums: &Lanes, b: usize, blocks: usize, last: [__m512; 2]) -> [__m512; 2] {
    let lane = |i: usize| match i {
        _ if i == b % LANES => last,
        _ if i < blocks => floats(&sums[i]),
        _ => [_mm512_setzero_ps(); 2],
    };
    let add = |[a, b]: [__m512; 2], [c, d]: [__m512; 2]| [_mm512_add_ps(a, c), _mm512_add_ps(b, d)];
    let pair = |i: usize| add(lane(i), lane(i + 4));
    add(add(pair(0), pair(2)), add(pair(1), pair(3)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn subtract(a: [__m512i; 2], b: [__m512i; 2]) -> [__m512i; 2] {
    [_mm512_sub_epi32(a[0], b[0]), _mm512_sub_epi32(a[1], b[1])]
}

/// Adds the dot products of `4 * w.len()` values with those from `at` of each `x`.
///
/// # Safety
/// Each `x` has them.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn dots<const N: usize>(
    w: &[[u8; 4 * ROWS]],
    x: &[*const i8; N],
    at: usize,
    mut ints: [[__m512i; 2]; N],
) -> [[__m512i; 2]; N] {
    let mut steps = w.len();
    // SAFETY: no instruction at all. The compiler no longer knows how many steps there are: it would unroll all of them
    // and reorder them row by row, which spills and leaves two chains of products to wait for each other.
    unsafe { asm!("/* {0} */", inout(reg) steps, options(pure, nomem, nostack, preserves_flags)) };
    let w = w.as_ptr().cast::<u8>();
    for i in 0..steps {
        // SAFETY: by the caller.
        unsafe {
            let (low, high) = (load(w.add(128 * i)), load(w.add(128 * i + 64)));
            for n in 0..N {
                let x = x[n].add(at + 4 * i).cast::<i32>().read_unaligned();
                let x = _mm512_set1_epi32(x);
                ints[n][0] = _mm512_dpbusd_epi32(ints[n][0], low, x);
                ints[n][1] = _mm512_dpbusd_epi32(ints[n][1], high, x);
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
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[allow(clippy::needless_range_loop)]
unsafe fn times_sums<const N: usize>(
    factors: &[[i32; ROWS]],
    x: &[ActRow<'_>; N],
    b: usize,
) -> [[__m512i; 2]; N] {
    let mut pairs = [[0i32; STEP / 32]; N];
    for n in 0..N {
        // SAFETY: by the caller: 16 sums.
        unsafe {
            let mut sums = _mm256_loadu_si256(x[n].sums.as_ptr().add(16 * b).cast());
            if factors.len() == STEP / 64 {
                // Over 32 values each.
                let both = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
                sums = _mm256_castsi128_si256(_mm256_cvtepi32_epi16(both));
            }
            _mm256_storeu_si256(pairs[n].as_mut_ptr().cast(), sums);
        }
    }
    let mut ints = [[_mm512_setzero_si512(); 2]; N];
    for (pair, factors) in factors.iter().enumerate() {
        let factors = vectors(factors);
        for n in 0..N {
            let sums = _mm512_set1_epi32(pairs[n][pair]);
            for half in 0..2 {
                ints[n][half] = _mm512_dpwssd_epi32(ints[n][half], factors[half], sums);
            }
        }
    }
    ints
}

/// Writes one activation row's products.
///
/// # Safety
/// The row is one of the tile's.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn put(out: Out, products: [__m512; 2]) {
    let mask = u32::MAX >> (ROWS - out.rows);
    // SAFETY: by the caller; the mask leaves out what is not there.
    unsafe {
        _mm512_mask_storeu_ps(out.at, mask as u16, products[0]);
        _mm512_mask_storeu_ps(out.at.wrapping_add(16), (mask >> 16) as u16, products[1]);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn vectors(from: &[i32; ROWS]) -> [__m512i; 2] {
    // SAFETY: 32 values are there.
    unsafe {
        let from = from.as_ptr().cast::<u8>();
        [load(from), load(from.add(64))]
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn floats(from: &[f32; ROWS]) -> [__m512; 2] {
    // SAFETY: 32 values are there.
    unsafe { [_mm512_loadu_ps(from.as_ptr()), _mm512_loadu_ps(from.as_ptr().add(16))] }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn set(to: &mut [f32; ROWS], values: [__m512; 2]) {
    // SAFETY: there is room for 32 values.
    unsafe {
        _mm512_storeu_ps(to.as_mut_ptr(), values[0]);
        _mm512_storeu_ps(to.as_mut_ptr().add(16), values[1]);
    }
}
