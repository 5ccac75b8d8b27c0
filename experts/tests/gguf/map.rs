//! A mapped file's memory comes and goes on request, and a file that shrinks is reported.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use outrigger_experts::{Error, Mapping};

/// A multiple of every system's page.
const UNIT: usize = 64 << 10;
const LEN: usize = 64 * UNIT + 100;

struct Fixture {
    _dir: tempfile::TempDir,
    path: PathBuf,
    mapping: Arc<Mapping>,
}

/// A file of `LEN` bytes that repeat 0 to 250, on the disk and in no memory of ours.
fn mapped() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.bin");
    let mut file = File::create(&path).unwrap();
    file.write_all(&(0..LEN).map(|i| (i % 251) as u8).collect::<Vec<_>>()).unwrap();
    file.sync_all().unwrap();
    let mapping = Mapping::open(&path).unwrap();
    mapping.advise_random(0..LEN);
    Fixture { _dir: dir, path, mapping }
}

/// Bytes of the range, rounded outward to pages, that this process has mapped in memory now: from `/proc/self/pagemap`,
/// since `mincore` tells of the page cache, which is everybody's.
fn resident_bytes(mapping: &Mapping, range: Range<usize>) -> usize {
    const PRESENT: u64 = 1 << 63;
    // SAFETY: no pointers, no preconditions.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let base = mapping.bytes().as_ptr() as usize;
    let pages = (base + range.start) / page..(base + range.end).div_ceil(page);
    let mut entries = vec![0; pages.len() * 8];
    let table = File::open("/proc/self/pagemap").unwrap();
    table.read_exact_at(&mut entries, pages.start as u64 * 8).unwrap();
    let (entries, _) = entries.as_chunks::<8>();
    page * entries.iter().filter(|&&e| u64::from_ne_bytes(e) & PRESENT != 0).count()
}

#[test]
fn populate_and_give_back() {
    let Fixture { mapping, .. } = &mapped();
    assert_eq!(mapping.len(), LEN);
    assert_eq!(resident_bytes(mapping, 0..LEN), 0);
    // Outward: units 2 to 8, and a page of unit 9.
    let range = 2 * UNIT + 5..9 * UNIT + 1;
    mapping.populate(range.clone()).unwrap();
    let page = resident_bytes(mapping, 9 * UNIT..9 * UNIT + 1);
    assert!(page.is_power_of_two() && (4096..=UNIT).contains(&page), "{page}");
    assert_eq!(resident_bytes(mapping, 2 * UNIT..9 * UNIT + page), 7 * UNIT + page);
    // Inward: all but the first and the last page, which hold other bytes too.
    mapping.give_back(range.clone());
    assert_eq!(resident_bytes(mapping, 2 * UNIT + page..9 * UNIT), 0);
    assert_eq!(resident_bytes(mapping, 2 * UNIT..9 * UNIT + page), 2 * page);
    // What was given back is the same when it is read again.
    assert!(mapping.bytes()[range.clone()].iter().copied().eq(range.map(|i| (i % 251) as u8)));
    // The last page is given back although the file ends within it.
    mapping.populate(0..LEN).unwrap();
    mapping.give_back(0..LEN);
    assert_eq!(resident_bytes(mapping, 0..LEN), 0);
    // Less than a page, or nothing.
    mapping.give_back(UNIT + 1..UNIT + page - 1);
    mapping.give_back(5..5);
    mapping.populate(LEN..LEN).unwrap();
}

#[test]
fn a_file_cut_by_others_is_reported() {
    let Fixture { mapping, path, .. } = &mapped();
    mapping.populate(0..LEN).unwrap();
    let file = OpenOptions::new().write(true).open(path).unwrap();
    // Whole pages are gone: reading them would kill the process.
    file.set_len(10 * UNIT as u64 + 7).unwrap();
    let error = mapping.populate(20 * UNIT..30 * UNIT).unwrap_err();
    let Error::Truncated { found, expected, .. } = error else { panic!("{error}") };
    assert_eq!((found, expected), (10 * UNIT as u64 + 7, 30 * UNIT as u64));
    // The last page that survives is zeros past the cut.
    let text = mapping.populate(10 * UNIT..10 * UNIT + 8).unwrap_err().to_string();
    assert!(text.ends_with("found 655367 bytes, expected at least 655368"), "{text}");
    assert!(text.contains("file.bin: the file was truncated"), "{text}");
    mapping.populate(0..10 * UNIT + 7).unwrap();
    // Whole again, the file is readable again.
    file.set_len(LEN as u64).unwrap();
    mapping.populate(0..LEN).unwrap();
}

#[test]
#[should_panic(expected = "leaves a map of")]
fn a_range_beyond_the_map_is_the_callers_mistake() {
    let _ = mapped().mapping.populate(0..LEN + 1);
}
