//! The decisions against a model that is written for reading, and against what may never happen.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// LRU with pins for one layer, as one would explain it: a list from the least to the most recently
/// used, and a map of pins.
#[derive(Default)]
struct Naive {
    oldest_first: Vec<u16>,
    pins: BTreeMap<u16, u32>,
    room: usize,
}

impl Naive {
    fn is_pinned(&self, expert: u16) -> bool {
        self.pins.get(&expert).is_some_and(|&n| n > 0)
    }

    fn use_now(&mut self, expert: u16) {
        self.oldest_first.retain(|&e| e != expert);
        self.oldest_first.push(expert);
    }

    /// Until one more expert of `spare` fits.
    fn make_room(&mut self, spare: usize, keep: &[u16]) -> Vec<u16> {
        let mut evicted = Vec::new();
        while self.oldest_first.len() + spare > self.room {
            let may_go = |&e: &u16| !self.is_pinned(e) && !keep.contains(&e);
            let Some(at) = self.oldest_first.iter().position(may_go) else { break };
            evicted.push(self.oldest_first.remove(at));
        }
        evicted
    }

    fn acquire(&mut self, experts: &[u16]) -> Decision {
        let mut decision = Decision::default();
        let here = self.oldest_first.clone();
        for &expert in experts.iter().filter(|e| here.contains(e)) {
            *self.pins.entry(expert).or_default() += 1;
        }
        for &expert in experts.iter().filter(|e| !here.contains(e)) {
            if !self.oldest_first.contains(&expert) {
                decision.evict.extend(self.make_room(1, &[]));
                decision.admit.push(expert);
                self.oldest_first.push(expert);
            }
            *self.pins.entry(expert).or_default() += 1;
        }
        // What is used at once leaves in the order of ids.
        let mut used = experts.to_vec();
        used.sort();
        used.into_iter().for_each(|expert| self.use_now(expert));
        decision
    }

    fn release(&mut self, experts: &[u16]) -> Vec<u16> {
        for expert in experts {
            *self.pins.get_mut(expert).unwrap() -= 1;
        }
        self.make_room(0, &[])
    }
}

#[derive(Debug, Clone)]
enum Step {
    Acquire(usize, Vec<u16>),
    /// The so-manieth of what is in use.
    Release(usize),
    Admit(usize, Vec<u16>),
    Resize(u64),
}

const LAYERS: usize = 3;
const EXPERTS: u16 = 12;
const SIZES: [u64; LAYERS] = [100, 150, 90];

fn steps(any_budget: bool) -> impl Strategy<Value = Vec<Step>> {
    let experts = || proptest::collection::vec(0..EXPERTS, 0..6);
    let smallest = if any_budget { 0 } else { 4 * 340 };
    let step = prop_oneof![
        4 => (0..LAYERS, experts()).prop_map(|(l, e)| Step::Acquire(l, e)),
        4 => (0..16usize).prop_map(Step::Release),
        1 => (0..LAYERS, experts()).prop_map(|(l, e)| Step::Admit(l, e)),
        1 => (smallest..5000u64).prop_map(Step::Resize),
    ];
    proptest::collection::vec(step, 0..200)
}

/// What the tests keep beside the cache: who is in use, and who is here.
struct Witness {
    cache: Cache,
    in_use: Vec<(usize, Vec<u16>)>,
    here: [Vec<u16>; LAYERS],
}

