//! Products with cached keys and values, half a line in two vectors, four queries at a time.

// Sums are in registers, by index.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::prefetch;
use crate::quant::kv::{LANES, Line, Pairs, in_batches};

/// # Safety
/// See `HalvesFn`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn halves(lines: &[Line], x: &[f32], out: &mut [[f32; LANES]]) {
    let n = x.len() / out.len();
    // SAFETY: by the caller.
    in_batches!(4, |i, out| unsafe { some_halves(lines, x[i * n..].as_ptr(), n, out) }, out);
}

/// # Safety
/// `x` points to `N` rows of `n` values, at least one a line.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn some_halves<const N: usize>(
    lines: &[Line],
    x: *const f32,
    n: usize,
    out: &mut [[f32; LANES]; N],
) {
    for lane in [0, LANES / 2] {
        // SAFETY: a line has 64 bytes, an output 32 floats; `x` by the caller.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; N];
            for i in 0..N {
                sums[i] = [0, 8].map(|at| _mm256_loadu_ps(out[i].as_ptr().add(lane + at)));
            }
            for (s, line) in lines.iter().enumerate() {
                prefetch(line.as_ptr(), 64);
                let values = [0, 16].map(|at| {
                    _mm256_cvtph_ps(_mm_loadu_si128(line.as_ptr().add(2 * lane + at).cast()))
                });
                for i in 0..N {
                    let x = _mm256_set1_ps(*x.add(i * n + s));
                    for half in 0..2 {
                        sums[i][half] = _mm256_fmadd_ps(values[half], x, sums[i][half]);
                    }
                }
            }
            for i in 0..N {
                for half in 0..2 {
                    _mm256_storeu_ps(out[i].as_mut_ptr().add(lane + 8 * half), sums[i][half]);
                }
            }
        }
    }
}

/// # Safety
/// See `PairsFn`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn pairs(pairs: &Pairs<'_>, out: &mut [[f32; LANES]]) {
    let n = pairs.x.len() / out.len();
    // SAFETY: by the caller.
    in_batches!(4, |i, out| unsafe { some_pairs(pairs, i, n, out) }, out);
}

/// Queries `first` and on.
///
/// # Safety
/// There are `N` of them, and of `n` pairs each at least one a line.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn some_pairs<const N: usize>(
    pairs: &Pairs<'_>,
    first: usize,
    n: usize,
    out: &mut [[f32; LANES]; N],
) {
    for lane in [0, LANES / 2] {
        // SAFETY: a line has 64 bytes, an output 32 floats; `x` and `d` by the caller.
        unsafe {
            let x = pairs.x.as_ptr().add(first * n).cast::<i32>();
            let mut sums = [[_mm256_setzero_si256(); 2]; N];
            for (s, line) in pairs.lines.iter().enumerate() {
                prefetch(line.as_ptr(), 64);
                let values = [0, 16].map(|at| {
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(line.as_ptr().add(2 * lane + at).cast()))
                });
                for i in 0..N {
                    let x = _mm256_set1_epi32(x.add(i * n + s).read_unaligned());
                    for half in 0..2 {
                        let products = _mm256_madd_epi16(values[half], x);
                        sums[i][half] = _mm256_add_epi32(sums[i][half], products);
                    }
                }
            }
            for half in 0..2 {
                let scales = _mm256_loadu_ps(pairs.scales.as_ptr().add(lane + 8 * half));
                for i in 0..N {
                    let scales = _mm256_mul_ps(scales, _mm256_set1_ps(pairs.d[first + i]));
                    let out = out[i].as_mut_ptr().add(lane + 8 * half);
                    let sums = _mm256_cvtepi32_ps(sums[i][half]);
                    _mm256_storeu_ps(out, _mm256_fmadd_ps(sums, scales, _mm256_loadu_ps(out)));
                }
            }
        }
    }
}
