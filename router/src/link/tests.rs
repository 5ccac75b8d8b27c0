//! What holds after any history of events; by example in `probing` and `estimates`.

use proptest::prelude::*;

use super::*;

mod estimates;
mod probing;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
/// 70 outages fit into a minute, and as many times up.
const MOST_CHANGES: usize = 140;

const LEAST: Duration = Duration::from_millis(100);
const MOST: Duration = Duration::from_secs(2);

fn link(seed: u64) -> Link {
    Link::new(LEAST..=MOST, seed)
}

/// A link that is up, at one second.
fn up() -> (Link, Duration) {
    let mut link = link(1);
    link.on_probe(SECOND, Ok(10 * MS));
    assert_eq!(link.state(SECOND), State::Up);
    (link, SECOND)
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Success { rtt: Duration, rows: usize },
    Failure(Failure),
    Probe(Result<Duration, Failure>),
}

fn failures() -> impl Strategy<Value = Failure> {
    prop_oneof![
        4 => Just(Failure::Timeout),
        8 => Just(Failure::Transport),
        2 => any::<Duration>().prop_map(|retry_after| Failure::Overloaded { retry_after }),
        1 => Just(Failure::BadAnswer),
        1 => Just(Failure::WrongModel),
    ]
}

fn events() -> impl Strategy<Value = Event> {
    let rtt = || prop_oneof![9 => (0..500_u32).prop_map(|ms| ms * MS), 1 => any::<Duration>()];
    prop_oneof![
        2 => (rtt(), any::<usize>()).prop_map(|(rtt, rows)| Event::Success { rtt, rows }),
        1 => failures().prop_map(Event::Failure),
        8 => rtt().prop_map(|rtt| Event::Probe(Ok(rtt))),
        1 => failures().prop_map(|failure| Event::Probe(Err(failure))),
    ]
}

/// Events with the milliseconds before each.
fn histories() -> impl Strategy<Value = Vec<(u64, Event)>> {
    prop::collection::vec((prop_oneof![20 => 0..1_500_u64, 1 => 0..90_000_u64], events()), 0..400)
}

fn apply(link: &mut Link, now: Duration, event: Event) {
    match event {
        Event::Success { rtt, rows } => link.on_success(now, rtt, rows),
        Event::Failure(failure) => link.on_failure(now, failure),
        Event::Probe(answer) => link.on_probe(now, answer),
    }
}

/// Probes whenever that is due, each answered after `rtt`, until the link is up.
fn probe_until_up(link: &mut Link, mut now: Duration, rtt: Duration) -> Duration {
    while let Some(due) = link.next_probe(now) {
        now = due + rtt;
        link.on_probe(now, Ok(rtt));
    }
    now
}

