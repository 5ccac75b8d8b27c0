//! The link to one server: may it be asked, how long may it take, when to look again.
//!
//! A circuit breaker with probation, after linkerd2-proxy's (`linkerd/app/outbound/src/http/breaker/
//! consecutive_failures.rs`), written sans-IO as quinn-proto writes connections: events and times go
//! in, decisions come out. Times are `Duration`s since any fixed moment of a monotonic clock; one
//! that goes backwards counts as standing still.
//!
//! ```text
//!            failures                     backoff over
//!   Up ------------------> Down{until} ------------------> Probing
//!    ^                       ^   a probe fails                |  |
//!    |                       +--------------------------------+  |
//!    +----- enough good probes in a row, and changes to spare ---+
//! ```
//!
//! The driver's part: while [`Link::next_probe`] gives a time, wait for it, send one `Describe`,
//! within [`Link::probe_deadline`], and hand what came of it to [`Link::on_probe`].

mod config;
mod estimate;

use std::collections::VecDeque;
use std::time::Duration;

pub use config::LinkConfig;
use estimate::Estimate;

/// The window in which mode changes are bounded.
const MINUTE: Duration = Duration::from_secs(60);

/// What a server may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It answers.
    Up,
    /// It may be back: one probe at a time, no work.
    Probing,
    /// Left alone.
    Down {
        /// When the next probe may go out.
        until: Duration,
    },
}

/// How asking a server failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No answer before the deadline.
    Timeout,
    /// Nobody listens there.
    Refused,
    /// The connection broke, or could not be made.
    Transport,
    /// It sheds load.
    Overloaded {
        /// How long it wants to be spared.
        retry_after: Duration,
    },
    /// NaN, a wrong shape, a wrong id: an answer that cannot be used.
    BadAnswer,
    /// It serves another model.
    WrongModel,
}

/// One server's state machine.
#[derive(Debug, Clone)]
pub struct Link {
    config: LinkConfig,
    jitter: Jitter,
    /// The latest time that was heard of.
    clock: Duration,
    mode: Mode,
    /// Times of the mode changes of the last minute, oldest first.
    recent: VecDeque<Duration>,
    changes: u64,
    estimate: Estimate,
}

#[derive(Debug, Clone, Copy)]
enum Mode {
    Up {
        /// Deadlines missed since the last answer.
        timeouts: u32,
        /// An overloaded server is spared until then.
        spared_until: Duration,
    },
    Down {
        /// When the next probe may go out.
        due: Duration,
        /// Probes that failed since the last good one.
        failed: u32,
        /// Good probes in a row.
        good: u32,
    },
}

impl Link {
    /// A link to a server of which nothing is known yet: not up before a first good probe, which
    /// is due at once. `seed` feeds the jitter; give every link another.
    pub fn new(config: LinkConfig, seed: u64) -> Self {
        Link {
            estimate: Estimate::new(&config),
            config,
            jitter: Jitter(seed),
            clock: Duration::ZERO,
            mode: Mode::Down { due: Duration::ZERO, failed: 0, good: 0 },
            recent: VecDeque::new(),
            changes: 0,
        }
    }

    /// What the server may be used for now.
    pub fn state(&self, now: Duration) -> State {
        match self.mode {
            Mode::Up { .. } => State::Up,
            Mode::Down { due, good: 0, .. } if self.latest(now) < due => State::Down { until: due },
            Mode::Down { .. } => State::Probing,
        }
    }

    /// Whether work may be sent now: up, and not overloaded.
    pub fn may_send(&self, now: Duration) -> bool {
        matches!(self.mode, Mode::Up { spared_until, .. } if self.latest(now) >= spared_until)
    }

    /// Times that the link went up or down since it was made.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// The smoothed round trip of a request, without its rows' part.
    pub fn trip(&self, now: Duration) -> Duration {
        self.estimate.trip(self.latest(now))
    }

    /// What each row of each expert adds to a request.
    pub fn per_row(&self, now: Duration) -> Duration {
        self.estimate.per_row(self.latest(now))
    }

    /// How long an answer about `rows` rows, counted once for each expert, may take.
    pub fn deadline(&self, now: Duration, rows: usize) -> Duration {
        self.estimate.deadline(self.latest(now), rows)
    }

    /// How long a probe may take.
    pub fn probe_deadline(&self) -> Duration {
        self.config.probe_deadline
    }

    /// When the next probe is due; none while the link is up.
    pub fn next_probe(&self, now: Duration) -> Option<Duration> {
        match self.mode {
            Mode::Up { .. } => None,
            Mode::Down { due, .. } => Some(due.max(self.latest(now))),
        }
    }

    /// An answer came, `rtt` after the request for `rows` rows, counted once for each expert.
    pub fn on_success(&mut self, now: Duration, rtt: Duration, rows: usize) {
        let now = self.advance(now);
        // An answer to what was asked before the link went down is no probe.
        if let Mode::Up { timeouts, .. } = &mut self.mode {
            *timeouts = 0;
            self.estimate.on_answer(now, rtt, rows);
        }
    }

