//! How long experts are waited for.

use std::time::Duration;

/// Before anything was measured: 1 GB/s, a phone's or a laptop's flash.
const GUESS: f64 = 1e-9;

/// The weight of the newest read.
const NEWEST: f64 = 0.2;

/// A moving average of how long a byte is waited for. Time is averaged, not speed, so that a few reads
/// served by the page cache do not hide how slow the others were.
#[derive(Debug, Default)]
pub(super) struct ReadRate {
    seconds_per_byte: Option<f64>,
}

impl ReadRate {
    pub(super) fn record(&mut self, bytes: u64, took: Duration) {
        if bytes == 0 {
            return;
        }
        let sample = took.as_secs_f64() / bytes as f64;
        let average = self.seconds_per_byte.map_or(sample, |old| old + NEWEST * (sample - old));
        self.seconds_per_byte = Some(average);
    }

    pub(super) fn estimate(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64(self.seconds_per_byte.unwrap_or(GUESS) * bytes as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_first_then_follows_what_was_measured() {
        let mut rate = ReadRate::default();
        assert_eq!(rate.estimate(1_000_000), Duration::from_millis(1));
        rate.record(0, Duration::from_secs(1));
        assert_eq!(rate.estimate(1_000_000), Duration::from_millis(1), "nothing read says nothing");
        rate.record(1_000_000, Duration::from_millis(10));
        assert_eq!(rate.estimate(2_000_000), Duration::from_millis(20));
        rate.record(1_000_000, Duration::ZERO);
        assert_eq!(rate.estimate(1_000_000), Duration::from_millis(8));
    }
}
