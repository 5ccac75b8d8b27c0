//! A read-only memory map of one model file: faulting ranges in on purpose, giving them back on purpose.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Advice, Mmap};

use crate::error::{Error, Mismatch, Result};

/// One fault-in call's share of a range: a long range stays interruptible, and its pages arrive in order.
const POPULATE_CHUNK: usize = 64 << 20;

/// One advice to read reads no more than the device's read-ahead window, 128 KiB by default, and forgets the rest
/// (`force_page_cache_ra` in Linux's mm/readahead.c).
const READ_AHEAD_CHUNK: usize = 128 << 10;

/// A whole file, mapped read-only. Keeps the file open.
///
/// The file must not be modified in place while it is mapped. A file that was made shorter is reported by
/// [`Mapping::populate`] instead of killing the process.
#[derive(Debug)]
pub struct Mapping {
    path: PathBuf,
    file: File,
    map: Mmap,
}

impl Mapping {
    /// Maps a regular file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened or mapped, [`Error::Header`] if it is no regular file.
    pub fn open(path: &Path) -> Result<Arc<Mapping>> {
        // Asked before opening: opening a named pipe would wait for its writer.
        let kind = std::fs::metadata(path).map_err(Error::io(path, "open"))?.file_type();
        if !kind.is_file() {
            let found = if kind.is_dir() { "a directory" } else { "a special file" };
            return Err(Mismatch::new(found, "a regular file").in_header(path, "model file"));
        }
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        // SAFETY: the map is read-only and shared. Nothing in this program writes to a model file in place (the
        // writer renames a finished file over it, which leaves this inode alone), and that nobody else does is this
        // type's documented condition. Truncation by others is checked for by `populate`, before bytes are used.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path, "map"))?;
        Ok(Arc::new(Mapping { path: path.to_owned(), file, map }))
    }

