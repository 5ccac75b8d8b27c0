//! What can go wrong with a model file, and what the message must name.

use std::path::PathBuf;

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
}
