//! The plain kernels: integer dot products block by block, for any machine and as the reference of the fast ones.

use half::{bf16, f16};

use super::blocks::{f16_at, q4_0, q4_k, q5_k, q6_k, q8_0, scale_min};
use super::isa::Isa;
use super::sums::Sums;
use super::{ActRow, Kernels, Tile, TileFn, kv, vq};

pub(super) static KERNELS: Kernels = Kernels {
    name: "scalar",
    isa: Isa::Scalar,
    f32: |tile| fill(tile, f32_dot),
    f16: |tile| fill(tile, f16_dot),
    bf16: |tile| fill(tile, bf16_dot),
    q8_0: |tile| fill(tile, q8_0_dot),
    q4_0: |tile| fill(tile, q4_0_dot),
    q4_k: |tile| fill(tile, q4_k_dot),
    q5_k: |tile| fill(tile, q5_k_dot),
    q6_k: |tile| fill(tile, q6_k_dot),
    vq: vq::tile::<Q8>,
    widen,
    halves: |lines, x, out| kv::halves(widen, lines, x, out),
    pairs: |pairs, out| kv::pairs(pairs, out),
};

/// What unpacked codes are multiplied by.
struct Q8;

impl vq::Q8 for Q8 {
    const TILE: TileFn = |tile| fill(tile, q8_0_dot);
}

fn fill(tile: &Tile<'_>, dot: impl Fn(&[u8], ActRow<'_>) -> f32) {
    for r in 0..tile.rows {
        for (i, x) in tile.x.iter().enumerate() {
            // SAFETY: `TileFn` requires `out` to be valid for every row and activation row.
            unsafe { tile.store(i, r, [dot(tile.row(r), *x)]) };
        }
    }
}

fn widen(halves: &[u8], out: &mut [f32]) {
    for (out, half) in out.iter_mut().zip(halves.as_chunks::<2>().0) {
        *out = f16::from_le_bytes(*half).to_f32();
    }
}

fn f32_dot(w: &[u8], x: ActRow<'_>) -> f32 {
    let (w, _) = w.as_chunks::<4>();
    w.iter().zip(x.values).map(|(w, x)| f32::from_le_bytes(*w) * x).sum()
}

fn f16_dot(w: &[u8], x: ActRow<'_>) -> f32 {
    let (w, _) = w.as_chunks::<2>();
    w.iter().zip(x.values).map(|(w, x)| f16::from_le_bytes(*w).to_f32() * x).sum()
}

fn bf16_dot(w: &[u8], x: ActRow<'_>) -> f32 {
    let (w, _) = w.as_chunks::<2>();
    w.iter().zip(x.values).map(|(w, x)| bf16::from_le_bytes(*w).to_f32() * x).sum()
}

fn q8_0_dot(w: &[u8], x: ActRow<'_>) -> f32 {
    block_dot::<{ q8_0::BYTES }>(w, x, |w, i| i32::from(w[q8_0::QS + i] as i8))
}

fn q4_0_dot(w: &[u8], x: ActRow<'_>) -> f32 {
    block_dot::<{ q4_0::BYTES }>(w, x, |w, i| {
        let both = w[q4_0::QS + i % 16];
        i32::from(if i < 16 { both & 0x0f } else { both >> 4 }) - 8
    })
}

/// Blocks of 32: `value(block, i)` is value `i`.
fn block_dot<const BYTES: usize>(
    w: &[u8],
    x: ActRow<'_>,
    value: impl Fn(&[u8], usize) -> i32,
) -> f32 {
    let mut sums = Sums::new();
    for (b, w) in w.as_chunks::<BYTES>().0.iter().enumerate() {
        let products = (0..32).map(|i| value(w, i) * i32::from(x.q[32 * b + i]));
        sums.add(b, products.sum(), f16_at(w, 0) * x.d[b]);
    }
    sums.total()
}

fn q4_k_dot(w: &[u8], x: ActRow<'_>) -> f32 {
    k_dot::<{ q4_k::BYTES }>(w, x, |w, j, i| {
        let q = w[q4_k::QS + 32 * (j / 2) + i];
        if j % 2 == 0 { q & 0x0f } else { q >> 4 }
    })
}

fn q5_k_dot(w: &[u8], x: ActRow<'_>) -> f32 {
    k_dot::<{ q5_k::BYTES }>(w, x, |w, j, i| {
        let q = w[q5_k::QS + 32 * (j / 2) + i];
        let low = if j % 2 == 0 { q & 0x0f } else { q >> 4 };
        low | (((w[q5_k::QH + i] >> j) & 1) << 4)
    })
}

/// Q4_K and Q5_K, whose blocks begin alike: `value(block, j, i)` is value `i` of sub-block `j` of 32.
fn k_dot<const BYTES: usize>(
    w: &[u8],
    x: ActRow<'_>,
    value: impl Fn(&[u8], usize, usize) -> u8,
) -> f32 {
    let (blocks, _) = w.as_chunks::<BYTES>();
    let mut total = Sums::new();
    for (b, w) in blocks.iter().enumerate() {
        let (q, sums) = (&x.q[256 * b..][..256], &x.sums[16 * b..][..16]);
        let (mut scaled, mut minima) = (0, 0);
        for j in 0..8 {
            let (scale, min) = scale_min(j, &w[q4_k::SCALES..]);
            let products = (0..32).map(|i| i32::from(value(w, j, i)) * i32::from(q[32 * j + i]));
            scaled += i32::from(scale) * products.sum::<i32>();
            minima += i32::from(min) * (i32::from(sums[2 * j]) + i32::from(sums[2 * j + 1]));
        }
        total.add(b, scaled, f16_at(w, 0) * x.d[b]);
        total.add(b, -minima, f16_at(w, 2) * x.d[b]);
    }
    total.total()
}

fn q6_k_dot(w: &[u8], x: ActRow<'_>) -> f32 {
    let mut total = Sums::new();
    for (b, w) in w.chunks_exact(q6_k::BYTES).enumerate() {
        let q = &x.q[256 * b..][..256];
        let mut scaled = 0;
        for (v, q) in q.iter().enumerate() {
            let (half, pair, i) = (v / 128, v / 32 % 4, v % 32);
            let nibbles = w[64 * half + 32 * (pair % 2) + i];
            let low = if pair < 2 { nibbles & 0x0f } else { nibbles >> 4 };
            let high = (w[q6_k::QH + 32 * half + i] >> (2 * pair)) & 3;
            let value = i32::from(low | (high << 4)) - 32;
            scaled += i32::from(w[q6_k::SCALES + v / 16] as i8) * value * i32::from(*q);
        }
        total.add(b, scaled, f16_at(w, q6_k::D) * x.d[b]);
    }
    total.total()
}
