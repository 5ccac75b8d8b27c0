use std::mem::discriminant;

use outrigger_proto::encoding::Decoded;

use super::*;

const MS: Duration = Duration::from_millis(1);

/// A schedule of requests that are their own (layer, rows), and a clock that the test turns.
struct Bench {
    schedule: Schedule<(usize, usize)>,
    now: Instant,
}

impl Bench {
    fn new() -> Bench {
        Bench { schedule: Schedule::new(1000 * MS), now: Instant::now() }
    }

    /// A request of a device that is in every batch, as far as the schedule can tell.
    fn push(&mut self, layer: usize, rows: usize) {
        self.push_from(0, layer, rows);
    }

    fn push_from(&mut self, device: usize, layer: usize, rows: usize) {
        self.schedule.push(self.now, float(layer), rows, device, (layer, rows));
    }

    fn take(&mut self, max_rows: usize) -> Vec<(usize, usize)> {
        self.schedule.take(self.now, max_rows)
    }

    /// Takes a batch, which takes so long; its layer and requests.
    fn run(&mut self, took: Duration) -> (usize, usize) {
        self.run_while(took, &[])
    }

    /// As `run`, while requests of these layers come.
    fn run_while(&mut self, took: Duration, layers: &[usize]) -> (usize, usize) {
        let batch = self.take(usize::MAX);
        let (layer, rows) = (batch[0].0, batch.iter().map(|request| request.1).sum());
        layers.iter().for_each(|&layer| self.push(layer, 1));
        self.now += took;
        self.schedule.ended(self.now, layer, vec![0; batch.len()], rows, took);
        (layer, batch.len())
    }

    /// Devices that `answered` counts are back with their next request after `away`.
    fn back(&mut self, (layer, answered): (usize, usize), away: Duration) {
        self.now += away;
        (0..answered).for_each(|_| self.push(layer + 1, 1));
    }
}

fn float(layer: usize) -> Kind {
    (layer, discriminant(&Decoded::F32(Vec::new())))
}

#[test]
fn a_batch_is_of_one_layer_in_order_of_arrival_and_no_larger_than_it_may_be() {
    let mut bench = Bench::new();
    for (layer, rows) in [(1, 1), (2, 2), (1, 3), (2, 4), (1, 9)] {
        bench.push(layer, rows);
    }
    assert_eq!(bench.take(10), [(1, 1), (1, 3)], "13 rows are heaviest, and 9 more are too many");
    assert_eq!(bench.take(10), [(1, 9)]);
    assert_eq!(bench.take(10), [(2, 2), (2, 4)]);
    assert_eq!((bench.take(10), bench.schedule.rows()), (vec![], 0));
}

#[test]
fn a_request_that_is_larger_than_a_batch_is_one_by_itself() {
    let mut bench = Bench::new();
    bench.push(0, 12);
    bench.push(0, 1);
    assert_eq!(bench.take(10), [(0, 12)]);
}

#[test]
fn other_forms_of_activations_do_not_mix() {
    let mut bench = Bench::new();
    bench.push(1, 1);
    let quants = Decoded::Q80 { scales: Vec::new(), quants: Vec::new() };
    bench.schedule.push(bench.now, (1, discriminant(&quants)), 2, 0, (1, 2));
    bench.push(1, 3);
    assert_eq!(bench.take(10), [(1, 1), (1, 3)]);
    assert_eq!(bench.take(10), [(1, 2)]);
}

#[test]
fn devices_that_are_spread_over_the_layers_come_into_step() {
    let mut bench = Bench::new();
    // Two at each of 16 layers, and one more somewhere.
    (0..32).for_each(|device| bench.push(device / 2, 1));
    bench.push(5, 1);
    let mut sizes = Vec::new();
    for _ in 0..200 {
        let answered = bench.run(10 * MS);
        sizes.push(answered.1);
        bench.back((answered.0 % 16, answered.1), MS);
        bench
            .schedule
            .waiting
            .iter_mut()
            .for_each(|waiting| waiting.kind = float(waiting.kind.0 % 16));
    }
    assert!(sizes[150..].iter().all(|&size| size == 33), "{:?}", &sizes[150..]);
}

