//! What can go wrong with a model file, and what the message must name.

use std::path::{Path, PathBuf};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate. Each names the file, and the key, tensor or field; what was found; what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried: "open", "map", "read", …
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A mapped file became shorter than it was when it was opened.
    #[error("{}: the file was truncated: found {found} bytes, expected at least {expected}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length now, in bytes.
        found: u64,
        /// The length that the read needed, in bytes.
        expected: u64,
    },
    /// The file itself, or a field of its header, is wrong.
    #[error("{}: {field}: found {found}, expected {expected}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// The field: "magic", "version", "tensor count", …
        field: &'static str,
        /// What the file has.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// A metadata key is wrong or missing.
    #[error("{}: key `{key}`: found {found}, expected {expected}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The metadata key.
        key: String,
        /// What the file has.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// A setting is none.
    #[error("{what}: found {found:?}, expected {expected}")]
    Setting {
        /// The setting.
        what: &'static str,
        /// What was given.
        found: String,
        /// What would do.
        expected: &'static str,
    },
    /// The model has no such expert.
    #[error("layer {layer}, expert {expert}: expected one of {layers} layers of {experts} experts")]
    NoSuchExpert {
        /// The layer that was asked for.
        layer: usize,
        /// The expert that was asked for.
        expert: u16,
        /// How many layers there are.
        layers: usize,
        /// How many experts a layer has.
        experts: usize,
    },
    /// The expert cache does not have an expert, and what it does not have counts as absent.
    #[error("layer {layer}, expert {expert}: found outside of the expert cache, expected in it")]
    Absent {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: u16,
    },
    /// A tensor is wrong, missing or not wanted.
    #[error("{}: tensor `{tensor}`: found {found}, expected {expected}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What the file has.
        found: String,
        /// What it should have.
        expected: String,
    },
}

impl Error {
    /// For `map_err`: the system's refusal of `action` on `path`.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::Io { path: path.to_owned(), action, source }
    }
}

/// What was found and what was expected, before the caller adds where.
#[derive(Debug)]
pub(crate) struct Mismatch {
    pub(crate) found: String,
    pub(crate) expected: String,
}

impl Mismatch {
    pub(crate) fn new(found: impl Into<String>, expected: impl Into<String>) -> Mismatch {
        Mismatch { found: found.into(), expected: expected.into() }
    }

    pub(crate) fn in_header(self, path: &Path, field: &'static str) -> Error {
        let Mismatch { found, expected } = self;
        Error::Header { path: path.to_owned(), field, found, expected }
    }

    pub(crate) fn in_key(self, path: &Path, key: &str) -> Error {
        let Mismatch { found, expected } = self;
        Error::Key { path: path.to_owned(), key: key.to_owned(), found, expected }
    }

    pub(crate) fn in_tensor(self, path: &Path, tensor: &str) -> Error {
        let Mismatch { found, expected } = self;
        Error::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), found, expected }
    }
}
