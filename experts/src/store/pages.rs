//! Where the experts of a layer lie in the mapped file, and the system calls on them.

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::map::Mapping;
use crate::model::ExpertLayer;

/// A page fault also maps what the page cache has of the aligned window around it: Linux's
/// `fault_around_bytes`, 64 KiB unless changed for debugging.
const FAULT_AROUND: usize = 64 << 10;

/// The stacks of matrices that hold a layer's experts: three, or two where gate and up are fused.
pub(super) struct LayerPages {
    stacks: Vec<Stack>,
}

/// One expert after the other, each of the same size.
struct Stack {
    mapping: Arc<Mapping>,
    start: usize,
    bytes: usize,
    n_experts: usize,
}

impl LayerPages {
    pub(super) fn new(layer: &ExpertLayer) -> LayerPages {
        let n_experts = layer.n_experts();
        let stacks = layer.tensors().map(|tensor| Stack {
            mapping: tensor.mapping().clone(),
            start: tensor.range().start,
            bytes: tensor.byte_len() / n_experts,
            n_experts,
        });
        LayerPages { stacks: stacks.collect() }
    }

    /// The kernel is to read an expert and not its neighbours.
    pub(super) fn advise_random(&self) {
        for stack in &self.stacks {
            stack.mapping.advise_random(stack.start..stack.start + stack.n_experts * stack.bytes);
        }
    }

    /// Whether the files are still as long as they were.
    pub(super) fn check_files(&self) -> Result<()> {
        let mut checked: Option<&Arc<Mapping>> = None;
        for Stack { mapping, .. } in &self.stacks {
            if !checked.is_some_and(|last| Arc::ptr_eq(last, mapping)) {
                mapping.check_length(mapping.len())?;
            }
            checked = Some(mapping);
        }
        Ok(())
    }

    /// Whether the files still have this expert's bytes.
    pub(super) fn check_expert(&self, expert: u16) -> Result<()> {
        self.stacks.iter().try_for_each(|stack| stack.mapping.check_length(stack.range(expert).end))
    }

    /// Starts reading an expert.
    pub(super) fn will_need(&self, expert: u16) {
        for stack in &self.stacks {
            stack.mapping.will_need(stack.range(expert));
        }
    }

    /// Waits until an expert is in memory.
    pub(super) fn populate(&self, expert: u16) -> Result<()> {
        self.stacks.iter().try_for_each(|stack| stack.mapping.populate(stack.range(expert)))
    }

    /// Gives back the memory in and around `expert` that belongs to no expert but those that are
    /// `out`: the expert itself if it is one, the page that it shares with a neighbour, and what
    /// faulting it in mapped of its neighbours.
    pub(super) fn give_back_around(&self, expert: u16, out: impl Fn(usize) -> bool) {
        for stack in &self.stacks {
            let Range { start, end } = stack.range(expert);
            let window = start.saturating_sub(FAULT_AROUND)..end + FAULT_AROUND;
            let mut experts = stack.experts_in(&window).peekable();
            while let Some(first) = experts.next() {
                if !out(first) {
                    continue;
                }
                let mut last = first;
                while let Some(next) = experts.next_if(|&next| out(next)) {
                    last = next;
                }
                let run = stack.range(first as u16).start..stack.range(last as u16).end;
                stack.mapping.give_back(run.start.max(window.start)..run.end.min(window.end));
            }
        }
    }
}

impl Stack {
    fn range(&self, expert: u16) -> Range<usize> {
        let start = self.start + expert as usize * self.bytes;
        start..start + self.bytes
    }

    /// The experts that share bytes with a window around one of them.
    fn experts_in(&self, window: &Range<usize>) -> Range<usize> {
        let first = window.start.saturating_sub(self.start) / self.bytes;
        first..(window.end - self.start).div_ceil(self.bytes).min(self.n_experts)
    }
}
