//! Hostile and broken files are refused with a message that says where, what was found, and what was expected.

use std::path::Path;

use crate::common::{Raw, array_value, string, u32_value};
use outrigger_experts::gguf::{Header, Value};
use outrigger_experts::{GgmlType, Gguf};

const F32: u32 = 0;
const Q4_0: u32 = 2;
const Q5_0: u32 = 6;
const STRING: u32 = 8;
const U8: u32 = 0;
const MAX: u64 = u64::MAX;

fn parse(bytes: &[u8]) -> Result<Header, String> {
    Header::parse(Path::new("bad.gguf"), bytes).map_err(|error| {
        let message = error.to_string();
        assert!(message.starts_with("bad.gguf: "), "{message}");
        message
    })
}

/// Asserts that the file is refused, in words that have all of these.
#[track_caller]
fn refused(raw: &Raw, words: &[&str]) {
    let message = parse(&raw.bytes()).expect_err("a refusal");
    for word in words {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
}

#[test]
fn a_file_of_this_hand_is_read() {
    let raw = Raw::new()
        .key("general.alignment", u32_value(64))
        .key("s", (STRING, string("grüezi".as_bytes())))
        .key("a", array_value(STRING, 2, &[string(b"x"), string(b"")].concat()))
        .tensor("w", &[32, 3], Q4_0, 64)
        .tensor("b", &[3], F32, 0);
    let raw = Raw { alignment: 64, version: 2, ..raw }.data(64 + 3 * 18);
    let header = parse(&raw.bytes()).unwrap();
    assert_eq!(header.meta.str("s").unwrap(), Some("grüezi"));
    assert_eq!(header.meta.strings("a").unwrap().unwrap(), ["x", ""]);
    let [w, b] = &header.tensors[..] else { panic!() };
    assert_eq!((w.name(), w.dims(), w.ty()), ("w", &[32, 3][..], Some(GgmlType::Q4_0)));
    let len = raw.bytes().len();
    assert_eq!(w.range(), len - 3 * 18..len);
    assert_eq!(b.range(), len - 3 * 18 - 64..len - 3 * 18 - 64 + 12);
}

#[test]
fn other_formats_and_versions() {
    refused(&Raw { magic: *b"ggml", ..Raw::new() }, &["magic", "\"ggml\"", "\"GGUF\""]);
    refused(&Raw { magic: *b"PK\x03\x04", ..Raw::new() }, &["magic", r#""PK\x03\x04""#]);
    refused(&Raw { version: 1, ..Raw::new() }, &["version", "found 1", "2 or 3"]);
    refused(&Raw { version: 4, ..Raw::new() }, &["version", "found 4", "2 or 3"]);
    refused(&Raw { version: 3 << 24, ..Raw::new() }, &["version", "3 in big-endian order"]);
    assert!(parse(b"").unwrap_err().contains("magic: found 0 bytes"));
}

#[test]
fn huge_counts() {
    let words = ["tensor count", &MAX.to_string()];
    refused(&Raw { n_tensors: Some(MAX), ..Raw::new() }, &words);
    refused(&Raw { n_keys: Some(MAX), ..Raw::new() }, &["key count", &MAX.to_string()]);
    refused(&Raw { n_tensors: Some(1), ..Raw::new() }, &["tensor count", "found 1", "at most 0"]);
    // One more than there is.
    let raw = Raw { n_keys: Some(2), ..Raw::new().key("k", u32_value(1)) };
    refused(&raw.data(64), &["a metadata key", "an empty name", "1 to 65535 bytes"]);
}

#[test]
fn huge_strings_and_arrays() {
    let claims = |n: u64| [&n.to_le_bytes()[..], b"abc"].concat();
    refused(&Raw::new().key("k", (STRING, claims(MAX))), &["key `k`", "a string of 1844"]);
    refused(&Raw::new().key("k", (STRING, claims(1000))), &["key `k`", "1000 more bytes"]);
    refused(&Raw::new().key("k", array_value(U8, MAX, b"abc")), &["key `k`", "an array of 1844"]);
    refused(&Raw::new().key("k", array_value(STRING, 1 << 40, b"abc")), &["key `k`", "10995"]);
    refused(&Raw::new().key("k", array_value(STRING, 1000, &[0; 80])), &["key `k`", "at most"]);
    let mut raw = Raw::new();
    raw.keys.push(claims(1 << 20));
    refused(&raw, &["metadata key", "a string of 1048576 bytes", "at most 65535"]);
    raw.keys.clear();
    raw.entries.push([claims(65), vec![b'x'; 100]].concat());
    refused(&raw, &["a tensor's name", "a string of 65 bytes", "at most 64"]);
}

#[test]
fn wrong_types_and_nested_arrays() {
    refused(&Raw::new().key("k", (13, vec![0; 8])), &["key `k`", "a value of type 13", "0 to 12"]);
    refused(&Raw::new().key("k", array_value(99, 0, &[])), &["key `k`", "type 99"]);
    refused(&Raw::new().key("k", array_value(9, 1, &[0; 64])), &["key `k`", "an array of arrays"]);
    refused(&Raw::new().key("k", (7, vec![2])), &["key `k`", "a bool of 2", "0 or 1"]);
}

#[test]
fn a_value_of_another_type_than_asked_for() {
    let raw = Raw::new()
        .key("negative", (5, (-1i32).to_le_bytes().to_vec()))
        .key("wide", (10, 7u64.to_le_bytes().to_vec()))
        .key("s", (STRING, string(b"seven")))
        .key("bytes", array_value(1, 2, &[255, 3]));
    let meta = parse(&raw.bytes()).unwrap().meta;
    assert_eq!(meta.u32("wide").unwrap(), Some(7));
    assert_eq!(meta.u32("absent").unwrap(), None);
    assert_eq!(meta.i32s("bytes").unwrap().unwrap(), [-1, 3]);
    assert_eq!(meta.get("wide"), Some(&Value::U64(7)));
    let message = |result: Result<(), outrigger_experts::Error>| result.unwrap_err().to_string();
    let text = message(meta.u32("negative").map(drop));
    assert_eq!(text, "bad.gguf: key `negative`: found -1, expected an integer from 0 to 2^32 - 1");
    let text = message(meta.f32("s").map(drop));
    assert_eq!(text, "bad.gguf: key `s`: found \"seven\", expected a float");
    let text = message(meta.strings("bytes").map(drop));
    assert_eq!(text, "bad.gguf: key `bytes`: found array of 2 i8, expected an array of strings");
    let text = message(meta.require_u32("absent").map(drop));
    assert_eq!(text, "bad.gguf: key `absent`: found no such key, expected an integer");
}

#[test]
fn invalid_utf8() {
    let bad = [0x66, 0xff];
    refused(&Raw::new().key("k", (STRING, string(&bad))), &["key `k`", "invalid UTF-8"]);
    let list = array_value(STRING, 1, &string(&bad));
    refused(&Raw::new().key("k", list), &["key `k`", "invalid UTF-8"]);
    let mut raw = Raw::new();
    raw.keys.push([string(&bad), vec![0; 8]].concat());
    refused(&raw, &["metadata key", "invalid UTF-8 at byte 33"]);
    raw.keys.clear();
    raw.entries.push([string(&bad), vec![0; 80]].concat());
    refused(&raw, &["tensor's name", "invalid UTF-8"]);
}

#[test]
fn duplicate_names() {
    let raw = Raw::new().key("twice", u32_value(1)).key("twice", u32_value(1));
    refused(&raw, &["key `twice`", "twice", "once"]);
    let raw = Raw::new().tensor("w", &[8], F32, 0).tensor("w", &[8], F32, 32).data(64);
    refused(&raw, &["tensor `w`", "twice", "once"]);
}

#[test]
fn bad_dimensions() {
    let with = |dims: &[u64], ty| Raw::new().tensor("w", dims, ty, 0).data(4096);
    refused(&with(&[], F32), &["tensor `w`", "0 dimensions", "1 to 4"]);
    refused(&with(&[1; 5], F32), &["tensor `w`", "5 dimensions", "1 to 4"]);
    refused(&with(&[4, 0], F32), &["tensor `w`", "a dimension of 0", "positive"]);
    refused(&with(&[1 << 32, 1 << 32], F32), &["tensor `w`", "4294967296", "2^64"]);
    refused(&with(&[1 << 63], F32), &["tensor `w`", "2^64"]);
    // The bytes would wrap around to 0.
    refused(&with(&[1 << 31, 1 << 31], F32), &["tensor `w`", "2^64"]);
    // Of an unsupported type too: the product is what listings show.
    refused(&with(&[1 << 32, 1 << 32], Q5_0), &["tensor `w`", "a product below 2^64"]);
    refused(&with(&[33], Q4_0), &["tensor `w`", "rows of 33", "a multiple of Q4_0's block of 32"]);
    refused(&with(&[16, 64], Q4_0), &["tensor `w`", "rows of 16"]);
}

#[test]
fn bad_offsets() {
    let at = |offset| Raw::new().tensor("w", &[8], F32, offset).data(64);
    assert!(parse(&at(32).bytes()).is_ok());
    refused(&at(64), &["tensor `w`", "32 bytes at offset 64", "the 64 bytes of data"]);
    refused(&at(1 << 40), &["tensor `w`", "offset 1099511627776"]);
    refused(&at(MAX - 31), &["tensor `w`", "offset 18446744073709551584"]);
    refused(&at(1), &["tensor `w`", "offset 1,", "a multiple of 32"]);
    refused(&at(0).tensor("v", &[16], F32, 0), &["tensor `v`", "past tensor `w`"]);
    let raw = Raw::new().tensor("w", &[9], F32, 0).tensor("v", &[8], F32, 32).data(64);
    refused(&raw, &["tensor `v`", "past tensor `w`, which ends at"]);
    // The directory's order does not matter.
    let raw = Raw::new().tensor("v", &[8], F32, 32).tensor("w", &[9], F32, 0).data(64);
    refused(&raw, &["tensor `v`", "past tensor `w`"]);
}

#[test]
fn bad_alignments() {
    for (alignment, found) in [(0, "0"), (4, "4"), (48, "48"), (1 << 17, "131072")] {
        let raw = Raw::new().key("general.alignment", u32_value(alignment));
        refused(&raw, &["key `general.alignment`", found, "a power of two from 8 to 65536"]);
    }
    let raw = Raw::new().key("general.alignment", (STRING, string(b"32")));
    refused(&raw, &["key `general.alignment`", "\"32\""]);
}

#[test]
fn an_unsupported_type_fails_only_when_it_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("types.gguf");
    let raw = Raw::new().tensor("old", &[32], Q5_0, 0).tensor("new", &[32], 4711, 32);
    std::fs::write(&path, raw.tensor("w", &[8], F32, 64).data(96).bytes()).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    assert!(gguf.tensor("w").is_ok());
    let text = gguf.tensor("old").unwrap_err().to_string();
    assert!(text.contains("types.gguf: tensor `old`: found Q5_0, expected a supported"), "{text}");
    let text = gguf.find("new").unwrap_err().to_string();
    assert!(text.contains("tensor `new`: found unknown type 4711"), "{text}");
    let text = gguf.tensor("absent").unwrap_err().to_string();
    assert!(text.contains("tensor `absent`: found no such tensor"), "{text}");
}

#[test]
fn what_is_no_regular_file() {
    let dir = tempfile::tempdir().unwrap();
    let text = Gguf::open(dir.path()).unwrap_err().to_string();
    assert!(text.contains("found a directory, expected a regular file"), "{text}");
    let pipe = dir.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let text = Gguf::open(&pipe).unwrap_err().to_string();
    assert!(text.contains("pipe: model file: found a special file"), "{text}");
    let text = Gguf::open(&dir.path().join("absent.gguf")).unwrap_err().to_string();
    assert!(text.contains("absent.gguf: cannot open"), "{text}");
    let empty = dir.path().join("empty.gguf");
    std::fs::write(&empty, b"").unwrap();
    let text = Gguf::open(&empty).unwrap_err().to_string();
    assert!(text.contains("empty.gguf: magic: found 0 bytes"), "{text}");
}
