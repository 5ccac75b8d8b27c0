//! The tensor directory: what each tensor is, and where its bytes lie.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::cursor::Cursor;
use crate::error::{Error, Mismatch, Result};
use crate::map::Mapping;
use crate::tensor::{Dims, Tensor};
use crate::types::{GgmlType, I8_ID};

/// The largest known models have some 2000.
const MAX_TENSORS: u64 = 1 << 20;
/// ggml's `GGML_MAX_NAME`.
pub(super) const MAX_NAME_BYTES: u64 = 64;
/// Name's length, count of dimensions, one dimension, type, offset.
const MIN_ENTRY_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// ggml's names of the types that can be in a file but are not supported; for messages.
const UNSUPPORTED: [(u32, &str); 27] = [
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (4, "Q4_2, which ggml removed"),
    (5, "Q4_3, which ggml removed"),
];

/// One entry of the directory, checked against the file's length.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    name: Arc<str>,
    dims: Dims,
    type_id: u32,
    shard: usize,
    /// In the shard's file. Empty where the type, and so the size, is not known.
    range: Range<usize>,
}

impl TensorInfo {
    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One to four dimensions, the fastest first.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// How the values are stored, if that is supported.
    pub fn ty(&self) -> Option<GgmlType> {
        GgmlType::from_id(self.type_id)
    }

    /// The type's id in the file.
    pub fn type_id(&self) -> u32 {
        self.type_id
    }

    /// The type's name in ggml, supported or not.
    pub fn type_name(&self) -> String {
        let known = UNSUPPORTED.iter().find(|row| row.0 == self.type_id).map(|row| row.1);
        match self.ty().map(GgmlType::name).or(known) {
            Some(name) => name.to_owned(),
            None => format!("unknown type {}", self.type_id),
        }
    }

    /// The shard that holds the bytes, counted from 0.
    pub fn shard(&self) -> usize {
        self.shard
    }

    /// Where the bytes lie in the shard's file; empty if the type is not supported.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    pub(super) fn shared_name(&self) -> Arc<str> {
        self.name.clone()
    }

    pub(super) fn in_shard(self, shard: usize) -> TensorInfo {
        TensorInfo { shard, ..self }
    }

    /// The view of its bytes in its shard.
    pub(super) fn open(&self, shard: &Arc<Mapping>) -> Result<Tensor> {
        let Some(ty) = self.ty() else {
            let supported: Vec<_> = GgmlType::all().map(GgmlType::name).collect();
            let expected = format!("a supported type: {}", supported.join(", "));
            return Err(
                Mismatch::new(self.type_name(), expected).in_tensor(shard.path(), &self.name)
            );
        };
        Ok(Tensor::new(self.name.clone(), ty, self.dims, shard.clone(), self.range.clone()))
    }
}

impl TensorInfo {
    /// The view of rows of codes as the matrix of `dims` that they are.
    pub(super) fn open_codes(
        &self,
        shard: &Arc<Mapping>,
        ty: GgmlType,
        dims: &[usize],
    ) -> Result<Tensor> {
        let stored =
            stored_dims(ty, dims).filter(|stored| self.type_id == I8_ID && self.dims() == stored);
        let (Some(_), Some(dims)) = (stored, Dims::new(dims)) else {
            let found = format!("{} of {:?}", self.type_name(), self.dims());
            let expected = format!("{ty} rows of a {dims:?} matrix");
            return Err(Mismatch::new(found, expected).in_tensor(shard.path(), &self.name));
        };
        Ok(Tensor::new(self.name.clone(), ty, dims, shard.clone(), self.range.clone()))
    }
}

/// The dimensions that a file gives a matrix: rows of codes are rows of bytes.
pub(super) fn stored_dims(ty: GgmlType, dims: &[usize]) -> Option<Vec<usize>> {
    let mut stored = dims.to_vec();
    if let GgmlType::Vq(_) = ty {
        *stored.first_mut()? = ty.row_bytes(dims[0])?;
    }
    Some(stored)
}

/// Reads the directory, and checks every tensor's place: aligned, inside the file, overlapping no other.
pub(super) fn read(
    path: &Path,
    cursor: &mut Cursor,
    count: u64,
    alignment: u64,
    file_len: u64,
) -> Result<Vec<TensorInfo>> {
    let limit = MAX_TENSORS.min(cursor.remaining() as u64 / MIN_ENTRY_BYTES);
    if count > limit {
        let expected = format!("at most {limit} in what is left of the file");
        return Err(Mismatch::new(count.to_string(), expected).in_header(path, "tensor count"));
    }
    let mut entries = Vec::with_capacity(count as usize);
    let mut names = HashSet::with_capacity(count as usize);
    for _ in 0..count {
        let entry = Entry::read(path, cursor)?;
        if !names.insert(entry.name.clone()) {
            let clash = Mismatch::new("the name twice", "each name once");
            return Err(clash.in_tensor(path, &entry.name));
        }
        entries.push(entry);
    }
    // No overflow: the position is at most the file's length, and the alignment is small.
    let data_start = (cursor.position() as u64).next_multiple_of(alignment);
    let tensors = entries
        .into_iter()
        .map(|entry| entry.place(path, data_start, alignment, file_len))
        .collect::<Result<Vec<_>>>()?;
    check_overlaps(path, &tensors)?;
    Ok(tensors)
}

