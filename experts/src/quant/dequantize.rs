//! Weights back to f32, block by block as `ggml-quants.c` describes them. The reference that all else is held to.

use half::{bf16, f16};

use super::blocks::{f16_at, q4_0, q4_k, q5_k, q6_k, q8_0, scale_min};
use super::vq;
use crate::GgmlType;

/// Writes the values of `bytes` to `out`; of a vector-quantised type, one row.
///
/// # Panics
/// Where `bytes` is not exactly `out.len()` values of type `ty`.
pub fn dequantize(ty: GgmlType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(Some(bytes.len()), ty.row_bytes(out.len()), "bytes of {} {ty} values", out.len());
    let block = match ty {
        GgmlType::F32 => f32_value,
        GgmlType::F16 => f16_value,
        GgmlType::BF16 => bf16_value,
        GgmlType::Q8_0 => q8_0_block,
        GgmlType::Q4_0 => q4_0_block,
        GgmlType::Q4_K => q4_k_block,
        GgmlType::Q5_K => q5_k_block,
        GgmlType::Q6_K => q6_k_block,
        GgmlType::Vq(dim) => return vq::dequantize_row(dim.into(), bytes, out),
    };
    let blocks = bytes.chunks_exact(ty.block_bytes()).zip(out.chunks_exact_mut(ty.block_len()));
    for (bytes, out) in blocks {
        block(bytes, out);
    }
}

fn f32_value(bytes: &[u8], out: &mut [f32]) {
    out[0] = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
}

fn f16_value(bytes: &[u8], out: &mut [f32]) {
    out[0] = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
}

fn bf16_value(bytes: &[u8], out: &mut [f32]) {
    out[0] = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
}

fn q8_0_block(bytes: &[u8], out: &mut [f32]) {
    let d = f16_at(bytes, 0);
    for (out, q) in out.iter_mut().zip(&bytes[q8_0::QS..]) {
        *out = d * f32::from(*q as i8);
    }
}

fn q4_0_block(bytes: &[u8], out: &mut [f32]) {
    let d = f16_at(bytes, 0);
    for (i, q) in bytes[q4_0::QS..].iter().enumerate() {
        out[i] = d * (f32::from(q & 0x0f) - 8.0);
        out[i + 16] = d * (f32::from(q >> 4) - 8.0);
    }
}

fn q4_k_block(bytes: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(bytes, 0), f16_at(bytes, 2));
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(j, &bytes[q4_k::SCALES..q4_k::QS]);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let chunk = &bytes[q4_k::QS + 32 * (j / 2)..];
        for (out, q) in out.iter_mut().zip(chunk) {
            let q = if j % 2 == 0 { q & 0x0f } else { q >> 4 };
            *out = scale * f32::from(q) - min;
        }
    }
}

fn q5_k_block(bytes: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(bytes, 0), f16_at(bytes, 2));
    let qh = &bytes[q5_k::QH..q5_k::QS];
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(j, &bytes[q5_k::SCALES..q5_k::QH]);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let chunk = &bytes[q5_k::QS + 32 * (j / 2)..];
        for ((out, q), qh) in out.iter_mut().zip(chunk).zip(qh) {
            let low = if j % 2 == 0 { q & 0x0f } else { q >> 4 };
            *out = scale * f32::from(low | (((qh >> j) & 1) << 4)) - min;
        }
    }
}

fn q6_k_block(bytes: &[u8], out: &mut [f32]) {
    let d = f16_at(bytes, q6_k::D);
    let scales = &bytes[q6_k::SCALES..q6_k::D];
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        // Sub-block j of 32: half j / 4 of the block, bit pair j % 4.
        let (half, pair) = (j / 4, j % 4);
        let nibbles = &bytes[64 * half + 32 * (pair % 2)..];
        let pairs = &bytes[q6_k::QH + 32 * half..];
        for (i, out) in out.iter_mut().enumerate() {
            let low = if pair < 2 { nibbles[i] & 0x0f } else { nibbles[i] >> 4 };
            let q = low | (((pairs[i] >> (2 * pair)) & 3) << 4);
            let scale = f32::from(scales[2 * j + i / 16] as i8);
            *out = d * scale * (f32::from(q) - 32.0);
        }
    }
}
