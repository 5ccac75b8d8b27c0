//! What a request to a server takes: round trip, variation, and each row's part.

use std::ops::RangeInclusive;
use std::time::Duration;

/// Longer samples are cut: nothing that is waited for takes longer.
const LONGEST: Duration = Duration::from_secs(3600);

/// Requests with more rows tell of the rows' part; with fewer, of the round trip.
const FEW_ROWS: usize = 16;

/// A deadline allows for rows that take this many times the mean.
const ROW_MARGIN: u32 = 2;

/// The round trip that is assumed before any was seen.
pub(super) const FIRST_TRIP: Duration = Duration::from_millis(50);

/// What a row of an expert is assumed to add before any was seen.
const FIRST_PER_ROW: Duration = Duration::from_millis(1);

/// Silence after which estimates are dropped: the device slept, or moved.
const STALE_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub(super) struct Estimate {
    trip: Option<Trip>,
    per_row: Option<Duration>,
    /// When the last sample came.
    heard: Duration,
    /// Deadlines missed since the last answer: each doubles the next (RFC 6298, 5.5).
    doublings: u32,
    /// The bounds of a deadline, without the rows' part.
    deadlines: RangeInclusive<Duration>,
}

/// RFC 6298's smoothed round trip and its variation.
#[derive(Debug, Clone, Copy)]
struct Trip {
    srtt: Duration,
    rttvar: Duration,
}

impl Estimate {
    pub(super) fn new(deadlines: RangeInclusive<Duration>) -> Self {
        Estimate { trip: None, per_row: None, heard: Duration::ZERO, doublings: 0, deadlines }
    }

    pub(super) fn trip(&self, now: Duration) -> Duration {
        self.fresh(now).0.map_or(FIRST_TRIP, |trip| trip.srtt)
    }

    pub(super) fn per_row(&self, now: Duration) -> Duration {
        self.fresh(now).1.unwrap_or(FIRST_PER_ROW)
    }

    pub(super) fn deadline(&self, now: Duration, rows: usize) -> Duration {
        let (least, most) = (*self.deadlines.start(), *self.deadlines.end());
        let patience = 1 << self.doublings;
        // RFC 6298, 2.3: RTO = SRTT + 4 RTTVAR.
        let trip = self.fresh(now).0.map_or(most, |trip| trip.srtt + 4 * trip.rttvar);
        let trip = trip.saturating_mul(patience).max(least).min(most);
        let rows = u32::try_from(rows).unwrap_or(u32::MAX);
        let work = self.per_row(now).saturating_mul(rows).saturating_mul(ROW_MARGIN * patience);
        trip.saturating_add(work)
    }

    /// A request for `rows` rows was answered.
    ///
    /// One number cannot be split in two, so small requests say what the trip takes and large ones
    /// what a row adds to it.
    pub(super) fn on_answer(&mut self, now: Duration, rtt: Duration, rows: usize) {
        self.doublings = 0;
        let rtt = rtt.min(LONGEST);
        self.drop_stale(now);
        match self.trip {
            Some(trip) if rows > FEW_ROWS => {
                let rows = u32::try_from(rows).unwrap_or(u32::MAX);
                let sample = rtt.saturating_sub(trip.srtt) / rows;
                self.per_row = Some(self.per_row.map_or(sample, |mean| (7 * mean + sample) / 8));
            }
            _ => {
                let rows = rows.min(FEW_ROWS) as u32;
                self.on_trip(rtt.saturating_sub(self.per_row.unwrap_or_default() * rows));
            }
        }
    }

    /// A probe was answered. It carries no rows, so it does not end the patience with those that
    /// do: if only work times out, the doubled deadlines are what ends the flapping.
    pub(super) fn on_probe(&mut self, now: Duration, rtt: Duration) {
        self.drop_stale(now);
        self.on_trip(rtt.min(LONGEST));
    }

    pub(super) fn on_timeout(&mut self) {
        self.doublings = (self.doublings + 1).min(4);
    }

    pub(super) fn forget(&mut self) {
        (self.trip, self.per_row) = (None, None);
    }

    /// RFC 6298, 2.2 and 2.3, with alpha 1/8 and beta 1/4.
    fn on_trip(&mut self, sample: Duration) {
        self.trip = Some(match self.trip {
            None => Trip { srtt: sample, rttvar: sample / 2 },
            Some(Trip { srtt, rttvar }) => Trip {
                rttvar: (3 * rttvar + srtt.abs_diff(sample)) / 4,
                srtt: (7 * srtt + sample) / 8,
            },
        });
    }

    fn drop_stale(&mut self, now: Duration) {
        (self.trip, self.per_row) = self.fresh(now);
        self.heard = now;
    }

    fn fresh(&self, now: Duration) -> (Option<Trip>, Option<Duration>) {
        let stale = now.saturating_sub(self.heard) > STALE_AFTER;
        if stale { (None, None) } else { (self.trip, self.per_row) }
    }
}
