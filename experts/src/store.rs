//! The experts of a model in memory: carries the cache's decisions out on the mapped file.
//!
//! Nothing is read at open, as with any mapped model: an expert's bytes come from the file when it is
//! first used, on purpose and all at once, and are given back when it is evicted. With a budget for
//! all experts every one counts as [`Residency::Hot`] from the start: its first use reads it, and
//! it stays.

mod pages;
mod rate;
mod state;

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::cache::{Budget, Cache, Elsewhere, LayerStats};
use crate::error::{Error, Result};
use crate::model::{ExpertLayer, ExpertTensors, Model};
use pages::LayerPages;
use state::{Presence, State};

/// Where an expert is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residency {
    /// In memory.
    Hot,
    /// In a local file, not in memory.
    Cold,
    /// Not on this device.
    Absent,
}

/// What the cache did since it was opened, per layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// One entry a layer, in order.
    pub layers: Vec<LayerStats>,
}

impl CacheStats {
    /// The sums over the layers.
    pub fn total(&self) -> LayerStats {
        let mut total = LayerStats::default();
        for layer in &self.layers {
            total += *layer;
        }
        total
    }
}

/// The experts of one model, within a memory budget. Shared between threads.
pub struct ExpertStore {
    model: Arc<Model>,
    elsewhere: Elsewhere,
    layers: Vec<LayerPages>,
    state: Mutex<State>,
    /// Some experts are no longer being read.
    read: Condvar,
}

impl ExpertStore {
    /// A store over all experts of `model`. With [`Elsewhere::Absent`] it starts filled with the
    /// lowest expert ids, as many in every layer; with [`Elsewhere::Cold`] it starts empty, unless
    /// the budget is enough for all.
    ///
    /// # Errors
    /// [`Error::Setting`] if the budget is a fraction that is none.
    pub fn open(model: Arc<Model>, budget: Budget, elsewhere: Elsewhere) -> Result<ExpertStore> {
        let (n_experts, n_used) = (model.spec.n_experts, model.spec.n_used);
        let layers: Vec<LayerPages> = model.experts.iter().map(LayerPages::new).collect();
        let sizes: Vec<u64> =
            model.experts.iter().map(|layer| layer.bytes_per_expert() as u64).collect();
        let total: u64 = sizes.iter().map(|bytes| bytes * n_experts as u64).sum();
        let budget = budget.bytes(total)?;
        if model.is_pack() && budget < total {
            let (what, found) = ("expert cache", Budget::Bytes(budget).to_string());
            let expected = "100%: what a pack holds was decided when it was made";
            return Err(Error::Setting { what, found, expected });
        }
        let mut cache = Cache::new(budget, &sizes, n_experts, n_used);
        if elsewhere == Elsewhere::Absent || cache.budget() >= total {
            cache.fill();
        }
        let mut state = State::new(cache, layers.len(), n_experts);
        for (layer, experts) in model.experts.iter().enumerate() {
            (0..n_experts)
                .filter(|&e| !experts.holds(e))
                .for_each(|e| state.never_had(layer, e as u16));
        }
        let state = Mutex::new(state);
        let store = ExpertStore { model, elsewhere, layers, state, read: Condvar::new() };
        store.keep_experts_apart();
        Ok(store)
    }

