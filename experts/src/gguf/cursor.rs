//! Checked little-endian reads out of a slice.

use crate::error::Mismatch;

/// A place in a slice. No read allocates, and none passes the slice's end.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { bytes, at: 0 }
    }

    /// Bytes from the slice's start.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Bytes until the slice's end.
    pub(super) fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(super) fn take(&mut self, n: u64) -> Result<&'a [u8], Mismatch> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(n).ok().and_then(|n| rest.get(..n)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => Err(Mismatch::new(
                format!("{} bytes to the end at byte {}", rest.len(), self.bytes.len()),
                format!("{n} more bytes at byte {}", self.at),
            )),
        }
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Mismatch> {
        let taken = self.take(N as u64)?;
        Ok(taken.try_into().expect("N bytes were taken"))
    }

    pub(super) fn u32(&mut self) -> Result<u32, Mismatch> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Mismatch> {
        self.array().map(u64::from_le_bytes)
    }

    /// A string that names something.
    pub(super) fn name(&mut self, limit: u64) -> Result<&'a str, Mismatch> {
        match self.string(limit)? {
            "" => Err(Mismatch::new("an empty name", format!("1 to {limit} bytes"))),
            name => Ok(name),
        }
    }

    /// A string: its length in bytes as u64, then its UTF-8.
    pub(super) fn string(&mut self, limit: u64) -> Result<&'a str, Mismatch> {
        let len = self.u64()?;
        if len > limit {
            return Err(Mismatch::new(
                format!("a string of {len} bytes"),
                format!("at most {limit} bytes"),
            ));
        }
        let at = self.at;
        let bytes = self.take(len)?;
        std::str::from_utf8(bytes).map_err(|error| {
            let bad = at + error.valid_up_to();
            Mismatch::new(format!("invalid UTF-8 at byte {bad}"), "UTF-8")
        })
    }
}
