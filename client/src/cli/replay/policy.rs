//! The policies that are compared: the engine's own, others that it could have, and the best that any could do.

use std::collections::VecDeque;

use clap::ValueEnum;
use outrigger_experts::{Eviction, Lru};

use super::Use;

/// Who leaves the cache first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Policy {
    /// The least recently used of its layer: the engine's own
    Lru,
    /// The least often used of its layer
    Lfu,
    /// The least often used of its layer, older uses counting less
    Aged,
    /// As aged, by how much the gate weighed each use
    Gate,
    /// As aged, and by what followed in the layer after the experts of the token just now
    Successor,
    /// The least recently used of all layers
    LruShared,
    /// Of all layers, what its own layer has done longest without; then what is needed last
    LeastStale,
    /// What its layer needs last: the best that can be, and known afterwards only
    Belady,
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.to_possible_value().expect("none is skipped").get_name())
    }
}

/// What a use counts for after one more of its layer. Found on the calibration text of `outrigger pack`, flat around
/// its best.
const DECAY: f64 = 0.98;

impl Policy {
    /// Whether all layers share one budget.
    pub(super) fn is_shared(self) -> bool {
        matches!(self, Policy::LruShared | Policy::LeastStale)
    }

    /// For a lane with these uses, of `n_experts`; `layers` of them in turn where they share it.
    pub(super) fn eviction(
        self,
        uses: &[Use],
        n_experts: usize,
        layers: usize,
    ) -> Box<dyn Eviction> {
        match self {
            Policy::Lru | Policy::LruShared => Box::new(Lru::new()),
            Policy::Lfu => Box::new(Aged::new(n_experts, 1.0)),
            Policy::Aged => Box::new(Aged::new(n_experts, DECAY)),
            Policy::Gate => Box::new(Gate::new(n_experts, uses)),
            Policy::Successor => Box::new(Successor::new(n_experts)),
            Policy::LeastStale => Box::new(LeastStale::new(n_experts, layers)),
            Policy::Belady => Box::new(Belady::new(n_experts, uses)),
        }
    }
}

/// Uses, each counting `decay` times what it did after every later one: LRFU (Lee et al., "LRFU: A Spectrum of Policies
/// that Subsumes the Least Recently Used and Least Frequently Used Policies", 2001).
struct Aged {
    decay: f64,
    counts: Vec<f64>,
}

impl Aged {
    fn new(n_experts: usize, decay: f64) -> Aged {
        Aged { decay, counts: vec![0.0; n_experts] }
    }

    fn add(&mut self, uses: impl Iterator<Item = (u16, f64)>) {
        self.counts.iter_mut().for_each(|count| *count *= self.decay);
        uses.for_each(|(expert, gain)| self.counts[usize::from(expert)] += gain);
    }
}

impl Eviction for Aged {
    fn used(&mut self, experts: &[u16]) {
        self.add(experts.iter().map(|&expert| (expert, 1.0)));
    }

    fn worth(&self, expert: u16) -> f64 {
        self.counts[usize::from(expert)]
    }
}

/// Aged sums of gate weights.
struct Gate {
    sums: Aged,
    /// Of the uses to come, in the order of the experts that are used.
    weights: VecDeque<Vec<f64>>,
}

impl Gate {
    fn new(n_experts: usize, uses: &[Use]) -> Gate {
        let weights = uses.iter().map(|used| used.weights.clone()).collect();
        Gate { sums: Aged::new(n_experts, DECAY), weights }
    }
}

impl Eviction for Gate {
    fn used(&mut self, experts: &[u16]) {
        let weights = self.weights.pop_front().unwrap_or_default();
        self.sums.add(experts.iter().copied().zip(weights));
    }

    fn worth(&self, expert: u16) -> f64 {
        self.sums.worth(expert)
    }
}

/// An expert's share of recent uses, plus how often it came after the experts that were used just now.
struct Successor {
    recent: Aged,
    /// `[before][after]`, how often they did.
    followed: Vec<Vec<f64>>,
    /// By expert, how often anything came after it.
    uses: Vec<f64>,
    /// What was used last.
    now: Vec<u16>,
}

impl Successor {
    fn new(n_experts: usize) -> Successor {
        Successor {
            recent: Aged::new(n_experts, DECAY),
            followed: vec![vec![0.0; n_experts]; n_experts],
            // No use yet makes no certainty.
            uses: vec![1.0; n_experts],
            now: Vec::new(),
        }
    }
}

impl Eviction for Successor {
    fn used(&mut self, experts: &[u16]) {
        for before in self.now.drain(..).map(usize::from) {
            self.uses[before] += 1.0;
            experts.iter().for_each(|&after| self.followed[before][usize::from(after)] += 1.0);
        }
        self.now.extend(experts);
        self.recent.used(experts);
    }

    fn worth(&self, expert: u16) -> f64 {
        let chance = |before: &u16| {
            let before = usize::from(*before);
            self.followed[before][usize::from(expert)] / self.uses[before]
        };
        let follows = self.now.iter().map(chance).sum::<f64>() / self.now.len().max(1) as f64;
        (1.0 - DECAY) * self.recent.worth(expert) + follows
    }
}

/// By how often an expert's layer ran without it, and then by how long it is until the layer runs again: our reading of
/// Least-Stale (Hoang et al., "SpecMD", arXiv 2602.03921).
struct LeastStale {
    /// Experts a layer.
    n_experts: usize,
    /// By layer, how often it ran.
    runs: Vec<u64>,
    /// By expert, the run of its layer that used it last; 0 before the first.
    last: Vec<u64>,
    /// The layer that runs now.
    layer: usize,
}

impl LeastStale {
    fn new(n_experts: usize, layers: usize) -> LeastStale {
        let n_each = n_experts / layers;
        LeastStale { n_experts: n_each, runs: vec![0; layers], last: vec![0; n_experts], layer: 0 }
    }
}

impl Eviction for LeastStale {
    fn used(&mut self, experts: &[u16]) {
        let Some(&first) = experts.first() else { return };
        self.layer = usize::from(first) / self.n_experts;
        self.runs[self.layer] += 1;
        let run = self.runs[self.layer];
        experts.iter().for_each(|&expert| self.last[usize::from(expert)] = run);
    }

    fn worth(&self, expert: u16) -> f64 {
        let (expert, layers) = (usize::from(expert), self.runs.len());
        let layer = expert / self.n_experts;
        let without = self.runs[layer] - self.last[expert];
        let until = (layer + layers - self.layer - 1) % layers;
        -((without * layers as u64 + until as u64) as f64)
    }
}

/// Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
struct Belady {
    /// By expert, the numbers of the uses to come.
    to_come: Vec<VecDeque<usize>>,
}

impl Belady {
    fn new(n_experts: usize, uses: &[Use]) -> Belady {
        let mut to_come = vec![VecDeque::new(); n_experts];
        for (number, used) in uses.iter().enumerate() {
            used.experts.iter().for_each(|&e| to_come[usize::from(e)].push_back(number));
        }
        Belady { to_come }
    }
}

impl Eviction for Belady {
    fn used(&mut self, experts: &[u16]) {
        for &expert in experts {
            self.to_come[usize::from(expert)].pop_front();
        }
    }

    fn worth(&self, expert: u16) -> f64 {
        self.to_come[usize::from(expert)].front().map_or(f64::NEG_INFINITY, |&next| -(next as f64))
    }
}
