//! A GGUF header with metadata and no tensors, byte by byte.

use std::path::{Path, PathBuf};

use outrigger_experts::Metadata;
use outrigger_experts::gguf::Header;

/// Metadata that a test writes and changes.
#[derive(Clone, Default)]
pub(crate) struct Keys(Vec<(String, u32, Vec<u8>)>);

const I32: u32 = 5;
const F32: u32 = 6;
const STRING: u32 = 8;

impl Keys {
    /// Sets a key, or replaces it.
    fn set(mut self, key: &str, ty: u32, value: Vec<u8>) -> Keys {
        self = self.without(key);
        self.0.push((key.to_owned(), ty, value));
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Keys {
        self.0.retain(|(other, ..)| other != key);
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Keys {
        self.set(key, 4, value.to_le_bytes().into())
    }

    pub(crate) fn bool(self, key: &str, value: bool) -> Keys {
        self.set(key, 7, vec![value.into()])
    }

    pub(crate) fn str(self, key: &str, value: &str) -> Keys {
        self.set(key, STRING, string(value))
    }

    pub(crate) fn strings<S: AsRef<str>>(self, key: &str, values: &[S]) -> Keys {
        self.array(key, STRING, values.iter().map(|s| string(s.as_ref())).collect())
    }

    pub(crate) fn i32s(self, key: &str, values: &[i32]) -> Keys {
        self.array(key, I32, values.iter().map(|v| v.to_le_bytes().into()).collect())
    }

    pub(crate) fn f32s(self, key: &str, values: &[f32]) -> Keys {
        self.array(key, F32, values.iter().map(|v| v.to_le_bytes().into()).collect())
    }

    fn array(self, key: &str, ty: u32, values: Vec<Vec<u8>>) -> Keys {
        let head = [&ty.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        self.set(key, 9, [head, values.concat()].concat())
    }

    pub(crate) fn metadata(&self) -> Metadata {
        let mut file = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0".to_vec();
        file.extend((self.0.len() as u64).to_le_bytes());
        for (key, ty, value) in &self.0 {
            file.extend(string(key));
            file.extend(ty.to_le_bytes());
            file.extend(value);
        }
        Header::parse(Path::new("test.gguf"), &file).expect("a valid header").meta
    }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A file of the repository.
pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}
