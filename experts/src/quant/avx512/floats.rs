//! Weights and cached keys and values that are floats.

use std::arch::x86_64::*;

use super::totals;
use crate::quant::ActRow;
use crate::quant::avx2::prefetch;

pub(super) const F32: u8 = 0;
pub(super) const F16: u8 = 1;
pub(super) const BF16: u8 = 2;

/// F32, F16 or BF16 weights, `TYPE` says which.
///
/// # Safety
/// Each `x` holds as many f32 values as `w` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
// The parts are unrolled by index, over several activation rows' sums at once.
#[allow(clippy::needless_range_loop)]
pub(super) unsafe fn float_dot<const TYPE: u8, const N: usize>(
    w: &[u8],
    x: &[ActRow<'_>; N],
) -> [f32; N] {
    let size = if TYPE == F32 { 4 } else { 2 };
    let cols = w.len() / size;
    let mut sums = [[_mm512_setzero_ps(); 4]; N];
    for at in (0..cols / 64 * 64).step_by(64) {
        prefetch(w[at * size..].as_ptr(), 64 * size);
        for part in 0..4 {
            // SAFETY: 16 values are left in `w` and `x`.
            unsafe {
                let w = floats::<TYPE>(w.as_ptr(), at + 16 * part, !0);
                for n in 0..N {
                    let x = _mm512_loadu_ps(x[n].values.as_ptr().add(at + 16 * part));
                    sums[n][part] = _mm512_fmadd_ps(w, x, sums[n][part]);
                }
            }
        }
    }
    for at in (cols / 64 * 64..cols).step_by(16) {
        let mask = u16::MAX >> (16 - (cols - at).min(16));
        // SAFETY: the mask keeps to what is left of `w` and `x`.
        unsafe {
            let w = floats::<TYPE>(w.as_ptr(), at, mask);
            for n in 0..N {
                let x = _mm512_maskz_loadu_ps(mask, x[n].values.as_ptr().add(at));
                sums[n][0] = _mm512_fmadd_ps(w, x, sums[n][0]);
            }
        }
    }
    let mut whole = [_mm512_setzero_ps(); N];
    for n in 0..N {
        let [a, b, c, d] = sums[n];
        whole[n] = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
    }
    totals(whole)
}

/// Values `at..at + 16` of the weights, those that `mask` names.
///
/// # Safety
/// The values that `mask` names are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn floats<const TYPE: u8>(w: *const u8, at: usize, mask: u16) -> __m512 {
    // SAFETY: by the caller.
    unsafe {
        match TYPE {
            F32 => _mm512_maskz_loadu_ps(mask, w.cast::<f32>().add(at)),
            F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, w.cast::<i16>().add(at))),
            _ => {
                let bits = _mm256_maskz_loadu_epi16(mask, w.cast::<i16>().add(at));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
            }
        }
    }
}

/// # Safety
/// See `WidenFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn widen(halves: &[u8], out: &mut [f32]) {
    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // SAFETY: 16 halves are left.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), floats::<F16>(halves.as_ptr(), 16 * i, !0)) };
    }
}
