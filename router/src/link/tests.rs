use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
/// 70 outages fit into a minute, and as many times up.
const MOST_CHANGES: usize = 140;

fn link(seed: u64) -> Link {
    Link::new(LinkConfig::default(), seed)
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
        4 => Just(Failure::Transport),
        4 => Just(Failure::Refused),
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
        prop_assert_eq!(link.changes(), changes.len() as u64);
        for (i, start) in changes.iter().enumerate() {
            let within = changes[i..].iter().take_while(|&&t| t < *start + MINUTE).count();
            prop_assert!(within <= MOST_CHANGES, "{within} changes from {start:?}");
        }
    }

    /// Whatever happened: work goes out only while up, and while not up a probe comes in time.
    #[test]
    fn never_sends_while_not_up_and_always_probes(history in histories(), seed in any::<u64>()) {
        let mut link = link(seed);
        let longest = link.config.quarantine;
        let mut now = Duration::ZERO;
        for (wait, event) in history {
            now += Duration::from_millis(wait);
            apply(&mut link, now, event);
            match link.state(now) {
                State::Up => prop_assert_eq!(link.next_probe(now), None),
                state => {
                    prop_assert!(!link.may_send(now));
                    let due = link.next_probe(now);
                    prop_assert!(due.is_some_and(|due| now <= due && due <= now + longest));
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
        prop_assert!(back <= now + link.config.quarantine + 2 * SECOND);
        // An overloaded server may still have to be spared.
        prop_assert!(link.may_send(back + 2 * link.config.longest_pause));
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
                true => (Failure::Timeout, link.probe_deadline()),
                false => (Failure::Refused, MS),
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
            prop_assert!(link.config.min_deadline <= bare && bare <= link.config.max_deadline);
            prop_assert!(bare <= link.deadline(now, rows));
        }
    }
}

#[test]
fn a_new_link_goes_up_with_its_first_good_probe() {
    let mut link = link(0);
    assert!(!link.may_send(SECOND));
    assert_eq!(link.state(SECOND), State::Probing);
    assert_eq!(link.next_probe(SECOND), Some(SECOND));
    link.on_probe(SECOND, Ok(MS));
    assert!(link.may_send(SECOND));
    assert_eq!(link.changes(), 1);
}

#[test]
fn a_broken_connection_counts_at_once_and_a_late_answer_twice() {
    for failure in [Failure::Transport, Failure::Refused] {
        let (mut link, now) = up();
        link.on_failure(now, failure);
        assert!(!link.may_send(now));
    }
    let (mut link, now) = up();
    link.on_failure(now, Failure::Timeout);
    assert!(link.may_send(now));
    link.on_success(now, 10 * MS, 1);
    link.on_failure(now, Failure::Timeout);
    assert!(link.may_send(now), "an answer in between starts the count again");
    link.on_failure(now, Failure::Timeout);
    assert!(!link.may_send(now));
}

#[test]
fn failed_probes_back_off_with_jitter_up_to_the_longest() {
    let (mut link, mut now) = up();
    link.on_failure(now, Failure::Refused);
    for doubled in [200, 200, 400, 800, 1000, 1000, 1000] {
        let due = link.next_probe(now).expect("not up");
        let wait = due - now;
        assert!(doubled * MS / 2 <= wait && wait <= doubled * MS, "{wait:?} of {doubled}");
        assert_eq!(link.state(now), State::Down { until: due });
        assert_eq!(link.state(due), State::Probing);
        now = due;
        link.on_probe(now, Err(Failure::Refused));
    }
    let waits = |seed| {
        let mut link = self::link(seed);
        link.on_probe(Duration::ZERO, Err(Failure::Refused));
        link.next_probe(Duration::ZERO)
    };
    assert!((0..20).any(|seed| waits(seed) != waits(seed + 1)), "seeds keep clients out of step");
}

#[test]
fn coming_back_takes_good_probes_in_a_row() {
    let (mut link, now) = up();
    link.on_failure(now, Failure::Transport);
    let first = link.next_probe(now).expect("not up");
    link.on_probe(first, Ok(MS));
    assert_eq!(link.state(first), State::Probing);
    link.on_probe(first, Ok(MS));
    assert_eq!(link.state(first), State::Probing, "a second answer in the same turn");
    let second = link.next_probe(first).expect("not up");
    link.on_probe(second, Err(Failure::Timeout));
    let third = link.next_probe(second).expect("not up");
    link.on_probe(third, Ok(MS));
    assert_eq!(link.state(third), State::Probing, "the row was broken");
    let fourth = link.next_probe(third).expect("not up");
    link.on_probe(fourth, Ok(MS));
    assert_eq!(link.state(fourth), State::Up);
}

/// Answers to what was asked before the link went down do not bring it up.
#[test]
fn an_early_answer_is_no_probe() {
    let (mut link, now) = up();
    link.on_failure(now, Failure::Transport);
    let down = link.state(now);
    link.on_success(now + MS, MS, 1);
    link.on_probe(now + MS, Ok(MS));
    assert_eq!(link.state(now + MS), down);
}

/// Each time down within a minute doubles what the link must show, so a link that is good for
/// less than that stays down; after a quiet minute little is asked for again.
#[test]
fn flapping_makes_it_harder() {
    let (mut link, mut now) = up();
    let mut proofs = Vec::new();
    for _ in 0..6 {
        link.on_failure(now, Failure::Transport);
        let first = link.next_probe(now).expect("not up");
        now = probe_until_up(&mut link, now, MS);
        proofs.push((now - MS - first).as_millis());
    }
    assert_eq!(proofs, [100, 200, 400, 800, 800, 800]);
    now += MINUTE;
    link.on_failure(now, Failure::Transport);
    let back = probe_until_up(&mut link, now, MS);
    assert!(back - now < SECOND / 2);
}

/// Half a second of good probes between the outages is not enough, once there were some.
#[test]
fn a_link_that_flaps_fast_stays_down_and_is_back_within_two_seconds() {
    let (mut link, start) = up();
    let bad = |at: Duration| (at - start).as_millis() % 1000 < 500;
    let (mut now, end) = (start, start + 50 * SECOND + 500 * MS);
    while now < end {
        match link.next_probe(now) {
            Some(due) if due >= end => break,
            Some(due) if bad(due) => {
                now = due + MS;
                link.on_probe(now, Err(Failure::Refused));
            }
            Some(due) => {
                now = due + MS;
                link.on_probe(now, Ok(MS));
            }
            None => {
                now += MS;
                if bad(now) {
                    link.on_failure(now, Failure::Transport);
                }
            }
        }
    }
    assert!(link.changes() < 12, "{} changes", link.changes());
    let back = probe_until_up(&mut link, now, MS);
    assert!(back <= end + 2 * SECOND, "{back:?} after {end:?}");
}

#[test]
fn an_overloaded_server_is_spared_and_not_broken() {
    let (mut link, now) = up();
    link.on_failure(now, Failure::Overloaded { retry_after: 300 * MS });
    assert_eq!(link.state(now), State::Up);
    assert!(!link.may_send(now + 299 * MS));
    assert!(link.may_send(now + 451 * MS));
    link.on_failure(now + MS, Failure::Overloaded { retry_after: MS });
    assert!(!link.may_send(now + 299 * MS), "a shorter hint does not shorten a longer one");
    assert_eq!(link.changes(), 1);
    link.on_failure(now + SECOND, Failure::Overloaded { retry_after: Duration::MAX });
    assert!(link.may_send(now + SECOND + 2 * link.config.longest_pause), "hints have a limit");
}

#[test]
fn a_bad_answer_is_not_forgiven_soon() {
    let (mut link, now) = up();
    link.on_failure(now, Failure::BadAnswer);
    let until = link.next_probe(now).expect("not up");
    assert_eq!(until, now + 60 * SECOND);
    link.on_probe(until - MS, Ok(MS));
    assert_eq!(link.state(until - MS), State::Down { until });
    // Found out by a request that was still under way: the same.
    let (mut link, now) = up();
    link.on_failure(now, Failure::Transport);
    let probed = link.next_probe(now).expect("not up");
    link.on_probe(probed, Ok(MS));
    link.on_failure(probed, Failure::BadAnswer);
    let until = probed + 60 * SECOND;
    assert_eq!(link.state(probed), State::Down { until }, "the good probe is forgotten");
}

#[test]
fn another_model_is_probed_until_it_is_the_right_one() {
    let (mut link, mut now) = up();
    link.on_failure(now, Failure::WrongModel);
    for _ in 0..20 {
        let due = link.next_probe(now).expect("not up");
        assert!(due <= now + link.config.longest_backoff);
        now = due;
        link.on_probe(now, Err(Failure::WrongModel));
    }
    assert!(probe_until_up(&mut link, now, MS) < now + 2 * SECOND);
}

/// RFC 6298's arithmetic by hand: 80 ms, then 160 ms, from a first 80 ms.
#[test]
fn the_round_trip_is_smoothed() {
    let mut link = link(0);
    assert_eq!(link.trip(SECOND), link.config.first_trip);
    assert_eq!(link.deadline(SECOND, 0), link.config.max_deadline);
    link.on_probe(SECOND, Ok(80 * MS));
    assert_eq!((link.trip(SECOND), link.deadline(SECOND, 0)), (80 * MS, 240 * MS));
    link.on_success(SECOND, 80 * MS, 1);
    assert_eq!(link.deadline(SECOND, 0), (80 + 4 * 30) * MS);
    link.on_success(SECOND, 160 * MS, 1);
    // rttvar = 3/4 x 30 + 1/4 x 80 = 42.5, srtt = 7/8 x 80 + 1/8 x 160 = 90.
    assert_eq!((link.trip(SECOND), link.deadline(SECOND, 0)), (90 * MS, 260 * MS));
}

/// A server with a trip of 20 ms that takes 100 us a row: both are found, from mixed requests.
#[test]
fn trip_and_rows_are_told_apart() {
    let (mut link, now) = up();
    for _ in 0..100 {
        for rows in [1, 4, 64, 512] {
            let rtt = 20 * MS + Duration::from_micros(100) * rows;
            link.on_success(now, rtt, rows as usize);
        }
    }
    let near = |got: Duration, want: Duration| {
        assert!(got.abs_diff(want) < want / 20, "{got:?} {want:?}");
    };
    near(link.trip(now), 20 * MS);
    near(link.per_row(now), Duration::from_micros(100));
    let batch = link.deadline(now, 4096);
    assert!(batch > 430 * MS && batch < 2 * SECOND, "{batch:?}");
}

#[test]
fn deadlines_that_pass_grow_until_an_answer_comes() {
    let (mut link, now) = (link(0), SECOND);
    link.on_probe(now, Ok(100 * MS));
    let before = link.deadline(now, 0);
    link.on_failure(now, Failure::Timeout);
    assert_eq!(link.deadline(now, 0), 2 * before);
    link.on_success(now, 100 * MS, 1);
    assert!(link.deadline(now, 0) <= before);
}

#[test]
fn what_was_known_before_a_long_silence_is_forgotten() {
    let (mut link, now) = up();
    assert_eq!(link.trip(now + 60 * SECOND), 10 * MS);
    let later = now + 61 * SECOND;
    assert_eq!(link.trip(later), link.config.first_trip);
    assert_eq!(link.deadline(later, 0), link.config.max_deadline);
    // The next is not smoothed into the old: the device may be on another network.
    link.on_success(later, 200 * MS, 1);
    assert_eq!(link.trip(later), 200 * MS);
    // The same after an outage, however short.
    link.on_failure(later, Failure::Transport);
    let probed = link.next_probe(later).expect("not up");
    link.on_probe(probed, Ok(30 * MS));
    assert_eq!(link.trip(probed), 30 * MS);
}
