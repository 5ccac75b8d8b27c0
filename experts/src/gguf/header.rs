//! Everything of a file but its tensors' bytes.

use std::path::Path;

use super::cursor::Cursor;
use super::directory::{self, TensorInfo};
use super::metadata::{self, Metadata};
use crate::error::{Error, Mismatch, Result};

/// What a file begins with.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";
/// Metadata and directory together; the largest known are below 32 MiB.
const MAX_HEADER_BYTES: usize = 256 << 20;
/// A tensor's alignment where `general.alignment` is absent.
const DEFAULT_ALIGNMENT: u64 = 32;

/// The metadata and the tensor directory of one file.
#[derive(Debug)]
pub struct Header {
    /// The metadata.
    pub meta: Metadata,
    /// The tensors, in the directory's order.
    pub tensors: Vec<TensorInfo>,
}

impl Header {
    /// Reads the header of `file`, a whole file's bytes. `path` is for messages only.
    ///
    /// # Errors
    /// Whatever in the header is wrong, or contradicts the file's length. Nothing is allocated before the bytes
    /// that it is for are known to be there.
    pub fn parse(path: &Path, file: &[u8]) -> Result<Header> {
        let at = |field| move |mismatch: Mismatch| mismatch.in_header(path, field);
        let mut cursor = Cursor::new(&file[..file.len().min(MAX_HEADER_BYTES)]);

        let magic: [u8; 4] = cursor.array().map_err(at("magic"))?;
        if magic != MAGIC {
            let found = format!("\"{}\"", magic.escape_ascii());
            return Err(at("magic")(Mismatch::new(found, "\"GGUF\"")));
        }
        let version = cursor.u32().map_err(at("version"))?;
        check_version(version).map_err(at("version"))?;
        let n_tensors = cursor.u64().map_err(at("tensor count"))?;
        let n_keys = cursor.u64().map_err(at("key count"))?;

        let meta = metadata::read(path, &mut cursor, n_keys)?;
        let alignment = alignment(&meta)?;
        let tensors = directory::read(path, &mut cursor, n_tensors, alignment, file.len() as u64)?;
        Ok(Header { meta, tensors })
    }
}

fn check_version(version: u32) -> Result<(), Mismatch> {
    let found = match version {
        2 | 3 => return Ok(()),
        _ if matches!(version.swap_bytes(), 1..=3) => {
            format!("{} in big-endian order", version.swap_bytes())
        }
        _ => version.to_string(),
    };
    Err(Mismatch::new(found, "2 or 3, little-endian"))
}

/// Aligned to at least 8, as the format's document says, f32 tensors can be read in place.
pub(super) fn alignment(meta: &Metadata) -> Result<u64, Error> {
    const KEY: &str = "general.alignment";
    let alignment = meta.u64(KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
    if alignment.is_power_of_two() && (8..=65536).contains(&alignment) {
        return Ok(alignment);
    }
    Err(meta.mismatch(KEY, alignment.to_string(), "a power of two from 8 to 65536"))
}
