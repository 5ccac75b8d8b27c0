//! The expert store on a real file: what the kernel says is in memory, files that are cut off, threads.

#![cfg(target_os = "linux")] // /proc/self/smaps

mod smaps;

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use outrigger_experts::{
    Budget, Elsewhere, Error, ExpertStore, ExpertTensors, Model, Pinned, Residency, Tensor,
};
use tempfile::TempDir;

const N_USED: usize = 4;
const PAGE: usize = 4096;

/// The demo model in a file of its own, which a test may cut off.
struct Fixture {
    dir: TempDir,
    model: Arc<Model>,
    /// The file's bytes, read apart from the store.
    file: Vec<u8>,
}

impl Fixture {
    fn new() -> Fixture {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf");
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::copy(&demo, &path).unwrap();
        // What was not yet written cannot be dropped from the page cache.
        OpenOptions::new().write(true).open(&path).unwrap().sync_all().unwrap();
        let model = Arc::new(Model::open(&path).unwrap());
        Fixture { dir, model, file: std::fs::read(&demo).unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("model.gguf")
    }

    fn store(&self, budget: Budget, elsewhere: Elsewhere) -> ExpertStore {
        ExpertStore::open(self.model.clone(), budget, elsewhere).unwrap()
    }

    fn layers(&self) -> usize {
        self.model.experts.len()
    }

    fn n_experts(&self) -> usize {
        self.model.spec.n_experts
    }

    fn all_experts_bytes(&self) -> u64 {
        let layers = self.model.experts.iter();
        layers.map(|layer| (layer.bytes_per_expert() * layer.n_experts()) as u64).sum()
    }

    /// Expert tensors' bytes that the kernel says this process has in memory.
    fn rss(&self) -> usize {
        let tensors = self.model.experts.iter().flat_map(|layer| layer.tensors());
        let ranges: Vec<Range<usize>> = tensors.map(Tensor::range).collect();
        smaps::rss(&self.path(), &ranges)
    }

    /// The bytes of the experts in memory, and the bytes of the pages that they lie in. A page at the
    /// end of a stack of experts stays in memory, as it may hold something else too.
    fn hot(&self, store: &ExpertStore) -> (usize, usize) {
        let (mut bytes, mut pages) = (0, BTreeSet::new());
        for (l, layer) in self.model.experts.iter().enumerate() {
            for tensor in layer.tensors() {
                pages.extend([tensor.range().start / PAGE, (tensor.range().end - 1) / PAGE]);
            }
            let residency = store.residency(l);
            for e in (0..self.n_experts()).filter(|&e| residency[e] == Residency::Hot) {
                let ExpertTensors { gate_proj, up_proj, down_proj } = layer.expert(e);
                for tensor in [gate_proj, up_proj, down_proj] {
                    bytes += tensor.byte_len();
                    pages.extend(tensor.range().start / PAGE..tensor.range().end.div_ceil(PAGE));
                }
            }
        }
        (bytes, pages.len() * PAGE)
    }

    /// Holds the kernel's count against the budget and what is in use, up to whole pages.
    fn check_memory(&self, store: &ExpertStore, in_use: usize) {
        let (rss, (bytes, in_pages)) = (self.rss(), self.hot(store));
        let most = store.budget_bytes() as usize + in_use;
        let rounding = in_pages - bytes;
        assert!(
            rss <= most + rounding,
            "{rss} bytes in memory > {most} and {rounding} of rounding"
        );
        assert!(
            (bytes..=in_pages).contains(&rss),
            "{rss} in memory, {bytes} in {in_pages} are hot"
        );
    }

    fn check_bytes(&self, expert: u16, tensors: &ExpertTensors) {
        let ExpertTensors { gate_proj, up_proj, down_proj } = tensors;
        for tensor in [gate_proj, up_proj, down_proj] {
            assert!(tensor.bytes() == &self.file[tensor.range()], "{} of {expert}", tensor.name());
        }
    }

    fn cut_off(&self, bytes: usize) {
        OpenOptions::new().write(true).open(self.path()).unwrap().set_len(bytes as u64).unwrap();
    }
}

/// Waits for all that arrives.
fn all<'a>(pinned: &mut Pinned<'a>) -> Vec<(u16, ExpertTensors)> {
    let mut all = Vec::new();
    loop {
        let arrived = pinned.arrivals();
        if arrived.is_empty() {
            return all;
        }
        all.extend(arrived);
    }
}

