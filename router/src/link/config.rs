//! A link's settings.

use std::time::Duration;

use crate::link::Failure;
use crate::{Error, Result};

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
    /// Refuses settings with which a link would never go up, or hammer its server.
    pub fn check(&self) -> Result<()> {
        let refuse =
            |field, found: String, expected: String| Err(Error::Link { field, found, expected });
        if self.timeouts_to_down == 0 {
            return refuse("timeouts_to_down", "0".to_owned(), "at least 1".to_owned());
        }
        let ms = Duration::from_millis(1);
        for (field, found, least) in [
            ("first_backoff", self.first_backoff, ms),
            ("probe_deadline", self.probe_deadline, ms),
            ("probe_spacing", self.probe_spacing, ms),
            ("min_deadline", self.min_deadline, ms),
            ("longest_backoff", self.longest_backoff, self.first_backoff),
            ("longest_proof", self.longest_proof, self.first_proof),
            ("max_deadline", self.max_deadline, self.min_deadline),
        ] {
            if found < least {
                return refuse(field, format!("{found:?}"), format!("at least {least:?}"));
            }
        }
        Ok(())
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn check_names_the_field() {
        let good = LinkConfig::default();
        assert_eq!(good.check(), Ok(()));
        let bad = [
            ("timeouts_to_down", LinkConfig { timeouts_to_down: 0, ..good.clone() }),
            ("first_backoff", LinkConfig { first_backoff: Duration::ZERO, ..good.clone() }),
            ("probe_spacing", LinkConfig { probe_spacing: Duration::ZERO, ..good.clone() }),
            ("probe_deadline", LinkConfig { probe_deadline: Duration::ZERO, ..good.clone() }),
            ("min_deadline", LinkConfig { min_deadline: Duration::ZERO, ..good.clone() }),
            ("longest_backoff", LinkConfig { longest_backoff: MS, ..good.clone() }),
            ("longest_proof", LinkConfig { longest_proof: MS, ..good.clone() }),
            ("max_deadline", LinkConfig { max_deadline: MS, ..good.clone() }),
        ];
        for (field, config) in bad {
            let error = config.check().expect_err(field).to_string();
            assert!(error.starts_with(&format!("link: {field} is ")), "{error}");
        }
    }
}
