//! f32 to every weight type but vector-quantised ones: round to nearest, plain minimum and maximum a block. Good enough for
//! tests and benchmarks, which are all that uses it; a model for use is quantised by tools that search for better scales.

use half::{bf16, f16};

use super::blocks::{f16_at, pack_scales_mins, q4_0, q4_k, q5_k, q6_k, scale_min};
use crate::GgmlType;

/// Appends `src` in type `ty` to `out`.
///
/// # Panics
/// Where `src` is no whole number of blocks, or `ty` is vector-quantised: see [`crate::vq`].
pub fn quantize(ty: GgmlType, src: &[f32], out: &mut Vec<u8>) {
    assert!(
        src.len().is_multiple_of(ty.block_len()),
        "{} values are no whole {ty} blocks",
        src.len()
    );
    out.reserve(src.len() / ty.block_len() * ty.block_bytes());
    let block = match ty {
        GgmlType::F32 => |x: &[f32], out: &mut Vec<u8>| out.extend(x[0].to_le_bytes()),
        GgmlType::F16 => |x: &[f32], out: &mut Vec<u8>| put_f16(x[0], out),
        GgmlType::BF16 => {
            |x: &[f32], out: &mut Vec<u8>| out.extend(bf16::from_f32(x[0]).to_le_bytes())
        }
        GgmlType::Q8_0 => q8_0_block,
        GgmlType::Q4_0 => q4_0_block,
        GgmlType::Q4_K => q4_k_block,
        GgmlType::Q5_K => q5_k_block,
        GgmlType::Q6_K => q6_k_block,
        GgmlType::Vq(_) => panic!("{ty} rows are made by a vq::Encoder"),
    };
    for x in src.chunks_exact(ty.block_len()) {
        block(x, out);
    }
}

fn put_f16(x: f32, out: &mut Vec<u8>) {
    out.extend(f16::from_f32(x).to_le_bytes());
}

/// `1 / x`, or 0 where a block of zeros has no scale.
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// The value with the greatest magnitude, with its sign.
fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |most, x| if x.abs() > most.abs() { *x } else { most })
}

/// `quantize_row_q8_0_ref`.
fn q8_0_block(x: &[f32], out: &mut Vec<u8>) {
    let d = extreme(x).abs() / 127.0;
    let id = inverse(d);
    put_f16(d, out);
    out.extend(x.iter().map(|x| (x * id).round() as i8 as u8));
}

/// `quantize_row_q4_0_ref`.
fn q4_0_block(x: &[f32], out: &mut Vec<u8>) {
    let d = extreme(x) / -8.0;
    let id = inverse(d);
    let nibble = |x: f32| (x * id + 8.5).clamp(0.0, 15.0) as u8;
    put_f16(d, out);
    out.extend((0..q4_0::BYTES - q4_0::QS).map(|i| nibble(x[i]) | (nibble(x[i + 16]) << 4)));
}

fn q4_k_block(x: &[f32], out: &mut Vec<u8>) {
    let start = out.len();
    let q = k_levels(x, 15.0, out);
    debug_assert_eq!(out.len() - start, q4_k::QS);
    put_nibbles(&q, out);
}

fn q5_k_block(x: &[f32], out: &mut Vec<u8>) {
    let start = out.len();
    let q = k_levels(x, 31.0, out);
    debug_assert_eq!(out.len() - start, q5_k::QH);
    out.extend((0..32).map(|i| (0..8).fold(0, |bits, j| bits | ((q[32 * j + i] >> 4) << j))));
    put_nibbles(&q, out);
}

/// The head of a Q4_K or Q5_K block (scales and minima), and each value's level in `0..=levels`.
fn k_levels(x: &[f32], levels: f32, out: &mut Vec<u8>) -> [u8; 256] {
    let (mut scales, mut mins) = ([0f32; 8], [0f32; 8]);
    for (j, x) in x.chunks_exact(32).enumerate() {
        let min = x.iter().fold(0f32, |min, x| min.min(*x));
        let max = x.iter().fold(min, |max, x| max.max(*x));
        scales[j] = (max - min) / levels;
        mins[j] = -min;
    }
    let d = scales.iter().fold(0f32, |most, s| most.max(*s)) / 63.0;
    let dmin = mins.iter().fold(0f32, |most, m| most.max(*m)) / 63.0;
    let (id, idmin) = (inverse(d), inverse(dmin));
    let start = out.len();
    put_f16(d, out);
    put_f16(dmin, out);
    out.extend(pack_scales_mins(
        scales.map(|s| (s * id).round() as u8),
        mins.map(|m| (m * idmin).round() as u8),
    ));

    // Levels against the scales as they are stored, so that their rounding does not add up with the values'.
    let (d, dmin) = (f16_at(out, start), f16_at(out, start + 2));
    let mut q = [0; 256];
    for (v, q) in q.iter_mut().enumerate() {
        let (scale, min) = scale_min(v / 32, &out[start + 4..]);
        let level = (x[v] + dmin * f32::from(min)) * inverse(d * f32::from(scale));
        *q = level.round().clamp(0.0, levels) as u8;
    }
    q
}

/// The nibbles of Q4_K and Q5_K: sub-blocks `2c` low and `2c + 1` high.
fn put_nibbles(q: &[u8; 256], out: &mut Vec<u8>) {
    for pair in q.chunks_exact(64) {
        out.extend((0..32).map(|i| (pair[i] & 0x0f) | (pair[i + 32] << 4)));
    }
}

fn q6_k_block(x: &[f32], out: &mut Vec<u8>) {
    let mut scales = [0f32; 16];
    for (scale, x) in scales.iter_mut().zip(x.chunks_exact(16)) {
        *scale = extreme(x) / -32.0;
    }
    let d = extreme(&scales) / -128.0;
    let id = inverse(d);
    let scales = scales.map(|s| (s * id).round().clamp(-128.0, 127.0) as i8);
    let stored = f16::from_f32(d).to_f32();
    let mut q = [0u8; 256];
    for (v, q) in q.iter_mut().enumerate() {
        let level = x[v] * inverse(stored * f32::from(scales[v / 16]));
        *q = (level.round().clamp(-32.0, 31.0) + 32.0) as u8;
    }

    let start = out.len();
    for half in q.chunks_exact(128) {
        out.extend((0..64).map(|i| (half[i] & 0x0f) | ((half[i + 64] & 0x0f) << 4)));
    }
    for half in q.chunks_exact(128) {
        out.extend(
            (0..32).map(|i| (0..4).fold(0, |bits, k| bits | ((half[32 * k + i] >> 4) << (2 * k)))),
        );
    }
    out.extend(scales.map(|s| s as u8));
    debug_assert_eq!(out.len() - start, q6_k::D);
    put_f16(d, out);
}
