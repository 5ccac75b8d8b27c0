//! Writing a file: a header that is known beforehand, then the tensors' bytes in order, as they come.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use super::directory::{MAX_NAME_BYTES, byte_len, stored_dims};
use super::header;
use super::metadata::Metadata;
use super::value::{Value, write_str};
use crate::error::{Error, Mismatch, Result};
use crate::tensor::Dims;
use crate::types::GgmlType;

/// What a file is going to have: its metadata, and its tensors without their bytes.
#[derive(Clone, Debug)]
pub struct Layout {
    path: PathBuf,
    meta: Metadata,
    tensors: Vec<Declared>,
}

#[derive(Clone, Debug)]
struct Declared {
    name: String,
    ty: GgmlType,
    dims: Dims,
    bytes: u64,
}

impl Layout {
    /// An empty file, to be written to `path`.
    pub fn new(path: &Path) -> Layout {
        Layout { path: path.to_owned(), meta: Metadata::empty(path), tensors: Vec::new() }
    }

    /// Sets a metadata key, in place of what it had.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.meta.insert(key, value.into());
    }

    /// Declares the next tensor; dimensions fastest first.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the name is taken, or rows are no whole blocks of the type.
    pub fn tensor(&mut self, name: &str, ty: GgmlType, dims: &[usize]) -> Result<()> {
        let wrong = |mismatch: Mismatch| mismatch.in_tensor(&self.path, name);
        if self.tensors.iter().any(|tensor| tensor.name == name) {
            return Err(wrong(Mismatch::new("the name twice", "each name once")));
        }
        if name.len() as u64 > MAX_NAME_BYTES {
            let found = format!("a name of {} bytes", name.len());
            return Err(wrong(Mismatch::new(found, format!("at most {MAX_NAME_BYTES}"))));
        }
        let held = Dims::new(dims).filter(|dims| !dims.contains(&0)).ok_or_else(|| {
            wrong(Mismatch::new(
                format!("dimensions {dims:?}"),
                "1 to 4, none of them zero, of a product below 2^64",
            ))
        })?;
        let bytes = byte_len(ty, dims).map_err(wrong)?;
        let held = stored_dims(ty, dims).and_then(|dims| Dims::new(&dims)).unwrap_or(held);
        self.tensors.push(Declared { name: name.to_owned(), ty, dims: held, bytes });
        Ok(())
    }

    /// The bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// The header, padded to where the data starts.
    fn encode(&self, alignment: u64) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(header::MAGIC);
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.meta.iter().count() as u64).to_le_bytes());
        for (key, value) in self.meta.iter() {
            write_str(key, &mut out);
            value.write(&mut out);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            write_str(&tensor.name, &mut out);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|&dim| out.extend((dim as u64).to_le_bytes()));
            out.extend(tensor.ty.id().to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += tensor.bytes + padding(tensor.bytes, alignment);
        }
        out.resize(out.len() + padding(out.len() as u64, alignment) as usize, 0);
        out
    }
}

/// Whether a model may be put at `path`: where there is nothing yet, or another model.
///
/// # Errors
/// [`Error::Header`] if there is something else, such as a device or somebody's text.
pub fn check_output(path: &Path) -> Result<()> {
    let Ok(there) = std::fs::metadata(path) else { return Ok(()) };
    let mut magic = [0; header::MAGIC.len()];
    let found = match there.is_file() {
        // Renaming would put a file in its place, whatever it is.
        false => "something that is no file",
        true if there.len() == 0 => return Ok(()),
        true => match File::open(path).and_then(|mut file| file.read_exact(&mut magic)) {
            Ok(()) if magic == header::MAGIC => return Ok(()),
            _ => "a file of another kind",
        },
    };
    Err(Mismatch::new(found, "a GGUF file to replace, or nothing yet").in_header(path, "output"))
}

/// Writes a file beside its place, and puts it there when it is whole: until [`Writer::finish`] returns, whatever was
/// at the path stays as it was. Dropped before that, it leaves nothing.
#[derive(Debug)]
pub struct Writer {
    layout: Layout,
    out: BufWriter<File>,
    temporary: PathBuf,
    alignment: u64,
    /// Tensors that are complete.
    done: usize,
    /// Bytes of the next one that are written.
    written: u64,
    finished: bool,
}

