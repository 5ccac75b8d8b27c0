//! The experts of a model in memory: carries the cache's decisions out on the mapped file.
//!
//! Nothing is read at open, as with any mapped model: an expert's bytes come from the file when it is
//! first used, on purpose and all at once, and are given back when it is evicted. With a budget for
//! all experts every one counts as [`Residency::Hot`] from the start: its first use reads it, and
//! it stays.
//!
//! What a layer misses is asked of the disk all at once, and waited for expert by expert, so that the
//! caller computes what is here while the rest comes.

mod pages;
mod pinned;
mod rate;
mod state;

use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::cache::{Budget, Cache, LayerStats};
use crate::error::{Error, Result};
use crate::model::{ExpertLayer, Model};
use pages::LayerPages;
pub use pinned::{Pinned, Refused};
use state::{Presence, State};

/// What the experts outside of the cache are, when the model file has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Elsewhere {
    /// On the device's flash: they can be read when they are needed.
    #[default]
    Cold,
    /// Not on the device, as if the file had been left on the server: only what is in the cache
    /// can run here.
    Absent,
}

impl FromStr for Elsewhere {
    type Err = Error;

    fn from_str(text: &str) -> Result<Elsewhere> {
        match text {
            "cold" => Ok(Elsewhere::Cold),
            "absent" => Ok(Elsewhere::Absent),
            _ => Err(Error::Setting {
                what: "elsewhere",
                found: text.to_owned(),
                expected: "cold or absent",
            }),
        }
    }
}

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
        let total: u64 = model.experts.iter().map(ExpertLayer::full_bytes).sum();
        let bytes = budget.bytes(total)?;
        if model.is_pack() && bytes < total {
            let (what, found) = ("expert cache", budget.to_string());
            let expected = "100%: what a pack holds was decided when it was made";
            return Err(Error::Setting { what, found, expected });
        }
        let mut cache = Cache::new(bytes, &sizes, n_experts, n_used);
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
        let store = ExpertStore { model, elsewhere, layers, state };
        store.keep_experts_apart();
        Ok(store)
    }

    /// Where each expert of a layer is, by expert id.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn residency(&self, layer: usize) -> Vec<Residency> {
        let elsewhere = match self.elsewhere {
            Elsewhere::Cold => Residency::Cold,
            Elsewhere::Absent => Residency::Absent,
        };
        let residency = |presence: &Presence| match presence {
            Presence::In | Presence::Promised => Residency::Hot,
            Presence::Out | Presence::Reading => elsewhere,
            Presence::Lost => Residency::Absent,
        };
        self.lock().presence[layer].iter().map(residency).collect()
    }

    /// Pins `experts` in memory until the answer is dropped, and starts to read all those that are not there:
    /// [`Pinned::arrivals`] waits for them. No more than [`ExpertStore::at_once`] keep the memory within the
    /// budget.
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
        self.exchange(&mut state, layer, &decision.evict, &wanted);
        drop(state);
        Ok(Pinned::new(self, layer, wanted, refused))
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
        self.exchange(&mut state, layer, &decision.evict, &decision.admit);
        drop(state);
        for &expert in &decision.admit {
            // A failure is noted already, and the others are still wanted.
            let _ = self.wait_for(layer, expert);
        }
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

    /// How many experts of a layer can be in use at once without exceeding its share of the budget, and at least
    /// those of one token.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn at_once(&self, layer: usize) -> usize {
        self.lock().cache.at_once(layer)
    }

    /// The memory that the experts may use, in bytes; what is in use may exceed it for that time.
    pub fn budget_bytes(&self) -> u64 {
        self.lock().cache.budget()
    }

    /// Whether the budget is enough for all experts.
    pub fn holds_all(&self) -> bool {
        self.budget_bytes() >= self.full_bytes()
    }

    /// The bytes of all experts of the full model, which is what a budget is a share of.
    pub fn full_bytes(&self) -> u64 {
        self.model.experts.iter().map(ExpertLayer::full_bytes).sum()
    }

    /// How long one expert of a layer is waited for that is not in memory, by recent waits.
    pub fn cold_load(&self, layer: usize) -> Duration {
        self.lock().rate.estimate(self.expert_bytes(layer))
    }

    /// What the cache did so far.
    pub fn stats(&self) -> CacheStats {
        CacheStats { layers: self.lock().cache.stats().collect() }
    }

    /// What to tell the user if the budget is too small for one token's experts and others are read from the file.
    pub fn cliff(&self) -> Option<String> {
        let cliff = self.lock().cache.cliff();
        cliff.filter(|_| self.elsewhere == Elsewhere::Cold)
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

    /// Unless all experts fit, the kernel is to read an expert without its neighbours.
    fn keep_experts_apart(&self) {
        if !self.holds_all() {
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

    /// Starts to read those of `wanted` that are not in memory and gives evicted experts' memory back, by turns: the
    /// disk is at work while memory is given back, and has no more than one expert's room ahead of it.
    fn exchange(&self, state: &mut State, layer: usize, evicted: &[u16], wanted: &[u16]) {
        let mut leaving = evicted.iter();
        for expert in state.start_reading(layer, wanted) {
            self.layers[layer].will_need(expert);
            self.give_back(state, layer, leaving.next().copied().as_slice());
        }
        self.give_back(state, layer, leaving.as_slice());
    }

    /// Waits until a pinned expert is in memory. Threads that want the same one wait side by side.
    ///
    /// # Errors
    /// The file no longer has it.
    fn wait_for(&self, layer: usize, expert: u16) -> std::result::Result<(), Arc<Error>> {
        if self.is_in(layer, expert) {
            return Ok(());
        }
        let pages = &self.layers[layer];
        let started = Instant::now();
        let read = pages.populate(expert);
        let took = started.elapsed();
        let read = read.and_then(|()| self.model.experts[layer].check(expert.into()));

        let mut state = self.lock();
        match read {
            Ok(()) => state.is_in(layer, expert, took),
            Err(why) => self.lose(&mut state, layer, expert, why),
        }
        pages.unmap_around(expert, state.out(layer));
        state.lost.get(&(layer, expert)).map_or(Ok(()), |why| Err(why.clone()))
    }

    fn is_in(&self, layer: usize, expert: u16) -> bool {
        self.lock().presence[layer][expert as usize] == Presence::In
    }

    fn release(&self, layer: usize, experts: &[u16]) {
        let mut state = self.lock();
        let evicted = state.cache.release(layer, experts);
        self.give_back(&mut state, layer, &evicted);
    }

    /// The file has no such expert any more, or other bytes than were written, now and later.
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

    /// Under the lock, so that nobody starts to read the same expert at the same time.
    fn give_back(&self, state: &mut State, layer: usize, evicted: &[u16]) {
        for &expert in evicted {
            let presence = &mut state.presence[layer][expert as usize];
            let before = std::mem::replace(presence, Presence::Out);
            if matches!(before, Presence::In | Presence::Reading) {
                self.layers[layer].give_back(expert, state.out(layer));
            }
        }
    }
}
