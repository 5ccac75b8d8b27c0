//! Random-weight models at the dimensions of real ones, so that anybody can measure speed without downloading.
//!
//! The weights are scaled so that activations neither vanish nor explode, and that the gate spreads its choices; the
//! words mean nothing. llama.cpp loads the same files.

mod blocks;
mod shape;
mod tokenizer;

use std::path::Path;

pub use shape::Shape;

use crate::error::{Error, Result};
use crate::gguf::{Layout, Writer};
use crate::types::GgmlType;
use blocks::Fill;

/// Bytes made and written at a time.
const CHUNK_BYTES: usize = 4 << 20;

/// Writes a model of this shape to `path`, with constant memory. The same seed makes the same bytes.
///
/// Matrices are of type `ty`, except that the output head of a K-quantised model is Q6_K and that the router and the
/// norms are F32, as in real files. `progress` hears of tensor bytes: written so far, and in all.
///
/// # Errors
/// As [`Writer`]'s: the disk refuses. What was at the path is then as it was.
pub fn write(
    shape: Shape,
    ty: GgmlType,
    path: &Path,
    seed: u64,
    mut progress: impl FnMut(u64, u64),
) -> Result<()> {
    if let GgmlType::Vq(_) = ty {
        let expected = "a type of ggml's";
        return Err(Error::Setting { what: "weight type", found: ty.to_string(), expected });
    }
    let tensors = shape.tensors(ty);
    let mut layout = Layout::new(path);
    shape.set_metadata(&mut layout, ty);
    tokenizer::set_metadata(&mut layout, shape.dims());
    for tensor in &tensors {
        layout.tensor(&tensor.name, tensor.ty, &tensor.dims)?;
    }
    let total = layout.tensor_bytes();
    let mut writer = Writer::create(layout)?;
    let mut random = blocks::Random::new(seed);
    let mut chunk = Vec::new();
    let mut done = 0;
    for tensor in &tensors {
        let mut blocks = tensor.dims.iter().product::<usize>() / tensor.ty.block_len();
        while blocks > 0 {
            let n = blocks.min(CHUNK_BYTES / tensor.ty.block_bytes());
            chunk.resize(n * tensor.ty.block_bytes(), 0);
            tensor.fill.blocks(tensor.ty, &mut random, &mut chunk);
            writer.write(&chunk)?;
            blocks -= n;
            done += chunk.len() as u64;
            progress(done, total);
        }
    }
    writer.finish()
}

/// A tensor to be made.
struct Planned {
    name: String,
    ty: GgmlType,
    dims: Vec<usize>,
    fill: Fill,
}