/// Uses experts once, and says which arrived.
fn touch(store: &ExpertStore, layer: usize, experts: &[u16]) -> Vec<u16> {
    let mut pinned = store.acquire(layer, experts).unwrap();
    all(&mut pinned).into_iter().map(|(expert, _)| expert).collect()
}

/// xorshift64*: the tests need no more, and print their seeds by having constant ones.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }

    fn experts(&mut self, n_experts: usize) -> Vec<u16> {
        let mut experts = Vec::new();
        while experts.len() < N_USED {
            let expert = self.below(n_experts) as u16;
            if !experts.contains(&expert) {
                experts.push(expert);
            }
        }
        experts
    }
}

/// Runs tokens with random routing and holds the kernel's count against the budget.
fn rss_stays_within_the_budget(fixture: &Fixture) {
    let store = fixture.store(Budget::Fraction(0.25), Elsewhere::Cold);
    let budget = store.budget_bytes();
    assert_eq!(budget, fixture.all_experts_bytes() / 4);
    let mut random = Random(1);
    for token in 0..400 {
        for layer in 0..fixture.layers() {
            let experts = random.experts(fixture.n_experts());
            let mut pinned = store.acquire(layer, &experts).unwrap();
            let arrived = all(&mut pinned);
            assert_eq!(arrived.iter().map(|(e, _)| *e).collect::<Vec<_>>(), experts);
            arrived.iter().for_each(|(expert, tensors)| fixture.check_bytes(*expert, tensors));
            if token % 20 == 0 {
                fixture.check_memory(&store, N_USED * store.expert_bytes(layer));
            }
        }
    }
    fixture.check_memory(&store, 0);
    assert_eq!(fixture.hot(&store).0 as u64, budget, "all of the budget is used");
    let total = store.stats().total();
    assert_eq!(total.hits + total.misses, 400 * 4 * fixture.layers() as u64);
    assert_eq!(total.bytes_read, total.misses * store.expert_bytes(0) as u64);
    let hit_rate = total.hits as f64 / (total.hits + total.misses) as f64;
    assert!((0.22..0.28).contains(&hit_rate), "{hit_rate} of uniform routing, a quarter cached");
}

#[test]
fn the_process_stays_within_its_budget() {
    rss_stays_within_the_budget(&Fixture::new());
}

#[test]
fn the_process_stays_within_its_budget_when_another_keeps_the_file_cached() {
    let fixture = Fixture::new();
    // Through another name, so that its pages are not counted as ours.
    let other = fixture.dir.path().join("other.gguf");
    std::fs::hard_link(fixture.path(), &other).unwrap();
    let keeper = outrigger_experts::Mapping::open(&other).unwrap();
    keeper.populate(0..keeper.len()).unwrap();
    rss_stays_within_the_budget(&fixture);
    drop(keeper);
}

#[test]
fn evicted_experts_turn_cold_and_used_ones_hot() {
    let fixture = Fixture::new();
    let four = Budget::Bytes(4 * fixture.all_experts_bytes() / fixture.n_experts() as u64);
    let store = fixture.store(four, Elsewhere::Cold);
    assert_eq!(store.residency(0), [Residency::Cold; 32]);
    touch(&store, 0, &[1, 2, 3, 4]);
    touch(&store, 0, &[1, 9]);
    let now = store.residency(0);
    for expert in 0..32 {
        let expected =
            if [1, 3, 4, 9].contains(&expert) { Residency::Hot } else { Residency::Cold };
        assert!(now[expert] == expected || [2, 3].contains(&expert), "{expert}: {now:?}");
    }
    assert_eq!(now.iter().filter(|&&r| r == Residency::Hot).count(), 4);
    assert_ne!(store.cold_load(0), fixture.store(four, Elsewhere::Cold).cold_load(0), "measured");
}