    /// Where each expert of a layer is, by expert id; replaces what `out` held.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn residency(&self, layer: usize, out: &mut Vec<Residency>) {
        let elsewhere = match self.elsewhere {
            Elsewhere::Cold => Residency::Cold,
            Elsewhere::Absent => Residency::Absent,
        };
        let state = self.lock();
        out.clear();
        out.extend(state.presence[layer].iter().map(|presence| match presence {
            Presence::In | Presence::Promised => Residency::Hot,
            Presence::Out | Presence::Reading => elsewhere,
            Presence::Lost => Residency::Absent,
        }));
    }

    /// Brings `experts` into memory and pins them there until the answer is dropped. Reads of
    /// several that are not in memory overlap.
    ///
    /// Experts that cannot be had are named by [`Pinned::refused`], and the others are there all the
    /// same: those whose bytes the file no longer has, from then on [`Residency::Absent`]; and with
    /// [`Elsewhere::Absent`] those outside of the cache.
    ///
    /// # Errors
    /// [`Error::NoSuchExpert`] if the model has no such layer or expert.
    pub fn acquire(&self, layer: usize, experts: &[u16]) -> Result<Pinned<'_>> {
        self.check_ids(layer, experts)?;
        let mut state = self.lock();
        self.lose_what_was_cut_off(&mut state, layer, experts);
        let refused = self.refusals(&state, layer, experts);
        let here = |e: &u16| !refused.iter().any(|refused| refused.expert == *e);
        let wanted: Vec<u16> = experts.iter().copied().filter(here).collect();
        let decision = state.cache.acquire(layer, &wanted);
        self.give_back(&mut state, layer, &decision.evict);
        let to_read = state.start_reading(layer, &wanted);
        drop(state);
        let mut pinned = Pinned { store: self, layer, experts: wanted, refused };

        self.read_in(layer, &to_read);
        let state = self.wait_while_read_by_others(layer, &pinned.experts);
        let lost = self.refusals(&state, layer, &pinned.experts);
        drop(state);
        pinned.refused.extend(lost);
        Ok(pinned)
    }

    /// Brings experts into memory because they were used elsewhere, in place of those that were
    /// used least recently here; never more than the budget holds. An expert whose read fails
    /// becomes [`Residency::Absent`].
    ///
    /// # Errors
    /// [`Error::NoSuchExpert`] if the model has no such layer or expert.
    pub fn admit(&self, layer: usize, experts: &[u16]) -> Result<()> {
        self.check_ids(layer, experts)?;
        let mut state = self.lock();
        let have = |&expert: &u16| state.presence[layer][expert as usize] != Presence::Lost;
        let wanted: Vec<u16> = experts.iter().copied().filter(have).collect();
        let decision = state.cache.admit(layer, &wanted);
        self.give_back(&mut state, layer, &decision.evict);
        let to_read = state.start_reading(layer, &decision.admit);
        drop(state);
        self.read_in(layer, &to_read);
        self.release(layer, &decision.admit);
        Ok(())
    }

    /// Changes the memory budget, in bytes, as when the system runs short. Experts that no longer fit leave at
    /// once, those in use when they are released.
    pub fn resize(&self, budget: u64) {
        let mut state = self.lock();
        for (layer, expert) in state.cache.resize(budget) {
            self.give_back(&mut state, layer, &[expert]);
        }
        drop(state);
        self.keep_experts_apart();
    }

    /// The bytes of one expert of a layer.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn expert_bytes(&self, layer: usize) -> usize {
        self.model.experts[layer].bytes_per_expert()
    }

    /// The memory that the experts may use, in bytes; what is in use may exceed it for that time.
    pub fn budget_bytes(&self) -> u64 {
        self.lock().cache.budget()
    }

    /// How long it takes to bring one expert of a layer into memory, by what recent reads took.
    pub fn cold_load(&self, layer: usize) -> Duration {
        self.lock().rate.estimate(self.expert_bytes(layer))
    }

    /// What the cache did so far.
    pub fn stats(&self) -> CacheStats {
        CacheStats { layers: self.lock().cache.stats().collect() }
    }

    /// What to tell the user if the budget is too small for one token's experts.
    pub fn cliff(&self) -> Option<String> {
        self.lock().cache.cliff()
    }
}

/// Experts of one layer that are in memory and stay there until this is dropped.
pub struct Pinned<'a> {
    store: &'a ExpertStore,
    layer: usize,
    /// What was pinned, including what was lost meanwhile.
    experts: Vec<u16>,
    refused: Vec<Refused>,
}

/// An expert that was asked for and cannot run here.
#[derive(Debug, Clone)]
pub struct Refused {
    /// The expert, in the layer that was asked for.
    pub expert: u16,
    /// Why.
    pub why: Arc<Error>,
}

impl Pinned<'_> {
    /// The weights of a pinned expert; `None` if it was refused or not asked for.
    pub fn get(&self, expert: u16) -> Option<ExpertTensors> {
        let refused = self.refused.iter().any(|refused| refused.expert == expert);
        let pinned = self.experts.contains(&expert) && !refused;
        pinned.then(|| self.store.model.experts[self.layer].expert(expert as usize))
    }

    /// The experts that were asked for and cannot run here.
    pub fn refused(&self) -> &[Refused] {
        &self.refused
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.store.release(self.layer, &self.experts);
    }
}