#[test]
fn only_those_who_keep_pace_are_held() {
    for (device, layer) in [(0, 3), (1, 0)] {
        let mut bench = Bench::new();
        (0..8).for_each(|_| bench.push(0, 1));
        let answered = bench.run(10 * MS);
        bench.back(answered, MS);
        let batch = bench.take(usize::MAX);
        // As many come meanwhile, behind.
        (0..8).for_each(|_| bench.push_from(device, 0, 1));
        bench.now += 10 * MS;
        bench.schedule.ended(bench.now, 1, vec![0; batch.len()], batch.len(), 10 * MS);
        bench.back((1, batch.len()), MS);
        let answered = bench.run(10 * MS);
        assert_eq!(answered, (2, 8), "of two as old those go on who are ahead");
        bench.back(answered, MS);
        assert_eq!(bench.run(10 * MS), (layer, 8), "device {device}");
    }
}

#[test]
fn nobody_starves() {
    let mut bench = Bench::new();
    bench.push(9, 1);
    (0..30).for_each(|_| bench.push(0, 1));
    let mut batches = 0;
    loop {
        let answered = bench.run(MS);
        if answered.0 == 9 {
            break;
        }
        batches += 1;
        // The others stay ahead of it for ever.
        bench.back((0, answered.1), Duration::ZERO);
        assert!(batches < 1000);
    }
    assert!(batches > 10, "30 rows go before one for a while: {batches}");
    // Who waits for half of the longest wait goes before everybody.
    bench.push(9, 1);
    bench.now += 501 * MS;
    (0..500).for_each(|_| bench.push(0, 1));
    assert_eq!(bench.run(MS).0, 1, "those of layer 1 are oldest");
    assert_eq!(bench.run(MS).0, 9);
}

#[test]
fn a_lone_device_is_never_waited_for() {
    let mut bench = Bench::new();
    for layer in 0..10 {
        assert!(bench.schedule.is_quiet());
        bench.push(layer, 1);
        assert_eq!(bench.schedule.gather_until(), None);
        bench.run(MS);
        bench.now += MS / 10;
    }
}

#[test]
fn those_who_come_back_quickly_are_waited_for() {
    let mut bench = Bench::new();
    (0..8).for_each(|_| bench.push(0, 1));
    assert_eq!(bench.schedule.gather_until(), None, "nothing is known of them");
    let answered = bench.run(10 * MS);
    assert!(!bench.schedule.is_quiet());
    bench.back(answered, MS);
    let answered = bench.run(10 * MS);
    let ended = bench.now;
    bench.back((answered.0, 3), MS / 2);
    assert_eq!(bench.schedule.gather_until(), Some(ended + 2 * MS), "twice what they took");
    bench.back((answered.0, 4), MS / 2);
    assert!(!bench.schedule.is_complete());
    bench.push(answered.0 + 1, 1);
    assert!(bench.schedule.is_complete());
    assert_eq!(bench.schedule.gather_until(), None, "all are there");
}

#[test]
fn those_who_stay_away_are_waited_for_no_longer() {
    let mut bench = Bench::new();
    (0..8).for_each(|_| bench.push(0, 1));
    let answered = bench.run(10 * MS);
    bench.back(answered, MS);
    let mut windows = 0;
    loop {
        // Others come meanwhile, and nobody comes back.
        bench.run_while(10 * MS, &[3; 8]);
        let Some(until) = bench.schedule.gather_until() else { break };
        bench.now = until;
        windows += 1;
        assert!(windows < 20);
    }
    assert!(windows > 0);
}

#[test]
fn the_fewer_are_not_waited_for() {
    let mut bench = Bench::new();
    (0..8).for_each(|_| bench.push(0, 1));
    let answered = bench.run(10 * MS);
    bench.back(answered, MS);
    let answered = bench.run_while(10 * MS, &[5; 8]);
    assert!(bench.schedule.gather_until().is_some(), "8 are here, and 8 come back soon");
    bench.back(answered, MS);
    bench.run_while(10 * MS, &[5]);
    assert_eq!(bench.schedule.gather_until(), None, "9 are here");
}
