//! Vector-quantised weights: one byte for `dim` weights, which is the index of a vector in a fixed codebook.
//!
//! A row is an f16 scale, then its codes; the last code's surplus values are not used. The codebooks are good
//! quantisers of Gaussians (`tools/make_codebooks.py`), the same for every model, so that a row explains itself. After
//! van Baalen et al., "GPTVQ: The Blessing of Dimensionality for LLM Quantization", arXiv 2402.15319, whose codebooks
//! are learned for each model: here that gained nothing.
//!
//! There is no kernel for them: rows are unpacked to Q8_0 blocks in the first-level cache, and multiplied as those.

use std::sync::LazyLock;

use super::blocks::{f16_at, q8_0};
use super::{Tile, TileFn};
use crate::GgmlType;
use crate::types::I8_ID;

/// Weights a code, of every codebook, ascending.
pub(crate) const DIMS: [usize; 8] = [2, 3, 4, 6, 8, 12, 16, 24];
/// As the table of ggml's types.
pub(crate) const TABLE: [(GgmlType, u32, &str, usize, usize); 8] = [
    (GgmlType::Vq(2), I8_ID, "VQ2", 32, 0),
    (GgmlType::Vq(3), I8_ID, "VQ3", 32, 0),
    (GgmlType::Vq(4), I8_ID, "VQ4", 32, 0),
    (GgmlType::Vq(6), I8_ID, "VQ6", 32, 0),
    (GgmlType::Vq(8), I8_ID, "VQ8", 32, 0),
    (GgmlType::Vq(12), I8_ID, "VQ12", 32, 0),
    (GgmlType::Vq(16), I8_ID, "VQ16", 32, 0),
    (GgmlType::Vq(24), I8_ID, "VQ24", 32, 0),
];
/// The mean squared error of each codebook on Gaussians of variance 1.
pub(crate) const DISTORTION: [f64; 8] =
    [0.0083, 0.0427, 0.0983, 0.2188, 0.324, 0.4782, 0.5824, 0.7022];
/// Vectors of a codebook.
pub(crate) const SIZE: usize = 256;
/// Steps of a codebook's integers to 1, the standard deviation of the weights that it is made for.
pub(crate) const STEPS: f32 = 32.0;
/// Bytes of a row's scale.
pub(crate) const SCALE_BYTES: usize = 2;
/// Unpacked rows that are multiplied at a time.
const BUFFER_BYTES: usize = 16 << 10;
/// The longest row that fits the buffer.
const MAX_COLS: usize = BUFFER_BYTES / q8_0::BYTES * 32;

/// Every codebook, `SIZE * dim` values each, in the order of [`DIMS`].
static CODEBOOKS: &[u8] = include_bytes!("codebooks.bin");

/// The vectors of one dimension, `[SIZE][dim]`.
pub(crate) fn codebook(dim: usize) -> &'static [i8] {
    static BOOKS: LazyLock<Vec<i8>> =
        LazyLock::new(|| CODEBOOKS.iter().map(|&byte| byte as i8).collect());
    let start: usize = DIMS.iter().take_while(|d| **d != dim).map(|d| SIZE * d).sum();
    &BOOKS[start..][..SIZE * dim]
}

/// Bytes of a row; `None` beyond the longest.
pub(crate) fn row_bytes(dim: usize, cols: usize) -> Option<usize> {
    (cols <= MAX_COLS).then(|| SCALE_BYTES + cols.div_ceil(dim))
}

/// Writes the values of a row.
pub(super) fn dequantize_row(dim: usize, row: &[u8], out: &mut [f32]) {
    let (book, scale) = (codebook(dim), f16_at(row, 0));
    for (code, out) in row[SCALE_BYTES..].iter().zip(out.chunks_mut(dim)) {
        let vector = &book[usize::from(*code) * dim..];
        out.iter_mut().zip(vector).for_each(|(out, q)| *out = scale * f32::from(*q));
    }
}

/// The tile function of an instruction set's Q8_0 kernel.
pub(super) trait Q8 {
    /// The kernel.
    const TILE: TileFn;
}

/// The tile function for `dim` weights a code.
pub(super) fn tile<K: Q8>(dim: u8) -> TileFn {
    match dim {
        2 => unpack_and_multiply::<2, K>,
        3 => unpack_and_multiply::<3, K>,
        4 => unpack_and_multiply::<4, K>,
        6 => unpack_and_multiply::<6, K>,
        8 => unpack_and_multiply::<8, K>,
        12 => unpack_and_multiply::<12, K>,
        16 => unpack_and_multiply::<16, K>,
        24 => unpack_and_multiply::<24, K>,
        _ => unreachable!("there is no codebook of {dim} weights a code"),
    }
}

/// # Safety
/// See [`TileFn`].
unsafe fn unpack_and_multiply<const DIM: usize, K: Q8>(tile: &Tile<'_>) {
    let Some(first) = tile.x.first() else { return };
    let cols = first.q.len();
    let row_bytes = cols / 32 * q8_0::BYTES;
    let mut buffer = [0; BUFFER_BYTES];
    let step = BUFFER_BYTES / row_bytes;
    let (book, _) = codebook(DIM).as_chunks::<DIM>();
    for start in (0..tile.rows).step_by(step) {
        let rows = step.min(tile.rows - start);
        for (r, out) in buffer.chunks_exact_mut(row_bytes).take(rows).enumerate() {
            unpack(book, tile.row(start + r), out);
        }
        let w = &buffer[..rows * row_bytes];
        // SAFETY: by the caller, with `rows` of the tile's rows from `start`; the buffer holds them as whole blocks.
        unsafe { K::TILE(&Tile { w, row_bytes, rows, out: tile.out.add(start), ..*tile }) };
    }
}

/// A row as Q8_0 blocks, all with the row's scale.
#[inline]
fn unpack<const DIM: usize>(book: &[[i8; DIM]], row: &[u8], out: &mut [u8]) {
    /// Codes whose values are whole blocks, whatever the dimension: 32.
    const CODES: usize = 32;
    const MOST: usize = 24;
    let scale = [row[0], row[1]];
    let mut values = [0u8; CODES * MOST];
    let blocks = out.as_chunks_mut::<{ q8_0::BYTES }>().0;
    for (codes, blocks) in row[SCALE_BYTES..].chunks(CODES).zip(blocks.chunks_mut(DIM)) {
        for (code, values) in codes.iter().zip(values.as_chunks_mut::<DIM>().0) {
            *values = book[usize::from(*code)].map(|q| q as u8);
        }
        for (block, values) in blocks.iter_mut().zip(values.as_chunks::<32>().0) {
            block[..q8_0::QS].copy_from_slice(&scale);
            block[q8_0::QS..].copy_from_slice(values);
        }
    }
}
