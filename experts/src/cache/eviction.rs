//! Who leaves the cache first.

/// Ranks the experts of one layer by what keeping them is worth. Those in use stay whatever it says.
pub trait Eviction: Send {
    /// Some experts are used together, whether they are in the cache or not.
    fn used(&mut self, experts: &[u16]);

    /// What keeping an expert is worth, after what was used so far. The least leaves first, and of
    /// equals the lowest id.
    fn worth(&self, expert: u16) -> f64;
}

/// The least recently used leaves first.
#[derive(Debug)]
pub struct Lru {
    uses: u64,
    /// By expert, the use that was its last; 0 before the first.
    last: Vec<u64>,
}

impl Lru {
    /// For a layer of `n_experts` that were never used.
    pub fn new(n_experts: usize) -> Lru {
        Lru { uses: 0, last: vec![0; n_experts] }
    }
}

impl Eviction for Lru {
    fn used(&mut self, experts: &[u16]) {
        self.uses += 1;
        experts.iter().for_each(|&expert| self.last[usize::from(expert)] = self.uses);
    }

    fn worth(&self, expert: u16) -> f64 {
        self.last[usize::from(expert)] as f64
    }
}
