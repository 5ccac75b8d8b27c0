//! The files of one model: a single file, or shards named `…-00001-of-0000N.gguf` side by side in one directory.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::directory::TensorInfo;
use super::header::Header;
use super::metadata::Metadata;
use crate::error::{Mismatch, Result};
use crate::map::Mapping;

const NO: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";
/// What the names' five digits can say.
const MAX_SHARDS: u32 = 99_999;

/// The shards of a model, joined.
pub(super) struct Joined {
    /// The first shard's, which has it all.
    pub(super) meta: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) shards: Vec<Arc<Mapping>>,
}

/// Opens the file, and if it is a shard, all of its model's shards.
pub(super) fn open(path: &Path) -> Result<Joined> {
    let (mapping, header) = open_one(path)?;
    let count = header.meta.u32(COUNT)?.unwrap_or(1);
    let name = ShardName::of(path);
    if count <= 1 && name.as_ref().is_none_or(|name| name.count == 1) {
        return Ok(Joined { meta: header.meta, tensors: header.tensors, shards: vec![mapping] });
    }
    let name = name.filter(|name| name.count == count && count <= MAX_SHARDS).ok_or_else(|| {
        let expected = match ShardName::of(path) {
            Some(name) => format!("{}, as the file's name says", name.count),
            None => "1, or a file name that ends in -0000N-of-0000M.gguf".to_owned(),
        };
        header.meta.mismatch(COUNT, count.to_string(), expected)
    })?;
    join(&name)
}

fn open_one(path: &Path) -> Result<(Arc<Mapping>, Header)> {
    let mapping = Mapping::open(path)?;
    let header = Header::parse(path, mapping.bytes())?;
    Ok((mapping, header))
}

fn join(name: &ShardName) -> Result<Joined> {
    let (mapping, Header { meta, mut tensors }) = open_one(&name.path(0))?;
    check_shard(&meta, &meta, 0, name.count)?;
    let mut names: HashSet<_> = tensors.iter().map(TensorInfo::shared_name).collect();
    let mut shards = vec![mapping];
    for no in 1..name.count {
        let path = name.path(no);
        let (mapping, header) = open_one(&path)?;
        check_shard(&header.meta, &meta, no, name.count)?;
        for tensor in header.tensors {
            if !names.insert(tensor.shared_name()) {
                let clash = Mismatch::new("the name in an earlier shard too", "each name once");
                return Err(clash.in_tensor(&path, tensor.name()));
            }
            tensors.push(tensor.in_shard(no as usize));
        }
        shards.push(mapping);
    }
    let expected = meta.u64(TENSORS)?;
    if let Some(expected) = expected.filter(|&n| n != tensors.len() as u64) {
        let found = format!("{} tensors in {} shards", tensors.len(), shards.len());
        return Err(meta.mismatch(TENSORS, found, expected.to_string()));
    }
    Ok(Joined { meta, tensors, shards })
}

/// Checks that a shard is the one that its name says, and of the same model as the first.
fn check_shard(meta: &Metadata, first: &Metadata, no: u32, count: u32) -> Result<()> {
    for (key, expected) in [(NO, no), (COUNT, count)] {
        let found = meta.require_u32(key)?;
        if found != expected {
            let expected = format!("{expected}, as the file's name says");
            return Err(meta.mismatch(key, found.to_string(), expected));
        }
    }
    for (key, value) in meta.iter().filter(|&(key, _)| key != NO) {
        match first.get(key) {
            Some(expected) if expected != value => {
                let expected = format!("{expected} as in the first shard");
                return Err(meta.mismatch(key, value.to_string(), expected));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A file name `PREFIX-0000I-of-0000N.gguf`, taken apart. It comes from the path that the user gave, never from a
/// file's contents, so that no shard is looked for outside of that path's directory.
struct ShardName {
    path: PathBuf,
    prefix: String,
    count: u32,
}

impl ShardName {
    fn of(path: &Path) -> Option<ShardName> {
        let (rest, count) =
            path.file_name()?.to_str()?.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (prefix, no) = rest.rsplit_once('-')?;
        let (no, count) = (five_digits(no)?, five_digits(count)?);
        let prefix = prefix.to_owned();
        (1..=count).contains(&no).then(|| ShardName { path: path.to_owned(), prefix, count })
    }

    /// The path of shard `no`, counted from 0.
    fn path(&self, no: u32) -> PathBuf {
        self.path.with_file_name(format!("{}-{:05}-of-{:05}.gguf", self.prefix, no + 1, self.count))
    }
}

fn five_digits(s: &str) -> Option<u32> {
    if s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit()) { s.parse().ok() } else { None }
}