#[test]
fn shrinking_gives_memory_back_at_once_and_what_is_in_use_later() {
    let fixture = Fixture::new();
    let store = fixture.store(Budget::Fraction(0.5), Elsewhere::Cold);
    for layer in 0..fixture.layers() {
        touch(&store, layer, &(0..16).collect::<Vec<u16>>());
    }
    let mut pinned = store.acquire(2, &[3, 30]).unwrap();
    let arrived = all(&mut pinned);
    fixture.check_memory(&store, 2 * store.expert_bytes(2));
    store.resize(0);
    fixture.check_memory(&store, 2 * store.expert_bytes(2));
    arrived.iter().for_each(|(expert, tensors)| fixture.check_bytes(*expert, tensors));
    drop(pinned);
    fixture.check_memory(&store, 0);
    assert!(store.cliff().unwrap().contains("a token uses 4"));
}

#[test]
fn a_budget_for_all_is_hot_from_the_start_and_reads_at_first_use() {
    let fixture = Fixture::new();
    let store = fixture.store(Budget::Fraction(1.0), Elsewhere::Cold);
    assert_eq!(store.residency(5), [Residency::Hot; 32]);
    assert!(fixture.rss() < fixture.all_experts_bytes() as usize / 10, "nothing is read at open");
    assert_eq!(touch(&store, 5, &[7, 8]), [7, 8]);
    assert!(fixture.rss() >= 2 * store.expert_bytes(5));
    let expected = 2 * store.expert_bytes(5) as u64;
    assert_eq!(store.stats().layers[5].bytes_read, expected);
    touch(&store, 5, &[7, 8]);
    assert_eq!(store.stats().layers[5].bytes_read, expected, "read once");
    assert_eq!(store.cliff(), None);
}

#[test]
fn absent_experts_are_refused_until_they_are_admitted() {
    let fixture = Fixture::new();
    let store = fixture.store(Budget::Fraction(0.25), Elsewhere::Absent);
    for layer in 0..fixture.layers() {
        let now = store.residency(layer);
        assert_eq!(
            (&now[..8], &now[8..]),
            (&[Residency::Hot; 8][..], &[Residency::Absent; 24][..])
        );
    }
    let mut pinned = store.acquire(1, &[20, 0, 1, 2, 3, 4, 5, 6]).unwrap();
    assert!(matches!(*pinned.refused()[0].why, Error::Absent { layer: 1, expert: 20 }));
    assert_eq!(pinned.refused().len(), 1);
    let arrived = all(&mut pinned);
    assert_eq!(arrived.iter().map(|(e, _)| *e).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6]);

    // Only expert 7 is not in use: one of the two can take its place.
    store.admit(1, &[20, 21]).unwrap();
    drop(pinned);
    let now = store.residency(1);
    assert_eq!((now[20], now[21], now[7]), (Residency::Hot, Residency::Absent, Residency::Absent));
    assert_eq!(touch(&store, 1, &[20]), [20]);

    // Experts that servers run are never read here: any budget is enough.
    assert_eq!(fixture.store(Budget::Bytes(0), Elsewhere::Absent).cliff(), None);
    assert!(fixture.store(Budget::Bytes(0), Elsewhere::Cold).cliff().is_some());
}

#[test]
fn a_file_that_is_cut_off_costs_experts_and_not_the_process() {
    let fixture = Fixture::new();
    let store = fixture.store(Budget::Fraction(0.5), Elsewhere::Cold);
    touch(&store, 4, &[6, 7]);
    // In the middle of an expert: its first pages are there still.
    let up = fixture.model.experts[4].expert(5).up_proj.range();
    fixture.cut_off((up.start + up.end) / 2);

    let mut pinned = store.acquire(4, &[5, 6, 30]).unwrap();
    assert!(pinned.arrivals().is_empty());
    for expert in [5, 6, 30] {
        let refused = pinned.refused().iter().find(|r| r.expert == expert).unwrap();
        assert!(matches!(*refused.why, Error::Truncated { .. }), "{expert}: {}", refused.why);
    }
    let now = store.residency(4);
    assert_eq!((now[5], now[6], now[30]), ([Residency::Absent; 3]).into());
    drop(pinned);

    // A longer file is not the old file.
    fixture.cut_off(fixture.file.len());
    assert_eq!(store.acquire(4, &[5]).unwrap().refused().len(), 1);
    store.admit(4, &[5, 30]).unwrap();
    assert_eq!(store.residency(4)[5], Residency::Absent);
    assert_eq!(touch(&store, 0, &[5]), [5]);
}