impl ExpertStore {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under this lock")
    }

    fn check_ids(&self, layer: usize, experts: &[u16]) -> Result<()> {
        let (layers, n_experts) = (self.layers.len(), self.model.spec.n_experts);
        let unknown = experts.iter().find(|&&expert| expert as usize >= n_experts);
        if layer < layers && unknown.is_none() {
            return Ok(());
        }
        let expert = unknown.or(experts.first()).copied().unwrap_or(0);
        Err(Error::NoSuchExpert { layer, expert, layers, experts: n_experts })
    }

    /// The bytes of all experts.
    fn total_bytes(&self) -> u64 {
        let layer = |layer: &ExpertLayer| (layer.bytes_per_expert() * layer.n_experts()) as u64;
        self.model.experts.iter().map(layer).sum()
    }

    /// Unless all experts fit, the kernel is to read an expert without its neighbours.
    fn keep_experts_apart(&self) {
        if self.budget_bytes() < self.total_bytes() {
            for tensor in self.model.experts.iter().flat_map(ExpertLayer::tensors) {
                tensor.mapping().advise_random(tensor.range());
            }
        }
    }

    /// Which of these cannot run here, and why.
    fn refusals(&self, state: &State, layer: usize, experts: &[u16]) -> Vec<Refused> {
        let why = |expert: u16| match state.lost.get(&(layer, expert)) {
            Some(why) => Some(why.clone()),
            None if self.elsewhere == Elsewhere::Cold => None,
            None if state.cache.contains(layer, expert) => None,
            None => Some(Arc::new(Error::Absent { layer, expert })),
        };
        let refused = |&expert: &u16| Some(Refused { expert, why: why(expert)? });
        experts.iter().filter_map(refused).collect()
    }

    /// Touching memory behind the end of a file that became shorter kills the process, even where it
    /// was in memory before: so the file's length is asked for at every use, at about 0.2 us.
    fn lose_what_was_cut_off(&self, state: &mut State, layer: usize, experts: &[u16]) {
        if self.layers[layer].check_files().is_ok() {
            return;
        }
        for &expert in experts {
            if let Err(why) = self.layers[layer].check_expert(expert) {
                self.lose(state, layer, expert, why);
            }
        }
    }

    /// Reads experts that [`State::start_reading`] named.
    fn read_in(&self, layer: usize, experts: &[u16]) {
        if experts.is_empty() {
            return;
        }
        let pages = &self.layers[layer];
        let started = Instant::now();
        experts.iter().for_each(|&expert| pages.will_need(expert));
        let results: Vec<Result<()>> = experts.iter().map(|&e| pages.populate(e)).collect();
        let took = started.elapsed();

        let mut state = self.lock();
        let read = results.iter().filter(|result| result.is_ok()).count();
        state.rate.record(read * self.expert_bytes(layer), took);
        for (&expert, result) in experts.iter().zip(results) {
            match result {
                Ok(()) => state.is_in(layer, expert),
                Err(why) => self.lose(&mut state, layer, expert, why),
            }
            pages.unmap_around(expert, state.out(layer));
        }
        drop(state);
        self.read.notify_all();
    }

    fn wait_while_read_by_others(&self, layer: usize, experts: &[u16]) -> MutexGuard<'_, State> {
        let reading = |state: &mut State| {
            experts.iter().any(|&e| state.presence[layer][e as usize] == Presence::Reading)
        };
        self.read.wait_while(self.lock(), reading).expect("nothing panics under this lock")
    }

    fn release(&self, layer: usize, experts: &[u16]) {
        let mut state = self.lock();
        let evicted = state.cache.release(layer, experts);
        self.give_back(&mut state, layer, &evicted);
    }

    /// The file has no such expert any more, now and later.
    fn lose(&self, state: &mut State, layer: usize, expert: u16, why: Error) {
        let presence = &mut state.presence[layer][expert as usize];
        if std::mem::replace(presence, Presence::Lost) == Presence::Lost {
            return;
        }
        tracing::warn!(layer, expert, error = &why as &dyn std::error::Error, "expert lost");
        state.cache.forget(layer, expert);
        state.lost.insert((layer, expert), Arc::new(why));
        self.layers[layer].give_back(expert, state.out(layer));
    }

    /// Under the lock, so that nobody reads the same expert in at the same time.
    fn give_back(&self, state: &mut State, layer: usize, evicted: &[u16]) {
        for &expert in evicted {
            let presence = &mut state.presence[layer][expert as usize];
            if std::mem::replace(presence, Presence::Out) == Presence::In {
                self.layers[layer].give_back(expert, state.out(layer));
            }
        }
    }
}