impl Witness {
    fn carry_out(&mut self, layer: usize, decision: &Decision) {
        for victim in &decision.evict {
            let pinned = self.in_use.iter().any(|(l, e)| *l == layer && e.contains(victim));
            assert!(!pinned, "evicted {victim} of layer {layer}, which is in use");
            let at = self.here[layer].iter().position(|e| e == victim).expect("was here");
            self.here[layer].remove(at);
        }
        for expert in &decision.admit {
            assert!(!self.here[layer].contains(expert), "admitted {expert} twice");
            self.here[layer].push(*expert);
        }
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Acquire(layer, experts) => {
                let decision = self.cache.acquire(*layer, experts);
                self.carry_out(*layer, &decision);
                assert!(experts.iter().all(|e| self.here[*layer].contains(e)));
                self.in_use.push((*layer, experts.clone()));
            }
            Step::Release(which) if !self.in_use.is_empty() => {
                let (layer, experts) = self.in_use.remove(which % self.in_use.len());
                let evict = self.cache.release(layer, &experts);
                self.carry_out(layer, &Decision { admit: vec![], evict });
            }
            Step::Release(_) => {}
            Step::Admit(layer, experts) => {
                let decision = self.cache.admit(*layer, experts);
                self.carry_out(*layer, &decision);
                let evict = self.cache.release(*layer, &decision.admit);
                self.carry_out(*layer, &Decision { admit: vec![], evict });
            }
            Step::Resize(budget) => {
                for (layer, victim) in self.cache.resize(*budget) {
                    self.carry_out(layer, &Decision { admit: vec![], evict: vec![victim] });
                }
            }
        }
    }

    fn check(&self) {
        let mut in_use = 0;
        for (layer, here) in self.here.iter().enumerate() {
            let mut here = here.clone();
            let mut resident: Vec<u16> = self.cache.resident(layer).collect();
            here.sort();
            resident.sort();
            assert_eq!(here, resident, "the decisions add up to what is resident");
            let pinned = |e: &&u16| self.in_use.iter().any(|(l, es)| *l == layer && es.contains(e));
            in_use += SIZES[layer] * here.iter().filter(pinned).count() as u64;
        }
        let bytes: u64 = (0..LAYERS).map(|l| SIZES[l] * self.here[l].len() as u64).sum();
        let budget = self.cache.budget();
        assert!(bytes <= budget + in_use, "{bytes} bytes, budget {budget}, {in_use} in use");
        let idle = self.in_use.is_empty();
        assert!(!idle || bytes <= budget, "{bytes} bytes when idle, budget {budget}");
    }
}

proptest! {
    #[test]
    fn the_budget_holds_and_pinned_experts_stay(
        budget in 0..5000u64, n_used in 0..8usize, steps in steps(true),
    ) {
        let cache = Cache::new(budget, &SIZES, EXPERTS as usize, n_used);
        let mut witness = Witness { cache, in_use: vec![], here: Default::default() };
        for step in &steps {
            witness.run(step);
            witness.check();
        }
        while !witness.in_use.is_empty() {
            witness.run(&Step::Release(0));
        }
        witness.check();
    }

    /// Above one token's working set (4 here), a layer is a plain LRU.
    #[test]
    fn decisions_are_those_of_a_plain_lru(steps in steps(false)) {
        let mut cache = Cache::new(2000, &SIZES, EXPERTS as usize, 4);
        let mut naive: [Naive; LAYERS] = Default::default();
        let (mut in_use, mut budget) = (Vec::<(usize, Vec<u16>)>::new(), 2000);
        for step in steps {
            for (layer, share) in shares(budget, &SIZES, EXPERTS as usize).into_iter().enumerate() {
                naive[layer].room = share;
            }
            match step {
                Step::Acquire(layer, experts) => {
                    let decision = cache.acquire(layer, &experts);
                    prop_assert_eq!(decision, naive[layer].acquire(&experts));
                    in_use.push((layer, experts));
                }
                Step::Release(which) if !in_use.is_empty() => {
                    let (layer, experts) = in_use.remove(which % in_use.len());
                    let evict = cache.release(layer, &experts);
                    prop_assert_eq!(evict, naive[layer].release(&experts));
                }
                Step::Resize(bytes) => {
                    budget = bytes;
                    let mut expected = Vec::new();
                    for (layer, share) in
                        shares(budget, &SIZES, EXPERTS as usize).into_iter().enumerate()
                    {
                        naive[layer].room = share;
                        let evicted = naive[layer].make_room(0, &[]);
                        expected.extend(evicted.into_iter().map(|e| (layer, e)));
                    }
                    prop_assert_eq!(cache.resize(bytes), expected);
                }
                _ => {}
            }
            for (layer, naive) in naive.iter().enumerate() {
                let mut expected = naive.oldest_first.clone();
                expected.sort();
                prop_assert!(cache.resident(layer).eq(expected));
            }
        }
    }

    #[test]
    fn shares_are_even_and_use_the_budget_up(
        budget in 0..10_000u64, sizes in proptest::collection::vec(1..300u64, 1..6), n in 1..20usize,
    ) {
        let shares = shares(budget, &sizes, n);
        let spent: u64 = shares.iter().zip(&sizes).map(|(&s, &b)| s as u64 * b).sum();
        let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
        prop_assert!(spent <= budget && *most <= n && most - least <= 1);
        for (share, size) in shares.iter().zip(&sizes) {
            let one_more_fits = spent + size <= budget;
            prop_assert!(!one_more_fits || share == most, "{shares:?} leaves {}", budget - spent);
        }
    }
}

