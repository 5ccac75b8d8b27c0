//! What an interrupted pack leaves behind, so that the next one goes on where it stopped.

use std::fs::{self, File, TryLockError};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::allocate::{Choice, Curve};
use crate::error::{Error, Result};

/// A directory beside the output, which one process at a time uses.
pub(super) struct Work {
    dir: PathBuf,
    _lock: File,
}

impl Work {
    /// The directory for packing to `out` what `job` describes. What another job left there is removed.
    ///
    /// # Errors
    /// [`Error::Packing`] while another process packs to `out`, [`Error::NotWork`] if anybody else's files are there;
    /// a disk that refuses.
    pub(super) fn open(out: &Path, job: &impl Hash) -> Result<Work> {
        let mut name = out.as_os_str().to_owned();
        name.push(".work");
        let dir = PathBuf::from(name);
        match fs::create_dir(&dir) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(io(&dir)(error)),
            _ => {}
        }
        let lock = File::open(&dir).map_err(io(&dir))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Packing(out.to_owned())),
            Err(TryLockError::Error(source)) => return Err(io(&dir)(source)),
        }
        let mut left = Vec::new();
        for entry in fs::read_dir(&dir).map_err(io(&dir))? {
            let entry = entry.map_err(io(&dir))?;
            if !is_work(&entry.file_name().to_string_lossy()) {
                return Err(Error::NotWork(entry.path()));
            }
            left.push(entry.path());
        }
        let job = format!("{:016x}\n", hash(job));
        let path = dir.join("job");
        if fs::read_to_string(&path).ok().as_deref() != Some(&job) {
            for path in left {
                fs::remove_file(&path).map_err(io(&path))?;
            }
            fs::write(&path, job).map_err(io(&path))?;
        }
        Ok(Work { dir, _lock: lock })
    }

    /// The curves of the first layers, as far as they were measured.
    pub(super) fn curves(&self) -> Vec<Vec<Curve>> {
        let kept =
            |layer| read_line(&mut BufReader::new(File::open(self.curves_path(layer)).ok()?));
        (0..).map_while(kept).collect()
    }

    /// Keeps a layer's curves.
    pub(super) fn put_curves(&self, layer: usize, curves: &[Curve]) -> Result<()> {
        put(&self.curves_path(layer), &[line(curves).as_bytes()])
    }

    /// By expert, the squared error of the weighted outputs over their own squared sum, of a layer that was coded with
    /// these choices before.
    pub(super) fn errors(&self, layer: usize, choices: &[Choice]) -> Option<Vec<f32>> {
        read_line(&mut BufReader::new(File::open(self.layer_path(layer, choices)).ok()?))
    }

    /// The bytes of such a layer: every tensor of every expert, one after another.
    pub(super) fn bytes(&self, layer: usize, choices: &[Choice]) -> Option<Vec<u8>> {
        let mut file = BufReader::new(File::open(self.layer_path(layer, choices)).ok()?);
        file.skip_until(b'\n').ok()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// Keeps a coded layer.
    pub(super) fn put_layer(
        &self,
        layer: usize,
        choices: &[Choice],
        errors: &[f32],
        bytes: &[u8],
    ) -> Result<()> {
        put(&self.layer_path(layer, choices), &[line(errors).as_bytes(), bytes])
    }

    /// Removes the directory.
    pub(super) fn remove(&self) {
        // Nothing depends on it: the next job of this name would do the same.
        let _ = fs::remove_dir_all(&self.dir);
    }

    fn curves_path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("curves-{layer}"))
    }

    fn layer_path(&self, layer: usize, choices: &[Choice]) -> PathBuf {
        self.dir.join(format!("layer-{layer}-{:016x}", hash(&line(choices))))
    }
}

/// Whether a file of this name is one of those that packing leaves.
fn is_work(name: &str) -> bool {
    name == "job" || name.starts_with("curves-") || name.starts_with("layer-")
}

/// Writes a file that is there as a whole or not at all.
fn put(path: &Path, parts: &[&[u8]]) -> Result<()> {
    let temporary = path.with_extension("tmp");
    let write = || {
        let mut file = File::create(&temporary)?;
        parts.iter().try_for_each(|part| file.write_all(part))?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(io(path))
}

/// What a program of another version makes of the same is no matter: then it starts anew.
fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

fn line<T: Serialize + ?Sized>(value: &T) -> String {
    let mut line = serde_json::to_string(value).expect("plain data");
    line.push('\n');
    line
}

fn read_line<T: DeserializeOwned>(file: &mut impl BufRead) -> Option<T> {
    let mut line = String::new();
    file.read_line(&mut line).ok()?;
    serde_json::from_str(&line).ok()
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |source| Error::Io { path: path.to_owned(), source }
}