proptest! {
    /// Two outages are the first wait and the proof apart: 0.2, 0.3, 0.5 s and from then on 0.9 s.
    #[test]
    fn mode_changes_a_minute_are_bounded(history in histories(), seed in any::<u64>()) {
        let mut link = link(seed);
        let (mut now, mut was_up) = (Duration::ZERO, false);
        let mut changes = Vec::new();
        for (wait, event) in history {
            now += Duration::from_millis(wait);
            apply(&mut link, now, event);
            let is_up = link.state(now) == State::Up;
            if is_up != was_up {
                changes.push(now);
            }
            was_up = is_up;
        }
        for (i, start) in changes.iter().enumerate() {
            let within = changes[i..].iter().take_while(|&&t| t < *start + MINUTE).count();
            prop_assert!(within <= MOST_CHANGES, "{within} changes from {start:?}");
        }
    }

    /// Whatever happened: work goes out only while up, and while not up a probe comes in time.
    #[test]
    fn never_sends_while_not_up_and_always_probes(history in histories(), seed in any::<u64>()) {
        let mut link = link(seed);
        let mut now = Duration::ZERO;
        for (wait, event) in history {
            now += Duration::from_millis(wait);
            apply(&mut link, now, event);
            match link.state(now) {
                State::Up => prop_assert_eq!(link.next_probe(now), None),
                state => {
                    prop_assert!(!link.may_send(now));
                    let due = link.next_probe(now);
                    prop_assert!(due.is_some_and(|due| now <= due && due <= now + QUARANTINE));
                    if let State::Down { until } = state {
                        prop_assert_eq!(due, Some(until));
                    }
                }
            }
        }
    }

    #[test]
    fn recovers_with_good_probes_from_anything(history in histories(), seed in any::<u64>()) {
        let mut link = link(seed);
        let mut now = Duration::ZERO;
        for (wait, event) in history {
            now += Duration::from_millis(wait);
            apply(&mut link, now, event);
        }
        let back = probe_until_up(&mut link, now, 20 * MS);
        prop_assert!(back <= now + QUARANTINE + 2 * SECOND);
        // An overloaded server may still have to be spared.
        prop_assert!(link.may_send(back + 2 * LONGEST_PAUSE));
    }

    /// The same events at the same times, the same decisions.
    #[test]
    fn deterministic(history in histories(), seed in any::<u64>()) {
        let (mut one, mut two) = (link(seed), link(seed));
        let mut now = Duration::ZERO;
        for (wait, event) in history {
            now += Duration::from_millis(wait);
            apply(&mut one, now, event);
            apply(&mut two, now, event);
            prop_assert_eq!(one.next_probe(now), two.next_probe(now));
            prop_assert_eq!(one.deadline(now, 3), two.deadline(now, 3));
        }
    }

    /// A clock that jumps anywhere is a caller's mistake: it stands still, and nothing panics.
    #[test]
    fn any_time_will_do(
        history in prop::collection::vec((any::<Duration>(), events()), 0..60),
        rows in any::<usize>(),
    ) {
        let mut link = link(7);
        let mut latest = Duration::ZERO;
        for (now, event) in history {
            latest = latest.max(now);
            apply(&mut link, now, event);
            prop_assert_eq!(link.state(Duration::ZERO), link.state(latest));
            prop_assert_eq!(link.may_send(Duration::ZERO), link.may_send(latest));
            prop_assert_eq!(link.next_probe(Duration::ZERO), link.next_probe(latest));
            prop_assert_eq!(link.deadline(now.min(latest), rows), link.deadline(latest, rows));
        }
    }

    /// Outages of any length, black holes or refusals, one after another or far apart: work is
    /// possible 2 s after the end of each, if none begins before.
    #[test]
    fn back_within_two_seconds_of_a_fault(
        outages in prop::collection::vec((0..5_000_u64, 1..4_000_u64, any::<bool>()), 1..40),
        last in 0..300_000_u64,
        trip in (1..100_u32).prop_map(|ms| ms * MS),
        seed in any::<u64>(),
    ) {
        let mut link = link(seed);
        let mut now = probe_until_up(&mut link, SECOND, trip);
        let mut fault = now;
        for (length, gap, black_hole) in outages.into_iter().chain([(last, 10_000, true)]) {
            let end = fault + Duration::from_millis(length);
            let next = end + Duration::from_millis(gap);
            let (failure, takes) = match black_hole {
                true => (Failure::Timeout, Link::PROBE_DEADLINE),
                false => (Failure::Transport, MS),
            };
            while link.state(now) == State::Up {
                link.on_failure(now, failure);
            }
            while let Some(sent) = link.next_probe(now).filter(|sent| *sent < next) {
                // A probe that leaves before the end of the fault is lost.
                let answer = if sent < end { Err(failure) } else { Ok(trip) };
                now = sent + if answer.is_ok() { trip } else { takes };
                link.on_probe(now, answer);
            }
            let since = now.saturating_sub(end);
            prop_assert!(link.may_send(now) || next <= end + 2 * SECOND, "not up before {next:?}");
            prop_assert!(!link.may_send(now) || since <= 2 * SECOND, "back {since:?} late");
            (fault, now) = (next, next.max(now));
        }
        prop_assert!(link.may_send(now));
    }

    /// The deadline is within its bounds and grows with the rows.
    #[test]
    fn deadlines_are_bounded(history in histories(), rows in 0..10_000_usize) {
        let mut link = link(3);
        let mut now = Duration::ZERO;
        for (wait, event) in history {
            now += Duration::from_millis(wait);
            apply(&mut link, now, event);
            let bare = link.deadline(now, 0);
            prop_assert!(LEAST <= bare && bare <= MOST);
            prop_assert!(bare <= link.deadline(now, rows));
        }
    }
}
