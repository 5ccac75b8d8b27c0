//! Weights and cached keys and values that are floats.

use std::arch::aarch64::*;

use half::{bf16, f16};

use super::{total, widened};
use crate::quant::ActRow;

pub(super) const F32: u8 = 0;
pub(super) const F16: u8 = 1;
pub(super) const BF16: u8 = 2;

/// F32, F16 or BF16 weights, `TYPE` says which.
///
/// # Safety
/// Each `x` holds as many f32 values as `w` has.
#[inline]
#[target_feature(enable = "neon")]
// The parts are unrolled by index, over several activation rows' sums at once.
#[allow(clippy::needless_range_loop)]
pub(super) unsafe fn float_dot<const TYPE: u8, const N: usize>(
    w: &[u8],
    x: &[ActRow<'_>; N],
) -> [f32; N] {
    let bytes = if TYPE == F32 { 4 } else { 2 };
    let mut sums = [[vdupq_n_f32(0.0); 4]; N];
    let parts = w.chunks_exact(16 * bytes);
    let (rest, first_rest) = (parts.remainder(), 16 * parts.len());
    for (i, w) in parts.enumerate() {
        // SAFETY: 16 values are left in `w` and `x`.
        unsafe {
            let w = floats::<TYPE>(w.as_ptr());
            for n in 0..N {
                let x = x[n].values.as_ptr().add(16 * i);
                for part in 0..4 {
                    let x = vld1q_f32(x.add(4 * part));
                    sums[n][part] = vfmaq_f32(sums[n][part], w[part], x);
                }
            }
        }
    }
    let mut totals = [0.0; N];
    for n in 0..N {
        let [a, b, c, d] = sums[n];
        totals[n] = total(vaddq_f32(vaddq_f32(a, b), vaddq_f32(c, d)));
    }
    for (i, w) in rest.chunks_exact(bytes).enumerate() {
        let weight = match TYPE {
            F32 => f32::from_le_bytes([w[0], w[1], w[2], w[3]]),
            F16 => f16::from_le_bytes([w[0], w[1]]).to_f32(),
            _ => bf16::from_le_bytes([w[0], w[1]]).to_f32(),
        };
        for n in 0..N {
            totals[n] += weight * x[n].values[first_rest + i];
        }
    }
    totals
}

/// 16 weights.
///
/// # Safety
/// They are at `w`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn floats<const TYPE: u8>(w: *const u8) -> [float32x4_t; 4] {
    // SAFETY: by the caller.
    unsafe {
        if TYPE == F32 {
            return [0, 4, 8, 12].map(|i| vld1q_f32(w.cast::<f32>().add(i)));
        }
        [0, 4, 8, 12].map(|i| {
            let bits = vld1_u16(w.cast::<u16>().add(i));
            match TYPE {
                F16 => widened(bits),
                _ => vreinterpretq_f32_u32(vshll_n_u16::<16>(bits)),
            }
        })
    }
}

/// # Safety
/// See `WidenFn`.
#[target_feature(enable = "neon")]
pub(super) unsafe fn widen(halves: &[u8], out: &mut [f32]) {
    for (out, halves) in out.as_chunks_mut::<16>().0.iter_mut().zip(halves.as_chunks::<32>().0) {
        // SAFETY: 16 halves are there.
        unsafe {
            for (part, values) in floats::<F16>(halves.as_ptr()).into_iter().enumerate() {
                vst1q_f32(out.as_mut_ptr().add(4 * part), values);
            }
        }
    }
}
