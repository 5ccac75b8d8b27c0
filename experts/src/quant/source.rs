//! The weight rows that become a panel.

use std::arch::x86_64::*;
use std::array::from_fn;
use std::cell::Cell;

/// `ROWS` weight rows.
///
/// The hardware's prefetch cannot follow so many rows at once. So each visit to a row asks for one line of the next
/// panel, in the order of memory: many requests at once would hold up the loads behind them.
pub(super) struct Source<const ROWS: usize> {
    rows: [*const u8; ROWS],
    row_bytes: usize,
    /// Where in each row the blocks begin, and where those that are read next do.
    at: usize,
    next: usize,
    /// What to ask for next, and where to stop.
    ahead: Cell<*const u8>,
    end: *const u8,
}

impl<const ROWS: usize> Source<ROWS> {
    /// `rows` rows, one after another from `w`; the last stands in for those beyond it.
    pub(super) fn new(w: *const u8, row_bytes: usize, rows: usize) -> Source<ROWS> {
        let row = |r: usize| w.wrapping_add(r.min(rows - 1) * row_bytes);
        Source { rows: from_fn(row), row_bytes, at: 0, next: 0, ahead: Cell::new(w), end: w }
    }

    /// Moves on to the blocks at `at`, of `len` bytes a row.
    pub(super) fn go_to(&mut self, at: usize, len: usize) {
        self.at = at;
        self.next = if at + len < self.row_bytes { at + len } else { ROWS * self.row_bytes };
        let ahead = self.rows[0].wrapping_add(ROWS * (self.row_bytes + at));
        self.ahead.set(ahead);
        self.end = ahead.wrapping_add(ROWS * len);
    }

    /// Where the blocks of row `r` begin.
    #[inline(always)]
    pub(super) fn row(&self, r: usize) -> *const u8 {
        self.rows[r].wrapping_add(self.at)
    }

    /// The same, on a visit.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn visit(&self, r: usize) -> *const u8 {
        let line = self.ahead.get();
        if line < self.end {
            // Into the second cache: a panel fills the first, where loads would wait behind so many requests. A prefetch of
            // an address that is not mapped does nothing.
            _mm_prefetch::<_MM_HINT_T1>(line.cast());
            self.ahead.set(line.wrapping_add(64));
        }
        self.row(r)
    }

    /// Where byte `at` of row `r`'s blocks is, on a visit that reads up to a line there, and asks for as much of the row's next
    /// blocks from the second cache.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn visit_line(&self, r: usize, at: usize) -> *const u8 {
        _mm_prefetch::<_MM_HINT_T0>(self.rows[r].wrapping_add(self.next + at + 63).cast());
        self.visit(r).wrapping_add(at)
    }
}
