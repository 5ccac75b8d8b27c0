//! A tensor: a typed, named range of a mapped file.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::error::{Mismatch, Result};
use crate::map::Mapping;
use crate::quant::dequantize;
use crate::types::{GgmlType, Mat};

/// A view of a tensor's bytes in the map. Cloning copies no weights.
#[derive(Clone, Debug)]
pub struct Tensor {
    name: Arc<str>,
    ty: GgmlType,
    dims: Dims,
    mapping: Arc<Mapping>,
    range: Range<usize>,
    seal: Option<Arc<Seal>>,
}

/// What the bytes of a tensor are known by, and whether they are right, once that was looked at.
#[derive(Debug)]
struct Seal {
    checksum: u64,
    sound: OnceLock<bool>,
}

/// The first eight bytes of the BLAKE3 hash, little-endian.
pub fn checksum(bytes: &[u8]) -> u64 {
    let hash = blake3::hash(bytes);
    let (first, _) = hash.as_bytes().split_first_chunk().expect("32 bytes");
    u64::from_le_bytes(*first)
}

impl Tensor {
    /// `range` lies in the file and has the size that type and dimensions ask for: the directory checked both.
    pub(crate) fn new(
        name: Arc<str>,
        ty: GgmlType,
        dims: Dims,
        mapping: Arc<Mapping>,
        range: Range<usize>,
    ) -> Tensor {
        let tensor = Tensor { name, ty, dims, mapping, range, seal: None };
        debug_assert_eq!(tensor.row_bytes() * tensor.rows(), tensor.byte_len());
        tensor
    }

    /// The name in the file; a slice keeps its tensor's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How the values are stored.
    pub fn ty(&self) -> GgmlType {
        self.ty
    }

    /// One to four dimensions, the fastest first as in GGUF.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Values a row: the fastest dimension.
    pub fn cols(&self) -> usize {
        self.dims[0]
    }

    /// Rows: the product of the other dimensions.
    pub fn rows(&self) -> usize {
        self.dims[1..].iter().product()
    }

    /// The stored bytes, in the map.
    pub fn bytes(&self) -> &[u8] {
        &self.mapping.bytes()[self.range.clone()]
    }

    /// The number of stored bytes.
    pub fn byte_len(&self) -> usize {
        self.range.len()
    }

    /// The file that holds the bytes.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Where the bytes lie in [`Tensor::mapping`].
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Expert `e` of a stack of matrices: a slice along the slowest of three dimensions.
    ///
    /// # Panics
    /// If the tensor has no three dimensions, or no expert `e`.
    pub fn expert(&self, e: usize) -> Tensor {
        let &[cols, rows, experts] = self.dims() else {
            panic!("`{}` is no stack of experts: {:?}", self.name, self.dims())
        };
        assert!(e < experts, "`{}` has {experts} experts, no expert {e}", self.name);
        let bytes = self.byte_len() / experts;
        let start = self.range.start + e * bytes;
        let dims = Dims::new(&[cols, rows]).expect("two dimensions");
        Tensor { dims, range: start..start + bytes, seal: None, ..self.clone() }
    }

    /// A range of rows, as a matrix.
    ///
    /// # Panics
    /// If the range leaves the tensor.
    pub fn rows_slice(&self, rows: Range<usize>) -> Tensor {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows(),
            "`{}` has {} rows, not {rows:?}",
            self.name,
            self.rows()
        );
        let row = self.row_bytes();
        let range = self.range.start + rows.start * row..self.range.start + rows.end * row;
        let dims = Dims::new(&[self.cols(), rows.len()]).expect("two dimensions");
        Tensor { dims, range, seal: None, ..self.clone() }
    }

    /// The same values under other dimensions, of the same row length and number of rows.
    pub(crate) fn with_dims(self, dims: &[usize]) -> Tensor {
        let dims = Dims::new(dims).expect("one to four dimensions");
        debug_assert_eq!(dims.iter().product::<usize>(), self.dims.iter().product());
        Tensor { dims, ..self }
    }

    /// The same tensor, whose bytes are to have this checksum.
    pub(crate) fn sealed(self, checksum: u64) -> Tensor {
        Tensor { seal: Some(Arc::new(Seal { checksum, sound: OnceLock::new() })), ..self }
    }

    /// Whether the file still has the bytes, and, the first time, whether they are those that were written. Touching what
    /// was cut off kills the process.
    ///
    /// # Errors
    /// [`Error::Truncated`](crate::Error::Truncated); [`Error::Tensor`](crate::Error::Tensor) where the checksum is another.
    pub fn check(&self) -> Result<()> {
        self.mapping.check_length(self.range.end)?;
        let Some(seal) = &self.seal else { return Ok(()) };
        let look = || {
            let sound = checksum(self.bytes()) == seal.checksum;
            if !sound {
                let (tensor, path) = (self.name(), self.mapping.path().display());
                tracing::warn!(tensor, %path, "bytes went bad: the expert is as good as missing");
            }
            sound
        };
        if *seal.sound.get_or_init(look) {
            return Ok(());
        }
        let mismatch = Mismatch::new("bytes of another checksum", "those that were written");
        Err(mismatch.in_tensor(self.mapping.path(), &self.name))
    }

    /// The tensor as a matrix of `rows()` rows.
    pub fn mat(&self) -> Mat<'_> {
        Mat { ty: self.ty, rows: self.rows(), cols: self.cols(), bytes: self.bytes() }
    }

    /// The values as f32, copied; for small tensors and tests.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows() * self.cols()];
        let rows =
            self.bytes().chunks_exact(self.row_bytes()).zip(values.chunks_exact_mut(self.cols()));
        rows.for_each(|(bytes, values)| dequantize(self.ty, bytes, values));
        values
    }

    fn row_bytes(&self) -> usize {
        self.ty.row_bytes(self.cols()).expect("the directory checked the row")
    }
}

/// One to four dimensions whose product is a number, held in place: slicing a tensor for every expert of every token allocates nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dims {
    len: usize,
    dims: [usize; Dims::MAX],
}

impl Dims {
    pub(crate) const MAX: usize = 4;

    /// `None` unless there are one to four, and their product fits.
    pub(crate) fn new(dims: &[usize]) -> Option<Dims> {
        if dims.is_empty() || dims.len() > Dims::MAX {
            return None;
        }
        dims.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))?;
        let mut held = [1; Dims::MAX];
        held[..dims.len()].copy_from_slice(dims);
        Some(Dims { len: dims.len(), dims: held })
    }
}

impl std::ops::Deref for Dims {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.dims[..self.len]
    }
}
