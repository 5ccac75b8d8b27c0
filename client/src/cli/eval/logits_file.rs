//! `--save-logits`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// Raw little-endian f32, `[tokens, vocab]`.
pub(super) struct LogitsFile {
    path: PathBuf,
    out: BufWriter<File>,
}

impl LogitsFile {
    /// Starts a file. Nothing tells logits from what must be kept, so that no bytes are replaced.
    pub(super) fn create(path: &Path) -> Result<LogitsFile> {
        let found = path.metadata().map_or(0, |meta| meta.len());
        ensure!(
            found == 0,
            "--save-logits {}: found a file of {found} bytes, expected a new one",
            path.display()
        );
        let file =
            File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(LogitsFile { path: path.to_owned(), out: BufWriter::new(file) })
    }

    pub(super) fn write(&mut self, logits: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        self.out.write_all(&bytes).with_context(|| format!("cannot write {}", self.path.display()))
    }

    pub(super) fn finish(mut self) -> Result<()> {
        self.out.flush().with_context(|| format!("cannot write {}", self.path.display()))
    }
}
