//! What a link knows of its trip, and the deadlines that follow.

use super::*;
use crate::link::estimate::FIRST_TRIP;

/// RFC 6298's arithmetic by hand: 80 ms, then 160 ms, from a first 80 ms.
#[test]
fn the_round_trip_is_smoothed() {
    let mut link = link(0);
    assert_eq!(link.trip(SECOND), FIRST_TRIP);
    assert_eq!(link.deadline(SECOND, 0), MOST);
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
    assert_eq!(link.trip(later), FIRST_TRIP);
    assert_eq!(link.deadline(later, 0), MOST);
    // The next is not smoothed into the old: the device may be on another network.
    link.on_success(later, 200 * MS, 1);
    assert_eq!(link.trip(later), 200 * MS);
    // The same after an outage, however short.
    link.on_failure(later, Failure::Transport);
    let probed = link.next_probe(later).expect("not up");
    link.on_probe(probed, Ok(30 * MS));
    assert_eq!(link.trip(probed), 30 * MS);
}
