//! What tells one model from every other, without reading all of it.

use std::sync::Arc;

use super::directory::TensorInfo;
use super::metadata::Metadata;
use super::value::write_str;
use crate::error::Result;
use crate::map::Mapping;
use crate::model::pack_names;

/// Bytes read at each sampled place.
const SAMPLE_BYTES: usize = 4096;
/// Sampled places of a tensor: its start, its end, and evenly between. A smaller tensor is read whole.
const SAMPLES: usize = 4;

/// BLAKE3 over a model's metadata (except `split.*`, so that sharding does not matter), its tensor directory by name,
/// and samples of every tensor's bytes. Two files with the same fingerprint are taken for the same model.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// The 32 bytes, as on the wire.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl TryFrom<&[u8]> for Fingerprint {
    type Error = std::array::TryFromSliceError;

    fn try_from(bytes: &[u8]) -> std::result::Result<Fingerprint, Self::Error> {
        bytes.try_into().map(Fingerprint)
    }
}

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

pub(super) fn of(
    meta: &Metadata,
    tensors: &[TensorInfo],
    shards: &[Arc<Mapping>],
) -> Result<Fingerprint> {
    if let Some(hex) = meta.str(pack_names::FINGERPRINT)? {
        return blake3::Hash::from_hex(hex).map(|hash| Fingerprint(*hash.as_bytes())).map_err(
            |_| meta.mismatch(pack_names::FINGERPRINT, format!("{hex:?}"), "64 hexadecimal digits"),
        );
    }
    let mut hasher = blake3::Hasher::new();
    hash_metadata(&mut hasher, meta);
    let mut by_name: Vec<_> = tensors.iter().collect();
    by_name.sort_by_key(|tensor| tensor.name());
    for tensor in by_name {
        hash_tensor(&mut hasher, tensor, &shards[tensor.shard()])?;
    }
    Ok(Fingerprint(*hasher.finalize().as_bytes()))
}

fn hash_metadata(hasher: &mut blake3::Hasher, meta: &Metadata) {
    let mut encoded = Vec::new();
    for (key, value) in meta.iter().filter(|(key, _)| !key.starts_with("split.")) {
        encoded.clear();
        write_str(key, &mut encoded);
        value.write(&mut encoded);
        hasher.update(&encoded);
    }
}

/// The samples are read rather than mapped, so that opening a model leaves none of its pages in this process.
fn hash_tensor(hasher: &mut blake3::Hasher, tensor: &TensorInfo, shard: &Mapping) -> Result<()> {
    let mut entry = Vec::new();
    write_str(tensor.name(), &mut entry);
    entry.extend(tensor.type_id().to_le_bytes());
    entry.extend((tensor.dims().len() as u32).to_le_bytes());
    tensor.dims().iter().for_each(|&dim| entry.extend((dim as u64).to_le_bytes()));
    hasher.update(&entry);

    let range = tensor.range();
    let mut sample = [0; SAMPLE_BYTES];
    if range.len() <= SAMPLES * SAMPLE_BYTES {
        for at in range.clone().step_by(SAMPLE_BYTES) {
            let part = &mut sample[..SAMPLE_BYTES.min(range.end - at)];
            shard.read_at(at, part)?;
            hasher.update(part);
        }
        return Ok(());
    }
    for i in 0..SAMPLES {
        let step = (range.len() - SAMPLE_BYTES) / (SAMPLES - 1);
        shard.read_at(range.start + i * step, &mut sample)?;
        hasher.update(&sample);
    }
    Ok(())
}
