//! How a link goes down and comes back.

use super::*;

#[test]
fn a_new_link_goes_up_with_its_first_good_probe() {
    let mut link = link(0);
    assert!(!link.may_send(SECOND));
    assert_eq!(link.state(SECOND), State::Probing);
    assert_eq!(link.next_probe(SECOND), Some(SECOND));
    link.on_probe(SECOND, Ok(MS));
    assert!(link.may_send(SECOND));
}

#[test]
fn a_broken_connection_counts_at_once_and_a_late_answer_twice() {
    let (mut link, now) = up();
    link.on_failure(now, Failure::Transport);
    assert!(!link.may_send(now));
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
    link.on_failure(now, Failure::Transport);
    for doubled in [200, 200, 400, 800, 1000, 1000, 1000] {
        let due = link.next_probe(now).expect("not up");
        let wait = due - now;
        assert!(doubled * MS / 2 <= wait && wait <= doubled * MS, "{wait:?} of {doubled}");
        assert_eq!(link.state(now), State::Down { until: due });
        assert_eq!(link.state(due), State::Probing);
        now = due;
        link.on_probe(now, Err(Failure::Transport));
    }
    let waits = |seed| {
        let mut link = self::link(seed);
        link.on_probe(Duration::ZERO, Err(Failure::Transport));
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
    let mut outages = 0;
    while now < end {
        match link.next_probe(now) {
            Some(due) if due >= end => break,
            Some(due) if bad(due) => {
                now = due + MS;
                link.on_probe(now, Err(Failure::Transport));
            }
            Some(due) => {
                now = due + MS;
                link.on_probe(now, Ok(MS));
            }
            None => {
                now += MS;
                if bad(now) {
                    link.on_failure(now, Failure::Transport);
                    outages += 1;
                }
            }
        }
    }
    assert!(outages < 6, "{outages} outages");
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
    assert_eq!(link.state(now + MS), State::Up);
    link.on_failure(now + SECOND, Failure::Overloaded { retry_after: Duration::MAX });
    assert!(link.may_send(now + SECOND + 2 * LONGEST_PAUSE), "hints have a limit");
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
        assert!(due <= now + LONGEST_BACKOFF);
        now = due;
        link.on_probe(now, Err(Failure::WrongModel));
    }
    assert!(probe_until_up(&mut link, now, MS) < now + 2 * SECOND);
}
