//! A link's settings.

use std::time::Duration;

use crate::link::Failure;

/// A link's settings. The defaults bring a server back within 2 s of the end of a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkConfig {
    /// Deadlines missed in a row that take the link down.
    pub timeouts_to_down: u32,
    /// Wait before the first probe; every failed probe doubles it.
    pub first_backoff: Duration,
    /// The longest wait from one failed probe to the next. Probes are cheap and this bounds the time
    /// to recover, so it is short.
    pub longest_backoff: Duration,
    /// How long a probe may take: long enough to connect anew (three round trips with TLS), and
    /// no longer, for one that was sent just before a fault ended delays the recovery.
    pub probe_deadline: Duration,
    /// From one good probe to the next.
    pub probe_spacing: Duration,
    /// For how long probes must go well until the link is up again, after one outage in a minute;
    /// every other outage doubles it, ...
    pub first_proof: Duration,
    /// ... up to this.
    pub longest_proof: Duration,
    /// How long a server that gave a bad answer is left alone.
    pub quarantine: Duration,
    /// The longest that an overloaded server's hint is followed.
    pub longest_pause: Duration,
    /// Silence after which estimates are dropped: the device slept, or moved.
    pub stale_after: Duration,
    /// The round trip that is assumed before any was seen.
    pub first_trip: Duration,
    /// What a row of an expert is assumed to add before any was seen.
    pub first_per_row: Duration,
    /// The least deadline, without the rows' part: below it, scheduling noise looks like a fault.
    pub min_deadline: Duration,
    /// The greatest deadline, without the rows' part; in force while no trip was seen.
    pub max_deadline: Duration,
}

impl Default for LinkConfig {
    fn default() -> Self {
        let ms = Duration::from_millis;
        LinkConfig {
            timeouts_to_down: 2,
            first_backoff: ms(200),
            longest_backoff: ms(1000),
            probe_deadline: ms(750),
            probe_spacing: ms(100),
            first_proof: ms(100),
            longest_proof: ms(800),
            quarantine: ms(60_000),
            longest_pause: ms(5_000),
            stale_after: ms(60_000),
            first_trip: ms(50),
            first_per_row: ms(1),
            min_deadline: ms(100),
            max_deadline: ms(2_000),
        }
    }
}

impl LinkConfig {
    /// The wait after `failed` failed probes, before jitter.
    pub(super) fn backoff(&self, failed: u32) -> Duration {
        self.first_backoff.saturating_mul(1 << failed.min(20)).min(self.longest_backoff)
    }

    /// How long this failure, whatever came before, keeps a server from being probed.
    pub(super) fn penalty(&self, failure: Failure) -> Duration {
        match failure {
            Failure::BadAnswer => self.quarantine,
            _ => Duration::ZERO,
        }
    }
}