#[test]
fn what_is_here_comes_first_and_what_is_read_later_in_order() {
    let fixture = Fixture::new();
    let store = fixture.store(Budget::Fraction(0.5), Elsewhere::Cold);
    touch(&store, 3, &[1, 2, 8]);
    let before = store.stats().layers[3].bytes_read;
    let mut pinned = store.acquire(3, &[1, 2, 5, 8, 9]).unwrap();
    assert_eq!(store.stats().layers[3].bytes_read, before, "nothing was waited for");
    let wave = |pinned: &mut Pinned| {
        pinned.arrivals().into_iter().map(|(expert, _)| expert).collect::<Vec<_>>()
    };
    assert_eq!(wave(&mut pinned), [1, 2]);
    assert_eq!(wave(&mut pinned), [5, 8]);
    assert_eq!(wave(&mut pinned), [9]);
    assert!(wave(&mut pinned).is_empty());
    assert_eq!(store.stats().layers[3].bytes_read, before + 2 * store.expert_bytes(3) as u64);
}

#[test]
fn what_nobody_waited_for_gives_its_memory_back_too() {
    let fixture = Fixture::new();
    let store = fixture.store(Budget::Bytes(0), Elsewhere::Cold);
    drop(store.acquire(1, &[1, 2, 3]).unwrap());
    fixture.check_memory(&store, 0);
    assert_eq!(store.residency(1), [Residency::Cold; 32]);
    assert_eq!(touch(&store, 1, &[2]), [2]);
}

#[test]
fn ids_that_the_model_does_not_have_are_errors() {
    let fixture = Fixture::new();
    let store = fixture.store(Budget::Fraction(0.5), Elsewhere::Cold);
    for (layer, expert) in [(0, 32), (6, 0), (usize::MAX, u16::MAX)] {
        let error = store.acquire(layer, &[1, expert]).err().unwrap();
        assert!(matches!(error, Error::NoSuchExpert { layers: 6, experts: 32, .. }), "{error}");
        assert!(store.admit(layer, &[expert]).is_err());
    }
    assert!(store.acquire(6, &[]).is_err() && store.acquire(5, &[]).is_ok());
}

#[test]
fn threads_share_a_store() {
    let fixture = Fixture::new();
    let store = fixture.store(Budget::Fraction(0.15), Elsewhere::Cold);
    let (fixture, store) = (&fixture, &store);
    std::thread::scope(|scope| {
        for seed in 1..=3 {
            scope.spawn(move || {
                let mut random = Random(seed);
                for _ in 0..1500 {
                    // Few layers and experts, so that the threads meet.
                    let (layer, experts) = (random.below(2), random.experts(12));
                    let mut pinned = store.acquire(layer, &experts).unwrap();
                    let arrived = all(&mut pinned);
                    assert_eq!(arrived.len(), experts.len());
                    arrived.iter().for_each(|(e, tensors)| fixture.check_bytes(*e, tensors));
                }
            });
        }
        scope.spawn(|| {
            let mut random = Random(9);
            for step in 0..500 {
                store.admit(random.below(2), &random.experts(32)).unwrap();
                store.resize(fixture.all_experts_bytes() / if step % 2 == 0 { 10 } else { 7 });
                store.residency(0);
            }
        });
    });
    fixture.check_memory(store, 0);
}

#[test]
fn elsewhere_is_cold_or_absent() {
    assert_eq!("cold".parse::<Elsewhere>().unwrap(), Elsewhere::Cold);
    assert_eq!("absent".parse::<Elsewhere>().unwrap(), Elsewhere::Absent);
    let error = "warm".parse::<Elsewhere>().unwrap_err().to_string();
    assert!(error.contains("\"warm\"") && error.contains("cold or absent"), "{error}");
}
