//! Products with cached keys and values, a line in two vectors, eight queries at a time.

// Sums are in registers, by index.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use crate::quant::avx2::prefetch;
use crate::quant::kv::{LANES, Line, Pairs, in_batches};

/// # Safety
/// See `HalvesFn`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn halves(lines: &[Line], x: &[f32], out: &mut [[f32; LANES]]) {
    let n = x.len() / out.len();
    // SAFETY: by the caller.
    in_batches!(8, |i, out| unsafe { some_halves(lines, x[i * n..].as_ptr(), n, out) }, out);
}

/// # Safety
/// `x` points to `N` rows of `n` values, at least one a line.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn some_halves<const N: usize>(
    lines: &[Line],
    x: *const f32,
    n: usize,
    out: &mut [[f32; LANES]; N],
) {
    // SAFETY: a line has 64 bytes, an output 32 floats; `x` by the caller.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; N];
        for i in 0..N {
            sums[i] = [0, 16].map(|lane| _mm512_loadu_ps(out[i].as_ptr().add(lane)));
        }
        for (s, line) in lines.iter().enumerate() {
            prefetch(line.as_ptr(), 64);
            let values =
                [0, 32].map(|at| _mm512_cvtph_ps(_mm256_loadu_si256(line.as_ptr().add(at).cast())));
            for i in 0..N {
                let x = _mm512_set1_ps(*x.add(i * n + s));
                for half in 0..2 {
                    sums[i][half] = _mm512_fmadd_ps(values[half], x, sums[i][half]);
                }
            }
        }
        for i in 0..N {
            for half in 0..2 {
                _mm512_storeu_ps(out[i].as_mut_ptr().add(16 * half), sums[i][half]);
            }
        }
    }
}

/// # Safety
/// See `PairsFn`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn pairs(pairs: &Pairs<'_>, out: &mut [[f32; LANES]]) {
    let n = pairs.x.len() / out.len();
    // SAFETY: by the caller.
    in_batches!(8, |i, out| unsafe { some_pairs(pairs, i, n, out) }, out);
}

/// Queries `first` and on.
///
/// # Safety
/// There are `N` of them, and of `n` pairs each at least one a line.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn some_pairs<const N: usize>(
    pairs: &Pairs<'_>,
    first: usize,
    n: usize,
    out: &mut [[f32; LANES]; N],
) {
    // SAFETY: a line has 64 bytes, an output 32 floats; `x` and `d` by the caller.
    unsafe {
        let x = pairs.x.as_ptr().add(first * n).cast::<i32>();
        let mut sums = [[_mm512_setzero_si512(); 2]; N];
        for (s, line) in pairs.lines.iter().enumerate() {
            prefetch(line.as_ptr(), 64);
            let values = [0, 32]
                .map(|at| _mm512_cvtepi8_epi16(_mm256_loadu_si256(line.as_ptr().add(at).cast())));
            for i in 0..N {
                let x = _mm512_set1_epi32(x.add(i * n + s).read_unaligned());
                for half in 0..2 {
                    sums[i][half] = _mm512_dpwssd_epi32(sums[i][half], values[half], x);
                }
            }
        }
        for half in 0..2 {
            let scales = _mm512_loadu_ps(pairs.scales.as_ptr().add(16 * half));
            for i in 0..N {
                let scales = _mm512_mul_ps(scales, _mm512_set1_ps(pairs.d[first + i]));
                let out = out[i].as_mut_ptr().add(16 * half);
                let sums = _mm512_cvtepi32_ps(sums[i][half]);
                _mm512_storeu_ps(out, _mm512_fmadd_ps(sums, scales, _mm512_loadu_ps(out)));
            }
        }
    }
}
