//! How a matrix of numbers lies in a `bytes` field.
//!
//! All scales of the matrix come first, then all quants, little-endian. The 8-bit blocks are those
//! that ggml's kernels make of activations (`block_q8_0`, `block_q8_K`), so that the compact form
//! loses nothing against computing at home.

use bytes::Bytes;
use half::{f16, slice::HalfFloatSliceExt};

use crate::v1::Encoding;

/// Values that share one scale in [`Encoding::Q80`].
pub const Q8_0_BLOCK: usize = 32;
/// Values that share one scale in [`Encoding::Q8K`].
pub const Q8_K_BLOCK: usize = 256;

impl Encoding {
    /// Bytes of a matrix of `rows` x `cols` values; `None` where `cols` is no multiple of the
    /// block, the size overflows, or the encoding is unspecified.
    pub fn bytes(self, rows: usize, cols: usize) -> Option<usize> {
        let values = rows.checked_mul(cols)?;
        let blocks = |len: usize| cols.is_multiple_of(len).then_some(values / len);
        match self {
            Encoding::Unspecified => None,
            Encoding::F32 => values.checked_mul(4),
            Encoding::F16 => values.checked_mul(2),
            Encoding::F48 => values.checked_mul(6),
            Encoding::Q80 => blocks(Q8_0_BLOCK)?.checked_mul(2)?.checked_add(values),
            Encoding::Q8K => blocks(Q8_K_BLOCK)?.checked_mul(4)?.checked_add(values),
        }
    }
}

/// A matrix that came over the wire: of the right size, every number finite.
#[derive(Clone, Debug, PartialEq)]
pub enum Decoded {
    /// Plain values, `[rows, cols]`; from [`Encoding::F32`] or [`Encoding::F16`].
    F32(Vec<f32>),
    /// Blocks of 32.
    Q80 {
        /// A scale a block, `[rows, cols / 32]`.
        scales: Vec<f32>,
        /// `[rows, cols]`.
        quants: Vec<i8>,
    },
    /// Blocks of 256.
    Q8K {
        /// A scale a block, `[rows, cols / 256]`.
        scales: Vec<f32>,
        /// `[rows, cols]`.
        quants: Vec<i8>,
    },
}

/// Why bytes are not the matrix that they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodingError {
    /// The encoding cannot hold a matrix of this shape.
    #[error("{rows} x {cols} values do not fit encoding {}", encoding.as_str_name())]
    Shape {
        /// The encoding.
        encoding: Encoding,
        /// Rows asked for.
        rows: usize,
        /// Values a row asked for.
        cols: usize,
    },
    /// Too few or too many bytes.
    #[error("{found} bytes, expected {expected} for {rows} x {cols} values as {}", encoding.as_str_name())]
    Size {
        /// The encoding.
        encoding: Encoding,
        /// Rows asked for.
        rows: usize,
        /// Values a row asked for.
        cols: usize,
        /// Bytes that came.
        found: usize,
        /// Bytes that such a matrix takes.
        expected: usize,
    },
    /// A NaN or an infinity.
    #[error("{what} {index} is not finite")]
    NotFinite {
        /// "value" or "scale".
        what: &'static str,
        /// The first such one.
        index: usize,
    },
}

/// Unpacks activations, `[rows, cols]`, from any encoding but [`Encoding::F48`], which is for sums.
pub fn decode(
    encoding: Encoding,
    rows: usize,
    cols: usize,
    bytes: &[u8],
) -> Result<Decoded, EncodingError> {
    check_size(encoding, rows, cols, bytes)?;
    // Of blocks. The product cannot overflow: as many bytes are there.
    let split = || bytes.split_at(bytes.len() - rows * cols);
    match encoding {
        Encoding::F32 => Ok(Decoded::F32(finite("value", f32s(bytes))?)),
        Encoding::F16 => Ok(Decoded::F32(finite("value", f16s(bytes))?)),
        Encoding::Q80 => {
            let (scales, quants) = split();
            Ok(Decoded::Q80 { scales: finite("scale", f16s(scales))?, quants: i8s(quants) })
        }
        Encoding::Q8K => {
            let (scales, quants) = split();
            Ok(Decoded::Q8K { scales: finite("scale", f32s(scales))?, quants: i8s(quants) })
        }
        Encoding::Unspecified | Encoding::F48 => Err(EncodingError::Shape { encoding, rows, cols }),
    }
}