/// Hits in 100 rounds through experts `0..n_used` of every layer of 16, one expert after the other.
fn hits_of_a_cyclic_scan(slots: u64, n_used: usize, at_once: bool) -> Vec<u64> {
    let mut cache = Cache::new(slots * 4 * 10, &[10; 4], 16, n_used);
    let experts: Vec<u16> = (0..n_used as u16).collect();
    for _ in 0..100 {
        for layer in 0..4 {
            for used in experts.chunks(if at_once { n_used } else { 1 }) {
                cache.acquire(layer, used);
                cache.release(layer, used);
            }
        }
    }
    cache.stats().map(|layer| layer.hits).collect()
}

#[test]
fn a_cyclic_scan_below_the_working_set_still_hits() {
    // A plain LRU hits 0 of 800 here. At best each share is hit once a round.
    for (slots, least) in [(1, 50), (4, 350), (7, 650)] {
        for hits in hits_of_a_cyclic_scan(slots, 8, false) {
            assert!((least..=slots * 100).contains(&hits), "{slots} of 8 experts: {hits} hits");
        }
        for hits in hits_of_a_cyclic_scan(slots, 8, true) {
            assert!((least..=slots * 100).contains(&hits), "{slots} of 8 at once: {hits} hits");
        }
    }
    assert_eq!(
        hits_of_a_cyclic_scan(8, 8, false),
        [792; 4],
        "the working set fits: all but the first"
    );
}

#[test]
fn below_the_working_set_the_share_follows_a_changing_text() {
    let mut cache = Cache::new(40, &[10], 16, 8);
    let mut read = |experts: std::ops::Range<u16>| {
        for expert in experts {
            cache.acquire(0, &[expert]);
            cache.release(0, &[expert]);
        }
        cache.resident(0).filter(|&e| e >= 8).count()
    };
    assert_eq!(read(0..8), 0);
    let kept = (0..50).map(|_| read(8..16)).last().unwrap();
    assert!(kept >= 3, "{kept} of 4 slots hold what is used now");
}

#[test]
fn the_cliff_is_announced_with_what_would_be_enough() {
    let cliff = |budget| Cache::new(budget, &[1 << 20, 2 << 20], 64, 8).cliff();
    let message = cliff(20 << 20).unwrap();
    assert!(message.contains("20 MiB") && message.contains("24 MiB"), "{message}");
    assert!(message.contains("holds 6 experts a layer, but a token uses 8"), "{message}");
    assert_eq!(cliff(24 << 20), None);
}

#[test]
fn a_download_never_displaces_its_own_batch_or_what_is_in_use() {
    let mut cache = Cache::new(40, &[10], 16, 4);
    cache.fill();
    cache.acquire(0, &[0]);
    let decision = cache.admit(0, &[1, 5, 6, 7, 8]);
    assert_eq!(decision, Decision { admit: vec![5, 6], evict: vec![2, 3] });
    assert_eq!(cache.release(0, &decision.admit), []);
    assert!([0, 1, 5, 6].iter().all(|&e| cache.contains(0, e)));
}

#[test]
fn counters_are_kept_a_layer() {
    let mut cache = Cache::new(40, &[10, 10], 16, 2);
    for experts in [[0, 1], [1, 2], [3, 1]] {
        cache.acquire(1, &experts);
        cache.release(1, &experts);
    }
    cache.count_read(1);
    let expected = LayerStats { hits: 2, misses: 4, evictions: 2, bytes_read: 10 };
    assert_eq!(cache.stats().collect::<Vec<_>>(), [LayerStats::default(), expected]);
}

#[test]
fn an_expert_that_is_lost_leaves_even_when_pinned() {
    let mut cache = Cache::new(40, &[10], 16, 2);
    cache.acquire(0, &[3, 4]);
    cache.forget(0, 3);
    assert!(!cache.contains(0, 3));
    assert_eq!(cache.release(0, &[3, 4]), []);
}
