//! What the store knows of its experts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::rate::ReadRate;
use crate::cache::Cache;
use crate::error::Error;

/// What the lock protects. Experts are read from the file without it.
pub(super) struct State {
    pub(super) cache: Cache,
    /// `[layer][expert]`
    pub(super) presence: Vec<Vec<Presence>>,
    /// Why the experts that are [`Presence::Lost`] are.
    pub(super) lost: BTreeMap<(usize, u16), Arc<Error>>,
    pub(super) rate: ReadRate,
}

/// How far an expert's bytes are, beside the cache's decision that it should be here.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// Not in memory.
    Out,
    /// Counted as in memory since the start, and read when it is first used.
    Promised,
    /// On its way from the disk, or there already but nobody waited for it.
    Reading,
    In,
    /// The file no longer has it.
    Lost,
}

impl State {
    /// What the cache has counts as in memory already.
    pub(super) fn new(cache: Cache, layers: usize, n_experts: usize) -> State {
        let mut presence = vec![vec![Presence::Out; n_experts]; layers];
        for (layer, presence) in presence.iter_mut().enumerate() {
            for expert in cache.resident(layer) {
                presence[expert as usize] = Presence::Promised;
            }
        }
        State { cache, presence, lost: BTreeMap::new(), rate: ReadRate::default() }
    }

    /// The file is a pack that has no such expert.
    pub(super) fn never_had(&mut self, layer: usize, expert: u16) {
        self.presence[layer][expert as usize] = Presence::Lost;
        self.lost.insert((layer, expert), Arc::new(Error::Absent { layer, expert }));
        self.cache.forget(layer, expert);
    }

    /// Which of these experts, all in the cache, the caller has to start reading.
    pub(super) fn start_reading(&mut self, layer: usize, experts: &[u16]) -> Vec<u16> {
        let mut to_read = Vec::new();
        for &expert in experts {
            let presence = &mut self.presence[layer][expert as usize];
            if matches!(presence, Presence::Out | Presence::Promised) {
                *presence = Presence::Reading;
                to_read.push(expert);
            }
        }
        to_read
    }

    /// Which experts of a layer are to have no memory.
    pub(super) fn out(&self, layer: usize) -> impl Fn(usize) -> bool {
        move |expert| matches!(self.presence[layer][expert], Presence::Out | Presence::Lost)
    }

    /// An expert was read and `took` so long to wait for. Another thread may have waited for it too, or have found
    /// meanwhile that the file was cut off.
    pub(super) fn is_in(&mut self, layer: usize, expert: u16, took: Duration) {
        let presence = &mut self.presence[layer][expert as usize];
        if *presence == Presence::Reading {
            *presence = Presence::In;
            self.rate.record(self.cache.count_read(layer), took);
        }
    }
}
