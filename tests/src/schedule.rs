//! Random faults of the network and of the server: the same for the same seed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use outrigger::simulate::{Conditions, Network, ServerEvent, Timeline, Way};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::simulated::GOOD;

/// What is wrong for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Nothing passes.
    Partition,
    /// Nothing passes but one way.
    OneWay(Way),
    /// A round trip takes this long.
    Latency(Duration),
    /// This share of the packets is lost, and jitter delivers connections' packets out of order.
    Loss(f64),
    /// Bits a second, both ways.
    Collapse(f64),
    /// Nothing passes, and all is well, by turns of this length.
    Flapping(Duration),
    /// The server dies; another is started at the end.
    Crash,
    /// The server is stopped in good order; another is started at the end.
    Stop,
    /// The server is replaced by one with another model, and at the end by the right one.
    OtherModel,
}

/// A fault with its beginning and its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timed {
    /// The fault.
    pub fault: Fault,
    /// When it begins.
    pub from: Duration,
    /// When everything that it changed is as at the start.
    pub until: Duration,
}

/// Everything that happens in one run.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// Of the faults, and of the network's jitter and loss.
    pub seed: u64,
    /// Those of the network first; each kind ascending in time and without overlap.
    pub faults: Vec<Timed>,
}

impl Schedule {
    /// The schedule of a seed: one to five faults of the network, none to two of the server.
    pub fn random(seed: u64) -> Schedule {
        let mut chance = Chance(ChaCha8Rng::seed_from_u64(seed));
        let (network, server) = (1 + chance.below(5), chance.below(3));
        let mut faults = chance.sequence(network, Chance::network);
        faults.extend(chance.sequence(server, Chance::server));
        Schedule { seed, faults }
    }

    /// When the last fault is over.
    pub fn end(&self) -> Duration {
        self.faults.iter().map(|timed| timed.until).max().unwrap_or_default()
    }

    /// Whether some fault is on between two times.
    pub fn disturbed(&self, from: Duration, until: Duration) -> bool {
        self.faults.iter().any(|timed| timed.from <= until && from <= timed.until)
    }

    /// The network on which it happens, between a device and a server with `model`.
    pub fn network(&self, model: &Path, other: &Path) -> Network {
        let mut link: Timeline = vec![(Duration::ZERO, Some(GOOD))];
        let start = |model: &Path| ServerEvent::Start(PathBuf::from(model));
        let mut server = vec![(Duration::ZERO, start(model))];
        for &Timed { fault, from, until } in &self.faults {
            let bad = match fault {
                Fault::Partition => None,
                Fault::OneWay(way) => Some(Conditions { only: Some(way), ..GOOD }),
                Fault::Latency(round_trip) => Some(Conditions { round_trip, ..GOOD }),
                Fault::Loss(loss) => Some(Conditions { loss, jitter: GOOD.jitter * 20, ..GOOD }),
                Fault::Collapse(rate) => {
                    Some(Conditions { up: Some(rate), down: Some(rate), ..GOOD })
                }
                Fault::Flapping(turn) => {
                    let turns = (until - from).div_duration_f64(turn) as u32;
                    let turned = |i: u32| (from + turn * i, (i % 2 == 1).then_some(GOOD));
                    link.extend((1..=turns).map(turned).filter(|(at, _)| *at < until));
                    None
                }
                Fault::Crash | Fault::Stop | Fault::OtherModel => {
                    let how = match fault {
                        Fault::Stop => ServerEvent::Stop,
                        _ => ServerEvent::Kill,
                    };
                    server.push((from, how.clone()));
                    if fault == Fault::OtherModel {
                        server.extend([(from, start(other)), (until, how)]);
                    }
                    server.push((until, start(model)));
                    continue;
                }
            };
            link.extend([(from, bad), (until, Some(GOOD))]);
            link.sort_by_key(|(at, _)| *at);
        }
        Network { seed: self.seed, link, server, threads: 1 }
    }
}

struct Chance(ChaCha8Rng);

impl Chance {
    /// Faults from the first second on: 30 ms to 5 s long, 50 ms to 3 s apart, short ones as likely as long ones;
    /// flapping goes on for longer.
    fn sequence(&mut self, count: u32, kind: fn(&mut Chance) -> Fault) -> Vec<Timed> {
        let mut at = 1.0;
        let mut next = || {
            let fault = kind(self);
            let (least, most) = match fault {
                Fault::Flapping(turn) => (4.0 * turn.as_secs_f64(), 20.0),
                _ => (0.03, 5.0),
            };
            let from = at + self.between(0.05, 3.0);
            let until = from + self.between(least, most);
            at = until;
            let time = Duration::from_secs_f64;
            Timed { fault, from: time(from), until: time(until) }
        };
        (0..count).map(|_| next()).collect()
    }

    fn network(&mut self) -> Fault {
        match self.below(7) {
            0 => Fault::Partition,
            1 => Fault::OneWay(Way::Up),
            2 => Fault::OneWay(Way::Down),
            3 => Fault::Latency(Duration::from_secs_f64(self.between(0.05, 2.0))),
            4 => Fault::Loss(self.between(0.02, 0.5)),
            5 => Fault::Flapping(Duration::from_secs_f64(self.between(0.05, 1.0))),
            _ => Fault::Collapse(self.between(5e3, 2e6)),
        }
    }

    fn server(&mut self) -> Fault {
        match self.below(3) {
            0 => Fault::Crash,
            1 => Fault::Stop,
            _ => Fault::OtherModel,
        }
    }

    fn below(&mut self, count: u32) -> u32 {
        self.0.next_u32() % count
    }

    /// Evenly spread over the orders of magnitude.
    fn between(&mut self, least: f64, most: f64) -> f64 {
        least * (most / least).powf(f64::from(self.0.next_u32()) / f64::from(u32::MAX))
    }
}
