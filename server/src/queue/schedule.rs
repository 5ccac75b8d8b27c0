//! Which of the waiting requests are computed next, together, and whether to wait for more of them. Decisions only:
//! times are arguments.
//!
//! Requests of one layer share each expert's weights, so that batches should be large. In order of arrival they never
//! become so: devices that decode are spread over the layers, every batch moves its devices on by one layer, and all
//! batches take turns, so that none catches up with another. Here the layer with the most rows goes first, again and
//! again. Its devices find others waiting at their next layer, and go on together, until all that can keep pace are in step.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

/// What a row weighs that nothing was preferred to yet. Each batch that is makes it heavier by one, so that it has its
/// turn some time.
const WEIGHT: u64 = 16;
/// A row weighs so many times less while its device, which kept pace with its batch, waits for others to come by. Two groups
/// as large would take turns for ever; so one goes on until it meets the other.
const HELD: u64 = 4;

/// Requests that can be computed together: the layer, and the form of the activations.
pub(super) type Kind = (usize, std::mem::Discriminant<outrigger_proto::encoding::Decoded>);

/// Requests that wait, and what the last batch teaches about the next.
pub(super) struct Schedule<T> {
    waiting: Vec<Waiting<T>>,
    /// Rows of all that wait.
    rows: usize,
    /// Batches so far.
    batches: u64,
    last: Option<Batch>,
    /// Requests that came since the last batch ended.
    came: usize,
    /// How long it recently took until nearly all that a batch answered were back with their next request.
    back: Duration,
    /// Recent time a row.
    per_row: Duration,
    /// Who waits for half of it goes first.
    max_wait: Duration,
}

struct Waiting<T> {
    request: T,
    kind: Kind,
    rows: usize,
    since: Instant,
    /// Batches when it came.
    batches: u64,
    /// The last batch then was its device's: it keeps pace.
    quick: bool,
}

/// A batch that has ended.
struct Batch {
    layer: usize,
    /// Whose requests.
    devices: Vec<usize>,
    took: Duration,
    ended: Instant,
}

impl Batch {
    /// Requests that make nearly all of it: some devices stop.
    fn most(&self) -> usize {
        self.devices.len() - self.devices.len() / 8
    }
}

impl<T> Schedule<T> {
    pub(super) fn new(max_wait: Duration) -> Schedule<T> {
        Schedule {
            waiting: Vec::new(),
            rows: 0,
            batches: 0,
            last: None,
            came: 0,
            back: Duration::ZERO,
            per_row: Duration::ZERO,
            max_wait,
        }
    }

    pub(super) fn push(
        &mut self,
        now: Instant,
        kind: Kind,
        rows: usize,
        device: usize,
        request: T,
    ) {
        self.came += 1;
        self.rows += rows;
        let quick = self.last.as_ref().is_some_and(|last| last.devices.contains(&device));
        let batches = self.batches;
        self.waiting.push(Waiting { request, kind, rows, since: now, batches, quick });
        if let Some(last) = &self.last
            && self.came == last.most()
        {
            self.back = smooth(self.back, now.saturating_duration_since(last.ended));
        }
    }

    /// Until when to wait for those that the last batch answered, while [`Schedule::is_complete`] says that some are
    /// missing; `None` to begin at once. They are worth it where they are quick beside a batch, and where they are not
    /// the fewer: what is here already can be computed meanwhile.
    pub(super) fn gather_until(&self) -> Option<Instant> {
        let last = self.last.as_ref()?;
        let others = self.waiting.len().saturating_sub(self.came);
        let window = self.back * 2;
        let requests = last.devices.len();
        let worth = requests > 1 && others <= requests && window <= last.took;
        (worth && !self.is_complete()).then(|| last.ended + window)
    }

    /// Whether as many came as the last batch answered.
    pub(super) fn is_complete(&self) -> bool {
        self.last.as_ref().is_none_or(|last| self.came >= last.devices.len())
    }

