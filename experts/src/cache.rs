//! Which experts stay in memory: decisions only, returned as data.
//!
//! One LRU a layer, under one byte budget. Every layer gets the same number of experts, and what is
//! left of the budget buys one more for the first layers that it suffices for. A token visits the
//! layers in order, over and over: in one LRU for all layers such a cyclic scan evicts each layer
//! just before its turn comes, and below one token's working set it hits nothing at all. With a
//! share of its own a layer loses experts only to itself, so that cliff is left in one place: a share
//! smaller than the experts that a token uses in that layer. There [`Lru`] stops trusting recency,
//! and [`Cache::cliff`] says so to the user.

mod budget;
mod eviction;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::AddAssign;

pub use budget::Budget;
pub use eviction::{Eviction, Lru};

/// The decisions of the expert cache. It knows ids, sizes and pins; its caller moves the bytes.
pub struct Cache {
    layers: Vec<Layer>,
    budget: u64,
    n_experts: usize,
    n_used: usize,
}

/// What to do in one layer, in this order: give back `evict`, then fault in `admit`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Experts that come in.
    pub admit: Vec<u16>,
    /// Experts that leave.
    pub evict: Vec<u16>,
}

/// What the cache did in one layer since it was opened.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct LayerStats {
    /// Uses of an expert that was in the cache.
    pub hits: u64,
    /// Uses of an expert that was not.
    pub misses: u64,
    /// Experts that left to make room.
    pub evictions: u64,
    /// Bytes of experts faulted in.
    pub bytes_read: u64,
}

impl AddAssign for LayerStats {
    fn add_assign(&mut self, other: LayerStats) {
        self.hits += other.hits;
        self.misses += other.misses;
        self.evictions += other.evictions;
        self.bytes_read += other.bytes_read;
    }
}

impl Cache {
    /// An empty cache of `budget` bytes for layers of `n_experts` experts, of `expert_bytes[layer]`
    /// bytes each, of which a token uses `n_used` in a layer.
    pub fn new(budget: u64, expert_bytes: &[u64], n_experts: usize, n_used: usize) -> Cache {
        Cache::with_eviction(budget, expert_bytes, n_experts, n_used, |_| Box::new(Lru::new()))
    }

    /// The same with another order of leaving than [`Lru`], by layer.
    pub fn with_eviction(
        budget: u64,
        expert_bytes: &[u64],
        n_experts: usize,
        n_used: usize,
        mut eviction: impl FnMut(usize) -> Box<dyn Eviction>,
    ) -> Cache {
        let layers = expert_bytes.iter().enumerate();
        let layers = layers.map(|(i, &bytes)| Layer::new(bytes, eviction(i))).collect();
        let mut cache = Cache { layers, budget, n_experts, n_used: n_used.min(n_experts) };
        cache.resize(budget);
        cache
    }

    /// Pins `experts` for use. Those already here are hits; for the others room is made, if need be
    /// beyond the layer's share: what is in use is in memory, whatever the budget says.
    /// An expert that is named twice is pinned twice. Undone by [`Cache::release`].
    pub fn acquire(&mut self, layer: usize, experts: &[u16]) -> Decision {
        let guarded = self.guarded(layer);
        let layer = &mut self.layers[layer];
        layer.eviction.used(experts);
        // Hits are pinned before room is made, so that a miss cannot evict a hit of its own token.
        let (hits, rest): (Vec<u16>, Vec<u16>) =
            experts.iter().partition(|expert| layer.resident.contains_key(expert));
        hits.iter().for_each(|expert| layer.hit(expert));
        let mut decision = Decision::default();
        for expert in rest {
            if layer.resident.contains_key(&expert) {
                layer.hit(&expert); // named twice
                continue;
            }
            while !guarded && layer.resident.len() >= layer.slots {
                let Some(victim) = layer.evict(&[]) else { break };
                decision.evict.push(victim);
            }
            layer.stats.misses += 1;
            let passing = guarded && !layer.eviction.keeps_newcomer();
            layer.resident.insert(expert, Resident { pins: 1, passing });
            decision.admit.push(expert);
        }
        decision
    }

    /// Unpins what [`Cache::acquire`] or a decision's `admit` pinned, and returns what has to leave now
    /// for the layer to be within its share again.
    pub fn release(&mut self, layer: usize, experts: &[u16]) -> Vec<u16> {
        let layer = &mut self.layers[layer];
        for expert in experts {
            if let Some(resident) = layer.resident.get_mut(expert) {
                resident.pins = resident.pins.saturating_sub(1);
            }
        }
        layer.shrink()
    }

    /// Brings `experts` in because they were used elsewhere, within the layer's share and never in
    /// place of one another. What `Decision::admit` names is pinned until it is released, which is
    /// when its bytes are there.
    pub(crate) fn admit(&mut self, layer: usize, experts: &[u16]) -> Decision {
        let guarded = self.guarded(layer);
        let layer = &mut self.layers[layer];
        layer.eviction.used(experts);
        let mut decision = Decision::default();
        for &expert in experts {
            if layer.resident.contains_key(&expert) {
                continue;
            }
            layer.stats.misses += 1;
            if layer.resident.len() >= layer.slots {
                if guarded && !layer.eviction.keeps_newcomer() {
                    continue;
                }
                let Some(victim) = layer.evict(experts) else { continue };
                decision.evict.push(victim);
            }
            layer.resident.insert(expert, Resident { pins: 1, passing: false });
            decision.admit.push(expert);
        }
        decision
    }