    /// The file's path, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length when it was mapped, in bytes.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether the file was empty when it was mapped.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The whole file. Reading a page that is not in memory waits for the disk.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Reads a range into memory and maps it, rounded outward to pages, and returns when it is there.
    ///
    /// # Errors
    /// [`Error::Truncated`] if the file no longer has these bytes, [`Error::Io`] if the disk fails.
    ///
    /// # Panics
    /// If the range leaves the file as it was mapped.
    pub fn populate(&self, range: Range<usize>) -> Result<()> {
        self.check(&range);
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at.saturating_add(POPULATE_CHUNK));
            self.populate_chunk(at..end)?;
            at = end;
        }
        // The last page may survive a truncation, with zeros in place of the lost bytes.
        self.check_length(range.end)
    }

    #[cfg(target_os = "linux")]
    fn populate_chunk(&self, range: Range<usize>) -> Result<()> {
        loop {
            let result = self.map.advise_range(Advice::PopulateRead, range.start, range.len());
            let Err(source) = result else { return Ok(()) };
            match source.raw_os_error() {
                // A page past the file's end, or one that the disk cannot read (madvise(2)).
                Some(libc::EFAULT) => {
                    self.check_length(range.end)?;
                    return Err(Error::io(&self.path, "read")(source));
                }
                Some(libc::EINTR | libc::EAGAIN) => {}
                // Linux before 5.14 does not know the advice.
                Some(libc::EINVAL) => return self.read_and_touch(range),
                _ => return Err(Error::io(&self.path, "fault in")(source)),
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn populate_chunk(&self, range: Range<usize>) -> Result<()> {
        self.read_and_touch(range)
    }

    /// Fault-in without the kernel's help: reading the file reports what touching the map would die of.
    fn read_and_touch(&self, range: Range<usize>) -> Result<()> {
        let mut buffer = vec![0; range.len().min(1 << 20)];
        let mut at = range.start;
        while at < range.end {
            let n = buffer.len().min(range.end - at);
            self.read_at(at, &mut buffer[..n])?;
            at += n;
        }
        for page in range.clone().step_by(page_size()).chain(range.end.checked_sub(1)) {
            std::hint::black_box(self.map[page]);
        }
        Ok(())
    }

    /// Copies bytes out of the file without mapping their pages.
    ///
    /// # Errors
    /// As [`Mapping::populate`].
    pub(crate) fn read_at(&self, at: usize, out: &mut [u8]) -> Result<()> {
        use std::os::unix::fs::FileExt;
        self.file.read_exact_at(out, at as u64).map_err(|source| {
            self.check_length(at.saturating_add(out.len()))
                .err()
                .unwrap_or_else(|| Error::io(&self.path, "read")(source))
        })
    }

    /// Starts reading a range, rounded outward to pages, into the page cache, and does not wait for it.
    ///
    /// # Panics
    /// If the range leaves the file as it was mapped.
    pub(crate) fn will_need(&self, range: Range<usize>) {
        self.check(&range);
        for at in range.clone().step_by(READ_AHEAD_CHUNK) {
            let len = READ_AHEAD_CHUNK.min(range.end - at);
            // A refusal costs time only: `populate` reads what is not there.
            let _ = self.map.advise_range(Advice::WillNeed, at, len);
        }
    }

    /// Reads a range into memory without what surrounds it, and locks it there for as long as the file is mapped, where
    /// the system lets this process do that.
    ///
    /// # Errors
    /// As [`Mapping::populate`].
    ///
    /// # Panics
    /// If the range leaves the file as it was mapped.
    pub fn keep(&self, range: Range<usize>) -> Result<()> {
        self.advise_random(range.clone());
        self.will_need(range.clone());
        self.populate(range.clone())?;
        // SAFETY: the range lies in the map, and locking changes neither bytes nor addresses.
        let refused = unsafe { libc::mlock(self.map[range.start..].as_ptr().cast(), range.len()) };
        if refused != 0 {
            let error = std::io::Error::last_os_error();
            tracing::debug!(path = %self.path.display(), %error, "cannot lock memory");
        }
        Ok(())
    }

    /// Gives a range's memory back to the system: its pages, rounded inward, leave this process and, where no other
    /// process uses them, the page cache. The bytes stay readable and come from the disk again.
    ///
    /// # Panics
    /// If the range leaves the file as it was mapped.
    pub fn give_back(&self, range: Range<usize>) {
        self.unmap(range.clone());
        #[cfg(target_os = "linux")]
        self.drop_from_page_cache(self.whole_pages(range));
    }

    /// Takes a range's pages, rounded inward, out of this process and leaves them in the page cache.
    ///
    /// # Panics
    /// If the range leaves the file as it was mapped.
    pub(crate) fn unmap(&self, range: Range<usize>) {
        self.check(&range);
        let pages = self.whole_pages(range);
        if pages.is_empty() {
            return;
        }
        // SAFETY: on a shared, read-only file mapping the advice drops page table entries only: the next access reads
        // the same bytes from the file (madvise(2)), so that borrowed slices stay valid.
        let dropped = unsafe {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            self.map.unchecked_advise_range(advice, pages.start, pages.len())
        };
        if let Err(error) = dropped {
            tracing::warn!(path = %self.path.display(), %error, "cannot give memory back");
        }
    }

    fn whole_pages(&self, range: Range<usize>) -> Range<usize> {
        let page = page_size();
        // The file's last page belongs to the range that reaches the file's end.
        let end = if range.end == self.len() { range.end } else { range.end / page * page };
        range.start.next_multiple_of(page)..end
    }

    #[cfg(target_os = "linux")]
    fn drop_from_page_cache(&self, range: Range<usize>) {
        use std::os::fd::AsRawFd;
        // A length of nothing would mean: to the end of the file.
        if range.is_empty() {
            return;
        }
        let (offset, len) = (range.start as libc::off_t, range.len() as libc::off_t);
        // SAFETY: no pointers; the descriptor is open as long as `self`. A refusal costs memory only.
        unsafe {
            libc::posix_fadvise(self.file.as_raw_fd(), offset, len, libc::POSIX_FADV_DONTNEED)
        };
    }

    /// Tells the system to keep this range, rounded outward to pages, apart from what surrounds it: not to read ahead
    /// of accesses, and not to map huge pages, of which giving a part back would unmap the whole.
    ///
    /// # Panics
    /// If the range leaves the file as it was mapped.
    pub fn advise_random(&self, range: Range<usize>) {
        self.check(&range);
        if let Err(error) = self.map.advise_range(Advice::Random, range.start, range.len()) {
            tracing::warn!(path = %self.path.display(), %error, "cannot turn read-ahead off");
        }
        // Refused by kernels that have no huge pages.
        #[cfg(target_os = "linux")]
        let _ = self.map.advise_range(Advice::NoHugePage, range.start, range.len());
    }

    fn check(&self, range: &Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.len(),
            "range {range:?} leaves a map of {} bytes",
            self.len()
        );
    }

    /// Whether the file still has the bytes before `end`.
    ///
    /// # Errors
    /// [`Error::Truncated`] if not, [`Error::Io`] if the system does not say.
    pub(crate) fn check_length(&self, end: usize) -> Result<()> {
        let found = self.file.metadata().map_err(Error::io(&self.path, "read"))?.len();
        let expected = end as u64;
        if found < expected {
            return Err(Error::Truncated { path: self.path.clone(), found, expected });
        }
        Ok(())
    }
}

fn page_size() -> usize {
    // SAFETY: no pointers, no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|&n| n > 0).unwrap_or(4096)
}