    /// Takes the requests of the next batch, oldest first, at least one and up to `max_rows` rows; none if none wait.
    pub(super) fn take(&mut self, now: Instant, max_rows: usize) -> Vec<T> {
        self.note_absence(now);
        let Some(kind) = self.heaviest(now) else { return Vec::new() };
        let mut rows = 0;
        let taken = self.waiting.extract_if(.., |waiting| {
            let fits = rows == 0 || rows + waiting.rows <= max_rows;
            let takes = waiting.kind == kind && fits;
            rows += if takes { waiting.rows } else { 0 };
            takes
        });
        let batch = taken.map(|waiting| waiting.request).collect();
        self.rows -= rows;
        self.batches += 1;
        batch
    }

    /// The kind to go next: what has waited too long, or else the heaviest, and of equals the one that the last
    /// batch's devices come to next.
    fn heaviest(&self, now: Instant) -> Option<Kind> {
        let oldest = self.waiting.iter().min_by_key(|waiting| waiting.since)?;
        if now.saturating_duration_since(oldest.since) > self.max_wait / 2 {
            return Some(oldest.kind);
        }
        let mut weights: Vec<(Kind, u64)> = Vec::new();
        for waiting in &self.waiting {
            let age = WEIGHT + self.batches - waiting.batches;
            let weight = waiting.rows as u64 * age * if self.holds(waiting) { 1 } else { HELD };
            match weights.iter_mut().find(|(kind, _)| *kind == waiting.kind) {
                Some((_, sum)) => *sum += weight,
                None => weights.push((waiting.kind, weight)),
            }
        }
        let next = self.last.as_ref().map_or(0, |last| last.layer + 1);
        let ahead = |layer: usize| (layer < next, layer);
        let heaviest = weights.iter().min_by_key(|((layer, _), w)| (Reverse(*w), ahead(*layer)));
        heaviest.map(|(kind, _)| *kind)
    }

    /// Whether it is to wait for others to come by: it kept pace, and was passed over.
    fn holds(&self, waiting: &Waiting<T>) -> bool {
        let passed_over = self.last.as_ref().is_some_and(|last| waiting.since < last.ended);
        waiting.quick && passed_over
    }

    /// Those who were waited for in vain are slow.
    fn note_absence(&mut self, now: Instant) {
        if let Some(last) = &self.last
            && self.came < last.most()
        {
            let away = now.saturating_duration_since(last.ended);
            if away > self.back {
                self.back = smooth(self.back, away);
            }
        }
    }

    /// A batch of requests from `devices` with `rows` in all has ended.
    pub(super) fn ended(
        &mut self,
        now: Instant,
        layer: usize,
        devices: Vec<usize>,
        rows: usize,
        took: Duration,
    ) {
        self.last = Some(Batch { layer, devices, took, ended: now });
        self.came = 0;
        self.per_row = smooth(self.per_row, took / rows as u32);
    }

    /// Forgets the requests of which `gone` says so.
    pub(super) fn forget(&mut self, gone: impl Fn(&T) -> bool) {
        let rows = &mut self.rows;
        self.waiting.retain(|waiting| {
            let stays = !gone(&waiting.request);
            *rows -= if stays { 0 } else { waiting.rows };
            stays
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Rows that wait.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// How long so many rows take, as things went recently.
    pub(super) fn time(&self, rows: usize) -> Duration {
        self.per_row.saturating_mul(u32::try_from(rows).unwrap_or(u32::MAX))
    }

    /// Whether one device has the server to itself, as far as can be seen.
    pub(super) fn is_quiet(&self) -> bool {
        self.waiting.is_empty() && self.last.as_ref().is_none_or(|last| last.devices.len() == 1)
    }
}

/// The average of recent values, of which the latest counts a quarter.
fn smooth(average: Duration, value: Duration) -> Duration {
    if average.is_zero() { value } else { (average * 3 + value) / 4 }
}

#[cfg(test)]
mod tests;
