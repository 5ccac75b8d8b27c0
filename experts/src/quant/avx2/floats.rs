//! Weights and cached keys and values that are floats.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::total;
use crate::quant::ActRow;

pub(super) const F32: u8 = 0;
pub(super) const F16: u8 = 1;
pub(super) const BF16: u8 = 2;

/// F32, F16 or BF16 weights, `TYPE` says which.
///
/// # Safety
/// `x` holds as many f32 values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn float_dot<const TYPE: u8, const N: usize>(
    w: &[u8],
    x: &[ActRow<'_>; N],
) -> [f32; N] {
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
/// See `WidenFn`.
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn widen(halves: &[u8], out: &mut [f32]) {
    for (out, halves) in out.as_chunks_mut::<8>().0.iter_mut().zip(halves.as_chunks::<16>().0) {
        // SAFETY: 8 halves are there.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), floats::<F16>(halves.as_ptr())) };
    }
}
