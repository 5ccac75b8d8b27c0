//! Where the experts of a layer lie in the mapped file, and the system calls on them.

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::map::Mapping;
use crate::model::ExpertLayer;
use crate::tensor::Tensor;

/// The largest page: neighbours that are nearer may share one.
const PAGE: usize = 64 << 10;

/// A page fault also maps what the page cache has around it: the aligned 64 KiB (`fault_around_bytes`),
/// and from Linux 6.18 on all of a large folio, up to 2 MiB (`filemap_map_pages` in mm/filemap.c).
const FAULT_AROUND: usize = 2 << 20;

/// The pages of a layer's experts.
pub(super) struct LayerPages {
    /// In the order of the file.
    parts: Vec<Part>,
    /// `[expert]`: where in `parts` its three are, or two where gate and up are fused.
    parts_of: Vec<Vec<usize>>,
    /// The files, each once.
    mappings: Vec<Arc<Mapping>>,
}

/// One matrix of one expert.
struct Part {
    expert: usize,
    mapping: Arc<Mapping>,
    range: Range<usize>,
}

impl LayerPages {
    pub(super) fn new(layer: &ExpertLayer) -> LayerPages {
        let part = |(expert, matrix): (usize, Tensor)| Part {
            expert,
            mapping: matrix.mapping().clone(),
            range: matrix.range(),
        };
        let mut parts: Vec<Part> = layer.parts().into_iter().map(part).collect();
        parts.sort_by_key(|part| (Arc::as_ptr(&part.mapping), part.range.start));
        let mut parts_of = vec![Vec::new(); layer.n_experts()];
        for (at, part) in parts.iter().enumerate() {
            parts_of[part.expert].push(at);
        }
        let mut mappings: Vec<_> = parts.iter().map(|part| part.mapping.clone()).collect();
        mappings.dedup_by(|a, b| Arc::ptr_eq(a, b));
        LayerPages { parts, parts_of, mappings }
    }

    /// Whether the files are still as long as they were.
    pub(super) fn check_files(&self) -> Result<()> {
        self.mappings.iter().try_for_each(|mapping| mapping.check_length(mapping.len()))
    }

    /// Whether the files still have this expert's bytes.
    pub(super) fn check_expert(&self, expert: u16) -> Result<()> {
        self.parts_of(expert).try_for_each(|part| part.mapping.check_length(part.range.end))
    }

    /// Starts reading an expert.
    pub(super) fn will_need(&self, expert: u16) {
        self.parts_of(expert).for_each(|part| part.mapping.will_need(part.range.clone()));
    }

    /// Waits until an expert is in memory.
    pub(super) fn populate(&self, expert: u16) -> Result<()> {
        self.parts_of(expert).try_for_each(|part| part.mapping.populate(part.range.clone()))
    }

    /// Gives back the memory of an expert, which is one of those that are `out`, and the pages that it
    /// shares with others of them.
    pub(super) fn give_back(&self, expert: u16, out: impl Fn(usize) -> bool) {
        self.for_each_out_around(expert, PAGE, out, Mapping::give_back);
    }

    /// Unmaps what faulting `expert` in mapped of those that are `out`.
    pub(super) fn unmap_around(&self, expert: u16, out: impl Fn(usize) -> bool) {
        self.for_each_out_around(expert, FAULT_AROUND, out, Mapping::unmap);
    }

    /// Calls `act` on what belongs to none but the experts that are `out`, within `reach` of `expert`.
    fn for_each_out_around(
        &self,
        expert: u16,
        reach: usize,
        out: impl Fn(usize) -> bool,
        act: impl Fn(&Mapping, Range<usize>),
    ) {
        for &at in &self.parts_of[expert as usize] {
            let Range { start, end } = self.parts[at].range;
            let window = start.saturating_sub(reach)..end + reach;
            let neighbours = self.touching(at, &window);
            for run in neighbours.chunk_by(|a, b| out(a.expert) == out(b.expert)) {
                let (first, last) = (&run[0], &run[run.len() - 1]);
                if out(first.expert) {
                    let start = first.range.start.max(window.start);
                    act(&first.mapping, start..last.range.end.min(window.end));
                }
            }
        }
    }

    fn parts_of(&self, expert: u16) -> impl Iterator<Item = &Part> {
        self.parts_of[expert as usize].iter().map(|&at| &self.parts[at])
    }

    /// The part `at` and those before and after it without a gap, as far as the window shows them.
    fn touching(&self, at: usize, window: &Range<usize>) -> &[Part] {
        let parts = &self.parts;
        let (mut first, mut last) = (at, at);
        while first > 0
            && parts[first].range.start > window.start
            && parts[first].follows(&parts[first - 1])
        {
            first -= 1;
        }
        while last + 1 < parts.len()
            && parts[last].range.end < window.end
            && parts[last + 1].follows(&parts[last])
        {
            last += 1;
        }
        &parts[first..=last]
    }
}

impl Part {
    fn follows(&self, other: &Part) -> bool {
        Arc::ptr_eq(&self.mapping, &other.mapping) && self.range.start == other.range.end
    }
}