/// Unpacks sums, `[rows, cols]`, from any encoding but blocks, with every digit that came.
pub fn decode_sums(
    encoding: Encoding,
    rows: usize,
    cols: usize,
    bytes: &[u8],
) -> Result<Vec<f64>, EncodingError> {
    check_size(encoding, rows, cols, bytes)?;
    let widen = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
    let sums = match encoding {
        Encoding::F32 => widen(f32s(bytes)),
        Encoding::F16 => widen(f16s(bytes)),
        Encoding::F48 => f48s(bytes),
        Encoding::Unspecified | Encoding::Q80 | Encoding::Q8K => {
            return Err(EncodingError::Shape { encoding, rows, cols });
        }
    };
    finite("value", sums)
}

/// Before anything is allocated.
fn check_size(
    encoding: Encoding,
    rows: usize,
    cols: usize,
    bytes: &[u8],
) -> Result<(), EncodingError> {
    let expected =
        encoding.bytes(rows, cols).ok_or(EncodingError::Shape { encoding, rows, cols })?;
    match bytes.len() {
        found if found == expected => Ok(()),
        found => Err(EncodingError::Size { encoding, rows, cols, found, expected }),
    }
}

/// Packs `values` as [`Encoding::F32`].
pub fn encode_f32(values: &[f32]) -> Bytes {
    let mut out = Vec::with_capacity(values.len() * 4);
    put_f32s(values, &mut out);
    out.into()
}

/// Packs `values` as [`Encoding::F16`], rounded to nearest; `None` where one does not fit, which
/// the other side would have to refuse.
pub fn encode_f16(values: &[f32]) -> Option<Bytes> {
    let mut out = Vec::with_capacity(values.len() * 2);
    put_f16s(values, &mut out).then(|| out.into())
}

/// Packs `values` as [`Encoding::F48`], rounded to nearest.
pub fn encode_f48(values: &[f64]) -> Bytes {
    // Half of the last bit that stays; a carry into the exponent is what rounding means there.
    let rounded = values.iter().map(|v| v.to_bits().saturating_add(1 << 15).to_le_bytes());
    rounded.flat_map(|b| [b[2], b[3], b[4], b[5], b[6], b[7]]).collect::<Vec<u8>>().into()
}

/// Packs blocks of 32 as [`Encoding::Q80`]: a scale for every 32 of `quants`, each of which an f16
/// holds exactly.
///
/// # Panics
/// Where the numbers of scales and quants do not belong together.
pub fn encode_q8_0(scales: &[f32], quants: &[i8]) -> Bytes {
    assert_eq!(scales.len() * Q8_0_BLOCK, quants.len(), "one scale a block of 32");
    let mut out = Vec::with_capacity(scales.len() * 2 + quants.len());
    put_f16s(scales, &mut out);
    out.extend(quants.iter().map(|&q| q as u8));
    out.into()
}

/// Packs blocks of 256 as [`Encoding::Q8K`]: a scale for every 256 of `quants`.
///
/// # Panics
/// Where the numbers of scales and quants do not belong together.
pub fn encode_q8_k(scales: &[f32], quants: &[i8]) -> Bytes {
    assert_eq!(scales.len() * Q8_K_BLOCK, quants.len(), "one scale a block of 256");
    let mut out = Vec::with_capacity(scales.len() * 4 + quants.len());
    put_f32s(scales, &mut out);
    out.extend(quants.iter().map(|&q| q as u8));
    out.into()
}

/// Checks that every value is finite as an f32, which is what sums become in the end.
fn finite<T: Copy + Into<f64>>(
    what: &'static str,
    values: Vec<T>,
) -> Result<Vec<T>, EncodingError> {
    match values.iter().position(|&v| !(v.into() as f32).is_finite()) {
        None => Ok(values),
        Some(index) => Err(EncodingError::NotFinite { what, index }),
    }
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn f16s(bytes: &[u8]) -> Vec<f32> {
    let halves: Vec<f16> = bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)).collect();
    let mut out = vec![0.0; halves.len()];
    halves.convert_to_f32_slice(&mut out);
    out
}

fn f48s(bytes: &[u8]) -> Vec<f64> {
    let widen = |b: &[u8; 6]| f64::from_le_bytes([0, 0, b[0], b[1], b[2], b[3], b[4], b[5]]);
    bytes.as_chunks().0.iter().map(widen).collect()
}

fn i8s(bytes: &[u8]) -> Vec<i8> {
    bytes.iter().map(|&b| b as i8).collect()
}

fn put_f32s(values: &[f32], out: &mut Vec<u8>) {
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
}

/// Whether every value is finite as an f16.
fn put_f16s(values: &[f32], out: &mut Vec<u8>) -> bool {
    let mut halves = vec![f16::ZERO; values.len()];
    halves.convert_from_f32_slice(values);
    out.extend(halves.iter().flat_map(|h| h.to_le_bytes()));
    halves.iter().all(|h| h.is_finite())
}

#[cfg(test)]
mod tests;
