//! When what is sent over a link arrives: a pure function of the link's timeline, a seed and what is on the way.

use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// The link while something passes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Conditions {
    /// From the device to the server and back, for an empty packet that nothing delays.
    pub round_trip: Duration,
    /// Mean of what comes on top for each packet in each direction, exponentially distributed.
    pub jitter: Duration,
    /// Bits a second from the device to the server; without limit if `None`.
    pub up: Option<f64>,
    /// Bits a second from the server to the device; without limit if `None`.
    pub down: Option<f64>,
    /// Share of the packets that are lost, and sent again.
    pub loss: f64,
    /// If given, what goes the other way is lost.
    pub only: Option<Way>,
}

/// The link over time: from when on it is how, ascending; `None` means that nothing passes.
pub type Timeline = Vec<(Duration, Option<Conditions>)>;

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the device to the server.
    Up,
    /// From the server to the device.
    Down,
}

/// What fits into one packet.
const PACKET_BYTES: usize = 1460;
/// Linux sends a lost packet again after two round trips (its tail loss probe), but not before this ...
const FIRST_RETRY: Duration = Duration::from_millis(10);
/// ... and from then on after this and a round trip, twice as long each time, ...
const RETRY: Duration = Duration::from_millis(200);
/// ... so many times (`tcp_retries2`).
const RETRIES: u32 = 15;

/// One link, both ways.
pub(super) struct Medium {
    timeline: Timeline,
    lanes: [Lane; 2],
}

/// One way of the link.
struct Lane {
    /// When its last bit so far has left.
    free: Duration,
    rng: ChaCha8Rng,
}

impl Medium {
    pub(super) fn new(timeline: Timeline, seed: u64) -> Medium {
        let lane = |way: Way| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(way as u64);
            Lane { free: Duration::ZERO, rng }
        };
        Medium { timeline, lanes: [lane(Way::Up), lane(Way::Down)] }
    }

    /// The link at a time, if anything passes this way.
    fn at(&self, way: Way, time: Duration) -> Option<Conditions> {
        let next = self.timeline.partition_point(|(from, _)| *from <= time);
        let link = next.checked_sub(1).and_then(|current| self.timeline[current].1);
        link.filter(|link| link.only.is_none_or(|only| only == way))
    }

    /// When all of some bytes that are written at `now` have arrived; `None` if TCP gives up before.
    pub(super) fn deliver(&mut self, way: Way, now: Duration, bytes: usize) -> Option<Duration> {
        let mut arrived = Duration::ZERO;
        for sent in (0..bytes.max(1)).step_by(PACKET_BYTES) {
            let size = PACKET_BYTES.min(bytes - sent);
            arrived = arrived.max(self.packet(way, now, size)?);
        }
        Some(arrived)
    }

    /// One packet: it waits for those before it, and is sent again as long as it is lost.
    fn packet(&mut self, way: Way, now: Duration, bytes: usize) -> Option<Duration> {
        let mut leaves = now.max(self.lanes[way as usize].free);
        for retry in 0..RETRIES {
            let link = self.at(way, leaves);
            let left = leaves + link.map_or(Duration::ZERO, |link| link.airtime(way, bytes));
            if retry == 0 {
                // What is sent again holds nobody else up.
                self.lanes[way as usize].free = left;
            }
            let arrives = link.and_then(|link| self.arrival(way, link, left));
            if arrives.is_some_and(|at| self.at(way, at).is_some()) {
                return arrives;
            }
            let trip = link.map_or(Duration::ZERO, |link| link.round_trip);
            leaves = left
                + match retry {
                    0 => FIRST_RETRY.max(2 * trip),
                    _ => (RETRY + trip) * (1 << (retry - 1)),
                };
        }
        None
    }

    /// When a packet that has left arrives, `None` if it is lost. Chance is a function of the millisecond, not of how
    /// much was sent before: whatever the device does, under one seed it meets the same weather.
    fn arrival(&mut self, way: Way, link: Conditions, left: Duration) -> Option<Duration> {
        let rng = &mut self.lanes[way as usize].rng;
        rng.set_word_pos(left.as_millis() * 16);
        let mut chance = || f64::from(rng.next_u32()) / (f64::from(u32::MAX) + 1.0);
        let (lost, late) = (chance() < link.loss, -(1.0 - chance()).ln());
        (!lost).then(|| left + link.round_trip / 2 + link.jitter.mul_f64(late))
    }
}

