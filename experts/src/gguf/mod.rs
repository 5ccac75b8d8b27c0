//! GGUF, versions 2 and 3, little-endian: the format of llama.cpp's model files
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
//!
//! A file is a header (magic, version, counts), metadata, a tensor directory, padding, and the tensors' bytes.
//! [`Header::parse`] reads all but the bytes, out of any slice; [`Gguf`] adds the mapped files of one model.

mod cursor;
mod directory;
mod fingerprint;
mod header;
mod metadata;
mod shards;
mod value;
mod writer;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use directory::TensorInfo;
pub use fingerprint::Fingerprint;
pub use header::Header;
pub use metadata::Metadata;
pub use value::{Array, Value};
pub use writer::{Layout, Writer, check_output};

use crate::error::{Mismatch, Result};
use crate::map::Mapping;
use crate::tensor::Tensor;
use crate::types::GgmlType;

/// An open model file, of one or several shards: metadata, tensor directory and mapped bytes.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    meta: Metadata,
    tensors: Vec<TensorInfo>,
    /// From a name to its place in `tensors`.
    by_name: HashMap<Arc<str>, usize>,
    shards: Vec<Arc<Mapping>>,
    fingerprint: Fingerprint,
}

impl Gguf {
    /// Opens a model file; from the name of any shard (`…-00001-of-0000N.gguf`), all of them.
    ///
    /// # Errors
    /// Whatever is wrong with a header, a metadata key, a tensor or the set of shards, each naming its file.
    pub fn open(path: &Path) -> Result<Gguf> {
        let shards::Joined { meta, tensors, shards } = shards::open(path)?;
        let fingerprint = fingerprint::of(&meta, &tensors, &shards)?;
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.shared_name(), i)).collect();
        Ok(Gguf { path: path.to_owned(), meta, tensors, by_name, shards, fingerprint })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata, of all shards.
    pub fn meta(&self) -> &Metadata {
        &self.meta
    }

    /// The length of all shards, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.len() as u64).sum()
    }

    /// The mapped shards, in order.
    pub fn shards(&self) -> &[Arc<Mapping>] {
        &self.shards
    }

    /// Every tensor, shard by shard in the order of its directory.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] if it is not there, or its type is not supported.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.find(name)?.ok_or_else(|| {
            Mismatch::new("no such tensor", "one of this name").in_tensor(&self.path, name)
        })
    }

    /// The tensor of this name, if it is there.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] if it is there, but its type is not supported.
    pub fn find(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(&at) = self.by_name.get(name) else { return Ok(None) };
        let info = &self.tensors[at];
        let mapping = &self.shards[info.shard()];
        info.open(mapping).map(Some)
    }

    /// The vector-quantised matrix of this name, `[cols, rows]`, whose rows the file has as I8.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] if it is there, but is no such matrix.
    pub fn find_codes(&self, name: &str, ty: GgmlType, dims: &[usize]) -> Result<Option<Tensor>> {
        let Some(&at) = self.by_name.get(name) else { return Ok(None) };
        let info = &self.tensors[at];
        info.open_codes(&self.shards[info.shard()], ty, dims).map(Some)
    }

    /// What tells this model from every other; see [`Fingerprint`].
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}
