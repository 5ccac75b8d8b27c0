//! Weight types and a borrowed weight matrix.

use crate::quant::vq;

/// How a tensor's values are stored. Block layouts: ggml's `ggml-common.h`.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GgmlType {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 4-bit, blocks of 32 with an f16 scale.
    Q4_0,
    /// 8-bit, blocks of 32 with an f16 scale.
    Q8_0,
    /// 4-bit, super-blocks of 256 with 6-bit scales and minima.
    Q4_K,
    /// 5-bit, super-blocks of 256 with 6-bit scales and minima.
    Q5_K,
    /// 6-bit, super-blocks of 256 with 8-bit scales.
    Q6_K,
    /// 16-bit brain float.
    BF16,
    /// Vector-quantised, so many weights a byte (2, 3, 4, 6, 8, 12, 16 or 24); a row is an f16 scale and its codes. Not
    /// one of ggml's: in a file the rows are I8, and the tensor's name says what they are.
    Vq(u8),
}

/// Each type with its id in GGUF, its name, values a block and bytes a block.
const TABLE: [(GgmlType, u32, &str, usize, usize); 8] = [
    (GgmlType::F32, 0, "F32", 1, 4),
    (GgmlType::F16, 1, "F16", 1, 2),
    (GgmlType::Q4_0, 2, "Q4_0", 32, 18),
    (GgmlType::Q8_0, 8, "Q8_0", 32, 34),
    (GgmlType::Q4_K, 12, "Q4_K", 256, 144),
    (GgmlType::Q5_K, 13, "Q5_K", 256, 176),
    (GgmlType::Q6_K, 14, "Q6_K", 256, 210),
    (GgmlType::BF16, 30, "BF16", 1, 2),
];

/// ggml's id of 8-bit integers, as which codes are stored.
pub(crate) const I8_ID: u32 = 24;

impl GgmlType {
    /// Every type of ggml's that is supported.
    pub fn all() -> impl Iterator<Item = GgmlType> {
        TABLE.iter().map(|row| row.0)
    }

    /// The type with this id in a GGUF tensor directory, if it is supported.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        TABLE.iter().find(|row| row.1 == id).map(|row| row.0)
    }

    /// The mean squared error of a vector-quantised type on Gaussians of variance 1, as `tools/make_codebooks.py` prints
    /// it.
    ///
    /// # Panics
    /// If it is none.
    pub fn gaussian_distortion(self) -> f64 {
        let at = vq::TABLE.iter().position(|row| row.0 == self);
        vq::DISTORTION[at.expect("a vector-quantised type")]
    }

    /// Every vector-quantised type, the most bits first.
    pub fn vqs() -> impl DoubleEndedIterator<Item = GgmlType> {
        vq::DIMS.iter().map(|dim| GgmlType::Vq(*dim as u8))
    }

    fn row(self) -> &'static (GgmlType, u32, &'static str, usize, usize) {
        let tables = TABLE.iter().chain(&vq::TABLE);
        tables.into_iter().find(|row| row.0 == self).expect("every type has a row")
    }

    /// The id in a GGUF tensor directory.
    pub fn id(self) -> u32 {
        self.row().1
    }

    /// The name that ggml gives it.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Values in one block; those of a vector-quantised row come in blocks of activations.
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// Bytes of one block; 0 where a row is no sequence of blocks.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Bytes of a row of `cols` values; `None` where `cols` is no multiple of the block or the size overflows.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        let (len, bytes) = (self.block_len(), self.block_bytes());
        match self {
            _ if !cols.is_multiple_of(len) => None,
            GgmlType::Vq(dim) => vq::row_bytes(dim.into(), cols),
            _ => (cols / len).checked_mul(bytes),
        }
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for GgmlType {
    type Err = String;

    fn from_str(name: &str) -> Result<GgmlType, String> {
        GgmlType::all().find(|ty| ty.name().eq_ignore_ascii_case(name)).ok_or_else(|| {
            let names: Vec<_> = GgmlType::all().map(|ty| ty.name().to_lowercase()).collect();
            format!("unknown weight type `{name}`, expected one of {}", names.join(", "))
        })
    }
}

/// A borrowed weight matrix: `rows` outputs of `cols` inputs each, row after row.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    /// How the values are stored.
    pub ty: GgmlType,
    /// Outputs.
    pub rows: usize,
    /// Inputs; a multiple of the type's block.
    pub cols: usize,
    /// `rows * ty.row_bytes(cols)` bytes.
    pub bytes: &'a [u8],
}