/// A directory entry as the file has it.
struct Entry {
    name: Arc<str>,
    dims: Dims,
    type_id: u32,
    /// From the start of the data.
    offset: u64,
}

impl Entry {
    fn read(path: &Path, cursor: &mut Cursor) -> Result<Entry> {
        let name = cursor.name(MAX_NAME_BYTES).map_err(|m| m.in_header(path, "a tensor's name"))?;
        let rest = |cursor: &mut Cursor| {
            let dims = read_dims(cursor)?;
            Ok(Entry { name: name.into(), dims, type_id: cursor.u32()?, offset: cursor.u64()? })
        };
        rest(cursor).map_err(|m: Mismatch| m.in_tensor(path, name))
    }

    fn place(
        self,
        path: &Path,
        data_start: u64,
        alignment: u64,
        file_len: u64,
    ) -> Result<TensorInfo> {
        let Entry { name, dims, type_id, offset } = self;
        let wrong = |m: Mismatch| m.in_tensor(path, &name);
        if !offset.is_multiple_of(alignment) {
            let found = format!("offset {offset}");
            return Err(wrong(Mismatch::new(found, format!("a multiple of {alignment}"))));
        }
        let size = match GgmlType::from_id(type_id) {
            Some(ty) => byte_len(ty, &dims).map_err(wrong)?,
            // The product fits: `Dims` saw to it.
            None if type_id == I8_ID => dims.iter().product::<usize>() as u64,
            None => 0,
        };
        let range = data_start
            .checked_add(offset)
            .and_then(|start| Some(start..start.checked_add(size)?))
            .filter(|range| range.end <= file_len)
            .and_then(|range| {
                Some(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
            })
            .ok_or_else(|| {
                let found = format!("{size} bytes at offset {offset} of the data");
                let data = file_len.saturating_sub(data_start);
                wrong(Mismatch::new(found, format!("its end within the {data} bytes of data")))
            })?;
        Ok(TensorInfo { name, dims, type_id, shard: 0, range })
    }
}

fn read_dims(cursor: &mut Cursor) -> Result<Dims, Mismatch> {
    let n = cursor.u32()?;
    if !(1..=Dims::MAX as u32).contains(&n) {
        return Err(Mismatch::new(format!("{n} dimensions"), "1 to 4"));
    }
    let mut dims = [1; Dims::MAX];
    for dim in &mut dims[..n as usize] {
        let value = cursor.u64()?;
        *dim = usize::try_from(value).ok().filter(|&d| d > 0).ok_or_else(|| {
            Mismatch::new(format!("a dimension of {value}"), "positive, and in the address space")
        })?;
    }
    let dims = &dims[..n as usize];
    Dims::new(dims)
        .ok_or_else(|| Mismatch::new(format!("dimensions {dims:?}"), "a product below 2^64"))
}

/// The bytes of a tensor, if its rows are whole blocks and the size is a number at all.
pub(super) fn byte_len(ty: GgmlType, dims: &[usize]) -> Result<u64, Mismatch> {
    if !dims[0].is_multiple_of(ty.block_len()) {
        let expected = format!("a multiple of {ty}'s block of {}", ty.block_len());
        return Err(Mismatch::new(format!("rows of {}", dims[0]), expected));
    }
    ty.row_bytes(dims[0])
        .and_then(|row| dims[1..].iter().try_fold(row, |size, &dim| size.checked_mul(dim)))
        .map(|size| size as u64)
        .ok_or_else(|| {
            Mismatch::new(format!("dimensions {dims:?} of {ty}"), "a size below 2^64 bytes")
        })
}

fn check_overlaps(path: &Path, tensors: &[TensorInfo]) -> Result<(), Error> {
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
    for pair in order.windows(2) {
        let [before, after] = pair else { unreachable!("windows of two") };
        // Of an unsupported type only the start is known: two starts must differ still.
        if after.range.start < before.range.end || after.range.start == before.range.start {
            let found = format!("its bytes from {}", after.range.start);
            let expected =
                format!("past tensor `{}`, which ends at {}", before.name, before.range.end);
            return Err(Mismatch::new(found, expected).in_tensor(path, &after.name));
        }
    }
    Ok(())
}
