//! What this process has in memory of a mapped file, as the kernel counts it.

use std::ops::Range;
use std::path::Path;

/// The sum of `Rss` in bytes over the parts of a file's mapping that share bytes with `ranges` of it,
/// from `/proc/self/smaps`. The kernel keeps ranges of different advice as separate parts, so that
/// those of the experts are counted to the page.
pub(crate) fn rss(path: &Path, ranges: &[Range<usize>]) -> usize {
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("Linux");
    let (mut counts, mut total) = (false, 0);
    for line in smaps.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        match fields[..] {
            ["Rss:", kib, "kB"] if counts => total += kib.parse::<usize>().unwrap() * 1024,
            [addresses, _permissions, offset, _device, _inode, ref name @ ..]
                if addresses.contains('-') =>
            {
                let hex = |text| usize::from_str_radix(text, 16).unwrap();
                let (start, end) = addresses.split_once('-').unwrap();
                let part = hex(offset)..hex(offset) + (hex(end) - hex(start));
                let overlaps = |r: &Range<usize>| r.start < part.end && part.start < r.end;
                counts = name.join(" ") == path.to_str().unwrap() && ranges.iter().any(overlaps);
            }
            _ => {}
        }
    }
    total
}