    /// Takes the lowest expert ids of every layer as resident, up to its share.
    pub fn fill(&mut self) {
        for layer in &mut self.layers {
            for expert in 0..layer.slots as u16 {
                layer.resident.insert(expert, Resident { pins: 0, passing: false });
            }
        }
    }

    /// Drops an expert whose bytes could not be had, pinned or not.
    pub(crate) fn forget(&mut self, layer: usize, expert: u16) {
        self.layers[layer].resident.remove(&expert);
    }

    /// Changes the budget and returns which `(layer, expert)` leave at once; pinned ones that no
    /// longer fit leave when they are released.
    pub(crate) fn resize(&mut self, budget: u64) -> Vec<(usize, u16)> {
        self.budget = budget;
        let sizes: Vec<u64> = self.layers.iter().map(|layer| layer.expert_bytes).collect();
        for (layer, slots) in self.layers.iter_mut().zip(shares(budget, &sizes, self.n_experts)) {
            layer.slots = slots;
        }
        let layers = self.layers.iter_mut().enumerate();
        layers.flat_map(|(i, layer)| layer.shrink().into_iter().map(move |e| (i, e))).collect()
    }

    /// Counts the bytes of one expert of the layer as read, and returns them.
    pub fn count_read(&mut self, layer: usize) -> u64 {
        let layer = &mut self.layers[layer];
        layer.stats.bytes_read += layer.expert_bytes;
        layer.expert_bytes
    }

    /// How many experts of a layer can be in use at once without exceeding its share, and at least one token's.
    pub fn at_once(&self, layer: usize) -> usize {
        self.layers[layer].slots.max(self.n_used).max(1)
    }

    pub(crate) fn contains(&self, layer: usize, expert: u16) -> bool {
        self.layers[layer].resident.contains_key(&expert)
    }

    /// The experts of a layer that are in the cache, ascending.
    pub(crate) fn resident(&self, layer: usize) -> impl Iterator<Item = u16> + '_ {
        self.layers[layer].resident.keys().copied()
    }

    pub(crate) fn budget(&self) -> u64 {
        self.budget
    }

    /// What the cache did so far, by layer.
    pub fn stats(&self) -> impl Iterator<Item = LayerStats> + '_ {
        self.layers.iter().map(|layer| layer.stats)
    }

    /// What to tell the user when some layer's share is below one token's working set.
    pub(crate) fn cliff(&self) -> Option<String> {
        let least = self.layers.iter().map(|layer| layer.slots).min()?;
        if least >= self.n_used {
            return None;
        }
        let enough: u64 = self.layers.iter().map(|l| l.expert_bytes * self.n_used as u64).sum();
        Some(format!(
            "the expert cache of {} holds {least} experts a layer, but a token uses {}: most of them \
             will be read anew for every token; {} would hold one token's experts",
            Budget::Bytes(self.budget),
            self.n_used,
            Budget::Bytes(enough),
        ))
    }

    /// Whether the layer's share is below one token's working set.
    fn guarded(&self, layer: usize) -> bool {
        self.layers[layer].slots < self.n_used
    }
}

/// How many experts each layer may keep: as many in each, then one more while bytes are left.
fn shares(budget: u64, expert_bytes: &[u64], n_experts: usize) -> Vec<usize> {
    let one_each: u64 = expert_bytes.iter().sum();
    let Some(each) = budget.checked_div(one_each).filter(|&each| each < n_experts as u64) else {
        return vec![n_experts; expert_bytes.len()];
    };
    let mut left = budget - each * one_each;
    let share = |&bytes: &u64| {
        let one_more = bytes <= left;
        if one_more {
            left -= bytes;
        }
        each as usize + usize::from(one_more)
    };
    expert_bytes.iter().map(share).collect()
}

struct Layer {
    resident: BTreeMap<u16, Resident>,
    eviction: Box<dyn Eviction>,
    expert_bytes: u64,
    /// How many experts the layer's share of the budget holds.
    slots: usize,
    stats: LayerStats,
}

/// An expert in the cache.
struct Resident {
    pins: u32,
    /// Whether it leaves before all others, as it came while guarded and was not used again.
    passing: bool,
}

impl Layer {
    fn new(expert_bytes: u64, eviction: Box<dyn Eviction>) -> Layer {
        let (resident, stats) = (BTreeMap::new(), LayerStats::default());
        Layer { resident, eviction, expert_bytes, slots: 0, stats }
    }

    fn hit(&mut self, expert: &u16) {
        if let Some(resident) = self.resident.get_mut(expert) {
            resident.pins += 1;
            resident.passing = false;
            self.stats.hits += 1;
        }
    }

    /// Removes the expert of the least worth that is neither pinned nor in `keep`.
    fn evict(&mut self, keep: &[u16]) -> Option<u16> {
        let may_leave =
            |(expert, resident): &(&u16, &Resident)| resident.pins == 0 && !keep.contains(expert);
        let rank = |expert: u16, resident: &Resident| match resident.passing {
            true => f64::NEG_INFINITY,
            false => self.eviction.worth(expert),
        };
        let victim = self
            .resident
            .iter()
            .filter(may_leave)
            .min_by(|a, b| rank(*a.0, a.1).total_cmp(&rank(*b.0, b.1)));
        let victim = *victim?.0;
        self.resident.remove(&victim);
        self.stats.evictions += 1;
        Some(victim)
    }

    fn shrink(&mut self) -> Vec<u16> {
        let mut evicted = Vec::new();
        while self.resident.len() > self.slots {
            let Some(victim) = self.evict(&[]) else { break };
            evicted.push(victim);
        }
        evicted
    }
}