impl Writer {
    /// Starts the file by writing its header.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses, or another writer is at work on the same path; [`Error::Header`] as
    /// [`check_output`]; [`Error::Key`] if the metadata asks for an alignment that no reader takes.
    pub fn create(layout: Layout) -> Result<Writer> {
        let alignment = header::alignment(&layout.meta)?;
        check_output(&layout.path)?;
        let mut temporary = layout.path.clone().into_os_string();
        temporary.push(".tmp");
        let temporary = PathBuf::from(temporary);
        let file = create_locked(&temporary)?;
        let out = BufWriter::with_capacity(1 << 20, file);
        let header = layout.encode(alignment);
        let (done, written, finished) = (0, 0, false);
        let mut writer = Writer { layout, out, temporary, alignment, done, written, finished };
        writer.put(&header)?;
        Ok(writer)
    }

    /// Appends bytes to the first tensor that is not complete. A tensor may come in several writes, but a write has
    /// bytes of one tensor only.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses, [`Error::Tensor`] if the bytes are more than the tensor lacks,
    /// [`Error::Header`] if every tensor is complete.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(tensor) = self.layout.tensors.get(self.done) else {
            let found = format!("{} bytes more", bytes.len());
            let expected = format!("those of the {} tensors declared", self.done);
            return Err(Mismatch::new(found, expected).in_header(&self.layout.path, "tensor data"));
        };
        let size = tensor.bytes;
        let lacks = size - self.written;
        if bytes.len() as u64 > lacks {
            let found = format!("{} bytes more", bytes.len());
            let mismatch = Mismatch::new(found, format!("at most {lacks} of its {size}"));
            return Err(mismatch.in_tensor(&self.layout.path, &tensor.name));
        }
        self.put(bytes)?;
        self.written += bytes.len() as u64;
        if self.written == size {
            self.put(&vec![0; padding(size, self.alignment) as usize])?;
            self.done += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// Puts the file in its place, when the disk has all of it.
    ///
    /// # Errors
    /// [`Error::Tensor`] if one lacks bytes, [`Error::Io`] if the disk refuses. What was at the path is then as it
    /// was.
    pub fn finish(mut self) -> Result<()> {
        if let Some(tensor) = self.layout.tensors.get(self.done) {
            let found = format!("{} bytes written", self.written);
            let mismatch = Mismatch::new(found, tensor.bytes.to_string());
            return Err(mismatch.in_tensor(&self.layout.path, &tensor.name));
        }
        self.out.flush().map_err(Error::io(&self.temporary, "write"))?;
        self.out.get_ref().sync_all().map_err(Error::io(&self.temporary, "sync"))?;
        let path = &self.layout.path;
        std::fs::rename(&self.temporary, path).map_err(Error::io(path, "replace"))?;
        self.finished = true;
        sync_directory(path)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(Error::io(&self.temporary, "write"))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished {
            // What cannot be removed now is overwritten by the next writer of the same path.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Opens a file for writing that no other writer has. What a crashed one left is overwritten.
fn create_locked(path: &Path) -> Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(path);
    let file = file.map_err(Error::io(path, "create"))?;
    file.try_lock().map_err(|refused| Error::io(path, "lock")(refused.into()))?;
    // The writer that had the lock may have put this very file in place meanwhile.
    if !is_still_at(&file, path) {
        let moved = std::io::Error::other("another process just finished writing it");
        return Err(Error::io(path, "lock")(moved));
    }
    file.set_len(0).map_err(Error::io(path, "create"))?;
    Ok(file)
}

fn is_still_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => identity(ours) == identity(there),
        _ => false,
    }
}

/// Makes the rename last through a power cut.
fn sync_directory(path: &Path) -> Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::io(directory, "sync"))
}

fn padding(len: u64, alignment: u64) -> u64 {
    len.next_multiple_of(alignment) - len
}
