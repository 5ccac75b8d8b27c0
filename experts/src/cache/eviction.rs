//! Who leaves the cache first.

use lru::LruCache;

/// Ranks the experts of one layer by what keeping them is worth. Those in use stay whatever it says.
pub trait Eviction: Send {
    /// Some experts are used together, whether they are in the cache or not.
    fn used(&mut self, experts: &[u16]);

    /// What keeping an expert is worth, after what was used so far. The least leaves first, and of
    /// equals the lowest id.
    fn worth(&self, expert: u16) -> f64;

    /// Whether the next newcomer stays, in a layer whose share is below one token's working set, or
    /// only passes through and leaves when it is released.
    fn keeps_newcomer(&mut self) -> bool {
        true
    }
}

/// In a layer below one token's working set, [`Lru`] keeps one newcomer in so many, so that most of the
/// share stays put and is hit again, yet follows a changing text. This is bimodal insertion: Qureshi
/// et al., "Adaptive Insertion Policies for High Performance Caching", ISCA 2007, with its 1/32.
const KEEP_EVERY: u32 = 32;

/// The least recently used leaves first.
#[derive(Debug)]
pub struct Lru {
    uses: u64,
    /// The experts that were used, in that order, each with the use that was its last.
    recency: LruCache<u16, u64>,
    /// Newcomers since the last that was kept, while not all are.
    passed: u32,
}

impl Lru {
    /// For a layer whose experts were never used.
    pub fn new() -> Lru {
        Lru { uses: 0, recency: LruCache::unbounded(), passed: 0 }
    }
}

impl Default for Lru {
    fn default() -> Lru {
        Lru::new()
    }
}

impl Eviction for Lru {
    fn used(&mut self, experts: &[u16]) {
        self.uses += 1;
        for &expert in experts {
            self.recency.put(expert, self.uses);
        }
    }

    fn worth(&self, expert: u16) -> f64 {
        self.recency.peek(&expert).map_or(0.0, |last| *last as f64)
    }

    fn keeps_newcomer(&mut self) -> bool {
        self.passed = (self.passed + 1) % KEEP_EVERY;
        self.passed == 0
    }
}
