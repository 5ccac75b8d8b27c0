//! What the writer writes is read again, and until it is whole the old file stays.

use std::path::Path;
use std::process::Command;

use outrigger_experts::gguf::{Array, Layout, Value, Writer};
use outrigger_experts::{GgmlType, Gguf, Model};

use crate::common::Small;

fn two_tensors(path: &Path) -> Layout {
    let mut layout = Layout::new(path);
    layout.tensor("first", GgmlType::Q8_0, &[32, 3]).unwrap();
    layout.tensor("second", GgmlType::F32, &[5]).unwrap();
    layout
}

#[test]
fn every_value_and_the_bytes_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("all.gguf");
    let values: Vec<(&str, Value)> = vec![
        ("u8", 200u8.into()),
        ("i8", (-100i8).into()),
        ("u16", 60_000u16.into()),
        ("i16", (-30_000i16).into()),
        ("u32", 4_000_000_000u32.into()),
        ("i32", (-2_000_000_000i32).into()),
        ("u64", u64::MAX.into()),
        ("i64", i64::MIN.into()),
        ("f32", 0.1f32.into()),
        ("f64", 0.1f64.into()),
        ("bool", true.into()),
        ("string", "naïve".into()),
        ("u8s", vec![1u8, 2].into()),
        ("i16s", vec![-1i16, 2].into()),
        ("f32s", vec![0.5f32].into()),
        ("bools", vec![true, false].into()),
        ("strings", vec!["a".to_owned(), String::new()].into()),
        ("none", Value::Array(Array::F64(vec![]))),
    ];
    for alignment in [8u32, 32, 4096] {
        let mut layout = two_tensors(&path);
        layout.set("general.alignment", alignment);
        layout.set("u8", 0u32);
        values.iter().for_each(|(key, value)| layout.set(key, value.clone()));
        let mut writer = Writer::create(layout).unwrap();
        // In parts that know nothing of blocks.
        (0..102u8).for_each(|i| writer.write(&[i]).unwrap());
        writer.write(&[9; 20]).unwrap();
        writer.finish().unwrap();

        let gguf = Gguf::open(&path).unwrap();
        let read: Vec<_> =
            gguf.meta().iter().filter(|(key, _)| !key.starts_with("general")).collect();
        assert_eq!(read.len(), values.len());
        values.iter().for_each(|(key, value)| assert_eq!(gguf.meta().get(key), Some(value)));
        assert!(gguf.tensor("first").unwrap().bytes().iter().copied().eq(0..102));
        assert_eq!(gguf.tensor("second").unwrap().bytes(), [9; 20]);
        assert!(gguf.tensors().all(|t| t.range().start.is_multiple_of(alignment as usize)));
    }
}

#[test]
fn an_unfinished_file_replaces_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, "GGUF that was there").unwrap();
    let mut writer = Writer::create(two_tensors(&path)).unwrap();
    writer.write(&[0; 50]).unwrap();
    drop(writer);
    let mut writer = Writer::create(two_tensors(&path)).unwrap();
    writer.write(&[0; 50]).unwrap();
    let text = writer.finish().unwrap_err().to_string();
    assert!(text.contains("tensor `first`: found 50 bytes written, expected 102"), "{text}");
    assert_eq!(std::fs::read(&path).unwrap(), b"GGUF that was there");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn what_a_crash_left_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(dir.path().join("model.gguf.tmp"), vec![7; 100_000]).unwrap();
    Small::new("olmoe").write(&path);
    Model::open(&path).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_second_writer_of_the_same_path_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut first = Writer::create(two_tensors(&path)).unwrap();
    let text = Writer::create(two_tensors(&path)).unwrap_err().to_string();
    assert!(text.contains("model.gguf.tmp: cannot lock"), "{text}");
    first.write(&[1; 102]).unwrap();
    first.write(&[1; 20]).unwrap();
    first.finish().unwrap();
    assert!(Gguf::open(&path).is_ok());
}

#[test]
fn wrong_declarations_and_too_many_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut layout = two_tensors(&path);
    let mut refused = |name: &str, dims: &[usize], words: &str| {
        let text = layout.tensor(name, GgmlType::Q8_0, dims).unwrap_err().to_string();
        assert!(text.contains("model.gguf: tensor `") && text.contains(words), "{text}");
    };
    refused("first", &[32], "the name twice");
    refused("third", &[31], "rows of 31, expected a multiple of Q8_0's block of 32");
    refused("third", &[32, 0], "dimensions [32, 0]");
    refused("third", &[], "dimensions []");
    refused("third", &[32; 5], "1 to 4");
    refused(&"x".repeat(65), &[32], "a name of 65 bytes");
    let mut writer = Writer::create(layout.clone()).unwrap();
    let text = writer.write(&[0; 103]).unwrap_err().to_string();
    assert!(text.contains("tensor `first`: found 103 bytes more, expected at most 102"), "{text}");
    writer.write(&[0; 102]).unwrap();
    writer.write(&[0; 20]).unwrap();
    let text = writer.write(&[0; 1]).unwrap_err().to_string();
    assert!(text.contains("tensor data: found 1 bytes more"), "{text}");
    drop(writer);
    layout.set("general.alignment", 3u32);
    let text = Writer::create(layout).unwrap_err().to_string();
    assert!(text.contains("key `general.alignment`: found 3"), "{text}");
}

/// A file-size limit stands for the full disk: both fail the write, with EFBIG or ENOSPC.
#[test]
fn a_full_disk_leaves_the_old_file_valid() {
    if let Some(path) = std::env::var_os("FULL_DISK") {
        return write_until_the_disk_is_full(path.as_ref());
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    Small::new("olmoe").write(&path);
    let before = std::fs::read(&path).unwrap();
    // The limit is for a whole process: this test once more, in one of its own.
    let half = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact writer::a_full_disk_leaves_the_old_file_valid"])
        .arg(std::env::current_exe().unwrap())
        .env("FULL_DISK", &path)
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&half.stdout);
    assert!(half.status.success() && output.contains("1 passed"), "{output}");
    assert!(std::fs::read(&path).unwrap() == before);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
}

fn write_until_the_disk_is_full(path: &Path) {
    let mut layout = Layout::new(path);
    layout.tensor("big", GgmlType::F32, &[1 << 20]).unwrap();
    let written = Writer::create(layout).and_then(|mut writer| {
        writer.write(&vec![0; 4 << 20])?;
        writer.finish()
    });
    let text = written.unwrap_err().to_string();
    assert!(text.contains("model.gguf.tmp: cannot write"), "{text}");
}

#[test]
fn what_is_no_file_is_not_replaced() {
    let refused = Writer::create(Layout::new("/dev/null".as_ref())).unwrap_err().to_string();
    assert!(refused.contains("/dev/null: output: found something that is no file"), "{refused}");
}

#[test]
fn only_a_model_is_replaced_by_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("letter.txt");
    std::fs::write(&path, "Dear all").unwrap();
    let refused = Writer::create(two_tensors(&path)).unwrap_err().to_string();
    assert!(refused.contains("letter.txt: output: found a file of another kind"), "{refused}");
    assert_eq!(std::fs::read(&path).unwrap(), b"Dear all");

    for there in [&b""[..], b"GGUF and then nothing of use"] {
        std::fs::write(&path, there).unwrap();
        assert!(Writer::create(two_tensors(&path)).is_ok());
    }
}
