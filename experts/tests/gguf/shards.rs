//! Models in several files open from any of them, and a set that does not fit together is refused.

use std::path::{Path, PathBuf};

use crate::common::Small;
use outrigger_experts::gguf::Layout;
use outrigger_experts::{Gguf, Model};

fn shard(dir: &Path, no: u16) -> PathBuf {
    dir.join(format!("small-{:05}-of-00003.gguf", no + 1))
}

/// Which of three shards a tensor goes to.
fn shard_of(tensor: &str) -> u16 {
    match tensor {
        _ if tensor.contains("exps") => 1,
        _ if tensor.starts_with("output") => 2,
        _ => 0,
    }
}

/// Writes shard `no`; only the first has the model's own keys, as llama.cpp's `gguf-split` does it.
fn write(small: &Small, path: &Path, no: u16, count: u16, tensors: i32) {
    let mut layout = Layout::new(path);
    if no == 0 {
        small.keys.iter().for_each(|(key, value)| layout.set(key, value.clone()));
    }
    layout.set("split.no", no);
    layout.set("split.count", count);
    layout.set("split.tensors.count", tensors);
    small.write_tensors(layout, |name| shard_of(name) == no);
}

fn write_all(small: &Small, dir: &Path) {
    (0..3).for_each(|no| write(small, &shard(dir, no), no, 3, small.tensors.len() as i32));
}

#[track_caller]
fn refused(path: &Path, words: &[&str]) {
    let text = Model::open(path).unwrap_err().to_string();
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
}

#[test]
fn opens_from_any_shard_as_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let small = Small::new("olmoe");
    write_all(&small, dir.path());
    let single_path = dir.path().join("single.gguf");
    small.write(&single_path);
    let single = Model::open(&single_path).unwrap();
    for no in 0..3 {
        let model = Model::open(&shard(dir.path(), no)).unwrap();
        assert_eq!(model.spec, single.spec);
        assert_eq!(model.gguf.shards().len(), 3);
        assert_eq!(model.gguf.fingerprint(), single.gguf.fingerprint());
        for info in single.gguf.tensors() {
            let (ours, theirs) = (model.gguf.tensor(info.name()), single.gguf.tensor(info.name()));
            assert_eq!(ours.unwrap().bytes(), theirs.unwrap().bytes(), "{}", info.name());
        }
    }
}

#[test]
fn a_single_file_may_be_named_as_a_shard() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small-00001-of-00001.gguf");
    Small::new("llama").write(&path);
    Model::open(&path).unwrap();
}

#[test]
fn missing() {
    let dir = tempfile::tempdir().unwrap();
    write_all(&Small::new("olmoe"), dir.path());
    std::fs::remove_file(shard(dir.path(), 1)).unwrap();
    refused(&shard(dir.path(), 2), &["small-00002-of-00003.gguf: cannot open"]);
}

#[test]
fn doubled() {
    let dir = tempfile::tempdir().unwrap();
    write_all(&Small::new("olmoe"), dir.path());
    std::fs::copy(shard(dir.path(), 1), shard(dir.path(), 2)).unwrap();
    let words = ["00003-of-00003.gguf: key `split.no`: found 1, expected 2"];
    refused(&shard(dir.path(), 0), &words);
}

#[test]
fn a_tensor_in_two_shards() {
    let dir = tempfile::tempdir().unwrap();
    let small = Small::new("olmoe");
    write_all(&small, dir.path());
    let mut layout = Layout::new(&shard(dir.path(), 2));
    layout.set("split.no", 2u16);
    layout.set("split.count", 3u16);
    small.write_tensors(layout, |name| shard_of(name) == 2 || name.contains("ffn_up"));
    let words = ["00003-of-00003.gguf: tensor `blk.0.ffn_up_exps.weight`", "earlier shard"];
    refused(&shard(dir.path(), 0), &words);
}

#[test]
fn of_other_sets() {
    let small = Small::new("olmoe");
    let n = small.tensors.len() as i32;
    let dir = tempfile::tempdir().unwrap();
    write_all(&small, dir.path());
    // Shard 2 says that it is of five.
    write(&small, &shard(dir.path(), 1), 1, 5, n);
    let words = ["00002-of-00003.gguf: key `split.count`: found 5, expected 3"];
    refused(&shard(dir.path(), 0), &words);
    refused(&shard(dir.path(), 1), &words);
    // Shard 2 is of a model with another number of tensors.
    write(&small, &shard(dir.path(), 1), 1, 3, n + 1);
    refused(&shard(dir.path(), 0), &["00002-of-00003.gguf: key `split.tensors.count`: found"]);
    // All shards agree, but tensors are missing.
    (0..3).for_each(|no| write(&small, &shard(dir.path(), no), no, 3, n + 1));
    let found = format!("key `split.tensors.count`: found {n} tensors in 3 shards");
    refused(&shard(dir.path(), 0), &[&found]);
    // Shard 2 has no idea of a split.
    write_all(&small, dir.path());
    small.write(&shard(dir.path(), 1));
    refused(&shard(dir.path(), 0), &["00002-of-00003.gguf: key `split.no`: found no such key"]);
    refused(&shard(dir.path(), 1), &["key `split.count`: found 1, expected 3"]);
}

/// The siblings' names come from the name that was given, whose directory they share: nothing in a file is a path.
#[test]
fn no_name_leaves_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let small = Small::new("olmoe");
    let inner = dir.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    write_all(&small, dir.path());
    std::fs::rename(shard(dir.path(), 0), shard(&inner, 0)).unwrap();
    refused(&shard(&inner, 0), &["inner/small-00002-of-00003.gguf: cannot open"]);
    let renamed = inner.join("renamed.gguf");
    std::fs::rename(shard(&inner, 0), &renamed).unwrap();
    refused(&renamed, &["renamed.gguf: key `split.count`: found 3, expected 1, or a file name"]);
    for odd in ["..-00001-of-00003.gguf", "small-1-of-3.gguf", "small-00004-of-00003.gguf"] {
        std::fs::copy(&renamed, inner.join(odd)).unwrap();
        assert!(Gguf::open(&inner.join(odd)).is_err(), "{odd}");
    }
}