impl Conditions {
    fn airtime(&self, way: Way, bytes: usize) -> Duration {
        let rate = match way {
            Way::Up => self.up,
            Way::Down => self.down,
        };
        rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(8.0 * bytes as f64 / rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn medium(timeline: Timeline) -> Medium {
        Medium::new(timeline, 1)
    }

    const LINK: Conditions = Conditions {
        round_trip: Duration::from_millis(40),
        jitter: Duration::ZERO,
        up: Some(1e6),
        down: None,
        loss: 0.0,
        only: None,
    };

    #[test]
    fn half_a_round_trip_and_the_time_that_the_bits_take() {
        let mut medium = medium(vec![(ms(0), Some(LINK))]);
        assert_eq!(medium.deliver(Way::Down, ms(5), 100_000), Some(ms(25)));
        // 125 000 bytes are 1 000 000 bits.
        assert_eq!(medium.deliver(Way::Up, ms(5), 125_000), Some(ms(1025)));
        // The next waits for them, whoever sends it.
        assert_eq!(medium.deliver(Way::Up, ms(5), 125), Some(ms(1026)));
    }

    #[test]
    fn the_rate_changes_while_bytes_are_on_the_way() {
        let fast = Conditions { up: Some(1e9), ..LINK };
        let mut medium = medium(vec![(ms(0), Some(LINK)), (ms(100), Some(fast))]);
        let arrived = medium.deliver(Way::Up, ms(0), 125_000).expect("it arrives");
        assert!(arrived > ms(120) && arrived < ms(140), "{arrived:?}");
    }

    #[test]
    fn what_is_sent_into_a_cut_arrives_with_a_retry_after_it() {
        let timeline = vec![(ms(0), Some(LINK)), (ms(100), None), (ms(1000), Some(LINK))];
        let mut medium = medium(timeline);
        // Tries at 110, 120, 320, 720 and 1520 ms.
        assert_eq!(medium.deliver(Way::Down, ms(110), 0), Some(ms(1540)));
        // Under way when the cut came.
        let late = medium.deliver(Way::Down, ms(90), 0).expect("it arrives");
        assert!(late > ms(1000), "{late:?}");
        // A cut packet holds nobody up.
        assert_eq!(medium.deliver(Way::Down, ms(1001), 0), Some(ms(1021)));
    }

    #[test]
    fn the_slowest_link_that_a_scenario_may_have_delivers() {
        let day = Duration::from_secs(86_400);
        let slow = Conditions { round_trip: day, jitter: day, up: Some(1.0), ..LINK };
        let mut slowest = medium(vec![(ms(0), Some(slow))]);
        for _ in 0..3 {
            let arrived = slowest.deliver(Way::Up, day, 1 << 20);
            assert!(arrived.is_some_and(|at| at > 2 * day), "{arrived:?}");
        }
        let mut lossy = medium(vec![(ms(0), Some(Conditions { loss: 1.0, ..slow }))]);
        assert_eq!(lossy.deliver(Way::Up, day, 1 << 20), None);
    }

    #[test]
    fn a_link_may_be_cut_one_way() {
        let only = Some(Way::Up);
        let mut medium = medium(vec![(ms(0), Some(Conditions { only, ..LINK }))]);
        assert_eq!(medium.deliver(Way::Up, ms(1), 0), Some(ms(21)));
        assert_eq!(medium.deliver(Way::Down, ms(1), 0), None);
    }

    #[test]
    fn nothing_arrives_over_a_link_that_stays_cut() {
        assert_eq!(medium(vec![(ms(0), None)]).deliver(Way::Up, ms(1), 10), None);
        assert_eq!(medium(Vec::new()).deliver(Way::Up, ms(1), 10), None);
    }

    #[test]
    fn loss_and_jitter_have_their_rates_and_depend_on_the_time_only() {
        let link = Conditions { loss: 0.1, jitter: ms(5), up: None, ..LINK };
        let mut one = medium(vec![(ms(0), Some(link))]);
        let mut other = medium(vec![(ms(0), Some(link))]);
        let (mut again, mut extra) = (0, 0.0);
        for at in 0..20_000 {
            let arrived = one.deliver(Way::Up, ms(at), 0).expect("it arrives");
            let late = (arrived - ms(at) - ms(20)).as_secs_f64();
            // Sent again after two round trips at the earliest.
            if late >= 0.08 {
                again += 1;
            } else {
                extra += late;
            }
            if at % 1000 == 0 {
                assert_eq!(other.deliver(Way::Up, ms(at), 0), Some(arrived));
            }
        }
        let (loss, mean) = (f64::from(again) / 20_000.0, extra / f64::from(20_000 - again));
        assert!((0.09..0.11).contains(&loss), "{loss}");
        assert!((0.0047..0.0053).contains(&mean), "{mean}");
    }
}