    /// A request failed.
    pub fn on_failure(&mut self, now: Duration, failure: Failure) {
        let now = self.advance(now);
        match (&mut self.mode, failure) {
            (Mode::Up { timeouts, spared_until }, Failure::Overloaded { retry_after }) => {
                // It answered, so it lives. At most half as long again, so that those it shed do
                // not all come back at once.
                let pause = retry_after.min(self.config.longest_pause);
                let pause = pause.saturating_add(self.jitter.shorten(pause) / 2);
                *timeouts = 0;
                *spared_until = now.saturating_add(pause).max(*spared_until);
            }
            // One late answer may be bad luck; the next costs another full deadline.
            (Mode::Up { timeouts, .. }, Failure::Timeout) => {
                *timeouts += 1;
                self.estimate.on_timeout();
                if *timeouts >= self.config.timeouts_to_down {
                    self.go_down(now, failure);
                }
            }
            // A broken or refused connection is certain: the next request would fail as well.
            (Mode::Up { .. }, _) => self.go_down(now, failure),
            (Mode::Down { due, good, .. }, Failure::BadAnswer | Failure::WrongModel) => {
                *due = now.saturating_add(self.config.penalty(failure)).max(*due);
                *good = 0;
            }
            // What was in flight when the link went down fails too; that is no news.
            (Mode::Down { .. }, _) => {}
        }
    }

    /// A probe came back: the round trip of a `Describe` that matches the model, or what went
    /// wrong. Only a probe that was due counts, so that a good word from before, or a second one
    /// for the same turn, does not.
    pub fn on_probe(&mut self, now: Duration, answer: Result<Duration, Failure>) {
        let now = self.advance(now);
        let Mode::Down { due, failed, good } = self.mode else { return };
        if now < due {
            return;
        }
        self.mode = match answer {
            Ok(rtt) => {
                self.estimate.on_probe(now, rtt);
                let good = good.saturating_add(1);
                let wait = self.jitter.shorten(self.config.probe_spacing);
                let due = now.saturating_add(wait);
                match self.barred_until(now) {
                    Some(free) => Mode::Down { due: due.max(free), failed: 0, good },
                    None if good < self.good_probes_needed() => Mode::Down { due, failed: 0, good },
                    None => {
                        self.note_change(now);
                        Mode::Up { timeouts: 0, spared_until: now }
                    }
                }
            }
            Err(failure) => {
                let wait = match failure {
                    Failure::Overloaded { retry_after } => {
                        retry_after.min(self.config.longest_pause)
                    }
                    _ => self.config.penalty(failure),
                };
                let wait = self.jitter.shorten(self.config.backoff(failed)).max(wait);
                let failed = failed.saturating_add(1);
                Mode::Down { due: now.saturating_add(wait), failed, good: 0 }
            }
        };
    }

    fn go_down(&mut self, now: Duration, failure: Failure) {
        let wait = self.jitter.shorten(self.config.backoff(0)).max(self.config.penalty(failure));
        self.mode = Mode::Down { due: now.saturating_add(wait), failed: 0, good: 0 };
        self.note_change(now);
        // What comes back may be another path, or another machine.
        self.estimate.forget();
    }

    fn note_change(&mut self, now: Duration) {
        self.changes += 1;
        self.recent.push_back(now);
    }

    /// Hysteresis: each time that the link went down within the last minute doubles what it must
    /// show, up to 8 times. A link that was never up needs to show itself once.
    fn good_probes_needed(&self) -> u32 {
        if self.changes == 0 {
            return 1;
        }
        // Changes alternate and the latest was down.
        let downs = self.recent.len().div_ceil(2);
        let doublings = downs.saturating_sub(1).min(3);
        self.config.probes_to_recover.saturating_mul(1 << doublings)
    }

    /// When going up is allowed again, if it is not now. Going up must leave room for going down
    /// again, which cannot be put off: only so is the bound on changes a minute one.
    fn barred_until(&self, now: Duration) -> Option<Duration> {
        let excess = (self.recent.len() + 2).checked_sub(self.config.max_changes_per_minute)?;
        let last = excess.checked_sub(1)?;
        Some(self.recent.get(last).unwrap_or(&now).saturating_add(MINUTE))
    }

    fn latest(&self, now: Duration) -> Duration {
        now.max(self.clock)
    }

    fn advance(&mut self, now: Duration) -> Duration {
        self.clock = self.latest(now);
        while self.recent.front().is_some_and(|&t| t.saturating_add(MINUTE) <= self.clock) {
            self.recent.pop_front();
        }
        self.clock
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014): enough to keep clients out of step.
#[derive(Debug, Clone)]
struct Jitter(u64);

impl Jitter {
    /// Between half of `wait` and all of it.
    fn shorten(&mut self, wait: Duration) -> Duration {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let share = (z ^ (z >> 31)) >> 48;
        let part = wait / 2 / (1 << 16) * share as u32;
        (wait / 2).saturating_add(part)
    }
}

#[cfg(test)]
mod tests;
