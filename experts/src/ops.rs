//! Arithmetic besides matrices: norms, rotary positions, the activation function, attention.

mod attention;
mod kv;

use crate::quant::isa::multiversion;

pub use attention::{Attention, AttentionScratch, attend};
pub use kv::{KvSide, KvTensor, KvType, store};

/// Independent sums, which is what lets the compiler vectorise one.
const LANES: usize = 16;

multiversion! {
    /// `out = x / sqrt(mean(x^2) + eps) * weight`, all of one row's length.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let scale = inverse_rms(x, eps);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }

    /// As [`rms_norm`], in place.
    pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
        let scale = inverse_rms(x, eps);
        for (x, weight) in x.iter_mut().zip(weight) {
            *x = *x * scale * weight;
        }
    }

    /// `y += a * x`.
    pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += a * x;
        }
    }

    /// `y += x`.
    pub fn add(x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }

    /// `up = silu(gate) * up`, where `silu(x) = x * sigmoid(x)`.
    pub fn silu_times(gate: &[f32], up: &mut [f32]) {
        for (up, gate) in up.iter_mut().zip(gate) {
            *up *= gate / (1.0 + exp(-gate));
        }
    }

    /// Rotates pairs of neighbours `(2i, 2i + 1)` of each head by angle `i`; `cos` and `sin` have an entry a pair, and
    /// what lies beyond them in a head stays.
    pub fn rope_norm(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
        for head in x.chunks_exact_mut(head_dim) {
            for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                let [a, b] = *pair;
                *pair = [a * cos - b * sin, a * sin + b * cos];
            }
        }
    }

    /// As [`rope_norm`], for pairs `(i, i + n)` where `n` is the number of angles.
    pub fn rope_neox(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
        for head in x.chunks_exact_mut(head_dim) {
            let (first, second) = head.split_at_mut(cos.len());
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
            }
        }
    }
}

/// `1 / (base^(2i / dim) * scale)` for each of `dim / 2` pairs: angles a position. `scale` is the linear factor.
pub fn rope_frequencies(dim: usize, base: f32, scale: f32) -> Vec<f32> {
    (0..dim / 2).map(|i| 1.0 / (base.powf((2 * i) as f32 / dim as f32) * scale)).collect()
}

/// The cosines and sines of a position's angles.
pub fn rope_angles(position: usize, frequencies: &[f32], cos: &mut [f32], sin: &mut [f32]) {
    for ((frequency, cos), sin) in frequencies.iter().zip(cos).zip(sin) {
        (*sin, *cos) = (position as f32 * frequency).sin_cos();
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of_products(x, x) / x.len() as f32 + eps).sqrt()
}

/// The greatest of `x`.
#[inline(always)]
fn greatest(x: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let (lanes, rest) = x.as_chunks::<LANES>();
    let mut most = [f32::NEG_INFINITY; LANES];
    for x in lanes {
        for (most, x) in most.iter_mut().zip(x) {
            *most = greater(*most, *x);
        }
    }
    rest.iter().copied().fold(across(most, greater), greater)
}

/// `x = exp(x - most)`.
#[inline(always)]
fn exp_all(x: &mut [f32], most: f32) {
    for x in x {
        *x = exp(*x - most);
    }
}

#[inline(always)]
fn sum_of(x: &[f32]) -> f32 {
    let (lanes, rest) = x.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for x in lanes {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += x;
        }
    }
    across(sums, |a, b| a + b) + rest.iter().sum::<f32>()
}

#[inline(always)]
fn sum_of_products(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    across(sums, |a, b| a + b) + rest
}

/// One of all lanes, by halves: one after another, each would wait for the one before.
#[inline(always)]
fn across(mut lanes: [f32; LANES], both: impl Fn(f32, f32) -> f32) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] = both(lanes[i], lanes[i + width]);
        }
    }
    lanes[0]
}

/// e^x within 2 units in the last place, without a branch, so that loops over it vectorise: Cephes `expf`. Below
/// -87.3 it gives e^-87.3 (10^-38), above 88.3 e^88.3.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first exact in few bits.
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let e = p * r * r + r + 1.0;
    // 2^n by its exponent bits: the low bits of `shifted` are n.
    e * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}
