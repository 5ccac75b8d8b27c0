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
//!    +---------- good probes, for as long as hysteresis asks ----+
//! ```
//!
//! Hysteresis: each outage of the last minute doubles the time for which a link that comes back must
//! answer its probes, up to [`LONGEST_PROOF`]. What is good for less than that stays down, and every
//! change of mode but the first few takes that long, which bounds them: 140 a minute at the very
//! worst. What is good for longer is up again within 2 s, however often it failed before.
//!
//! The driver's part: while [`Link::next_probe`] gives a time, wait for it, send one `Describe`,
//! within [`Link::PROBE_DEADLINE`], and hand what came of it to [`Link::on_probe`].

mod estimate;

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::time::Duration;

use estimate::Estimate;

/// For how long an outage is held against a link.
const MINUTE: Duration = Duration::from_secs(60);
/// Deadlines missed in a row that take the link down. One late answer may be bad luck; the next
/// costs another full deadline.
const TIMEOUTS_TO_DOWN: u32 = 2;
/// Wait before the first probe; every failed probe doubles it, ...
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
/// ... up to this. Probes are cheap and this bounds the time to recover, so it is short.
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);
/// From one good probe to the next.
const PROBE_SPACING: Duration = Duration::from_millis(100);
/// For how long probes must go well until the link is up again, after one outage in a minute; every
/// other outage doubles it, ...
const FIRST_PROOF: Duration = Duration::from_millis(100);
/// ... up to this.
const LONGEST_PROOF: Duration = Duration::from_millis(800);
/// How long a server that gave a bad answer is left alone.
const QUARANTINE: Duration = Duration::from_secs(60);
/// The longest that an overloaded server's hint is followed.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

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
    jitter: Jitter,
    /// The latest time that was heard of.
    clock: Duration,
    mode: Mode,
    /// When it went down within the last minute, oldest first.
    outages: VecDeque<Duration>,
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
        /// When the first of the good probes in a row was sent.
        good_since: Option<Duration>,
    },
}

impl Link {
    /// How long a probe may take: long enough to connect anew (three round trips with TLS), and no
    /// longer, for one that was sent just before a fault ended delays the recovery.
    pub const PROBE_DEADLINE: Duration = Duration::from_millis(750);

    /// A link to a server of which nothing is known yet: not up before a first good probe, which
    /// is due at once. `deadlines` bound what [`deadline`](Link::deadline) gives, without the rows'
    /// part: below the least, scheduling noise looks like a fault; the greatest is in force while
    /// no trip was seen. `seed` feeds the jitter; give every link another.
    pub fn new(deadlines: RangeInclusive<Duration>, seed: u64) -> Self {
        Link {
            estimate: Estimate::new(deadlines),
            jitter: Jitter(seed),
            clock: Duration::ZERO,
            mode: Mode::Down { due: Duration::ZERO, failed: 0, good_since: None },
            outages: VecDeque::new(),
        }
    }

    /// What the server may be used for now.
    pub fn state(&self, now: Duration) -> State {
        match self.mode {
            Mode::Up { .. } => State::Up,
            Mode::Down { due, good_since: None, .. } if self.latest(now) < due => {
                State::Down { until: due }
            }
            Mode::Down { .. } => State::Probing,
        }
    }

    /// Whether work may be sent now: up, and not overloaded.
    pub fn may_send(&self, now: Duration) -> bool {
        matches!(self.mode, Mode::Up { spared_until, .. } if self.latest(now) >= spared_until)
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
            (Mode::Up { timeouts, spared_until }, Failure::Overloaded { .. }) => {
                // It answered, so it lives. At most half as long again, so that those it shed do
                // not all come back at once.
                let pause = penalty(failure);
                let pause = pause.saturating_add(self.jitter.shorten(pause) / 2);
                *timeouts = 0;
                *spared_until = now.saturating_add(pause).max(*spared_until);
            }
            (Mode::Up { timeouts, .. }, Failure::Timeout) => {
                *timeouts += 1;
                self.estimate.on_timeout();
                if *timeouts >= TIMEOUTS_TO_DOWN {
                    self.go_down(now, failure);
                }
            }
            // A broken connection is certain: the next request would fail as well.
            (Mode::Up { .. }, _) => self.go_down(now, failure),
            (Mode::Down { due, good_since, .. }, Failure::BadAnswer | Failure::WrongModel) => {
                *due = now.saturating_add(penalty(failure)).max(*due);
                *good_since = None;
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
        let Mode::Down { due, failed, good_since } = self.mode else { return };
        if now < due {
            return;
        }
        self.mode = match answer {
            Ok(rtt) => {
                self.estimate.on_probe(now, rtt);
                let sent = now.saturating_sub(rtt).max(due);
                let since = good_since.unwrap_or(sent);
                if sent - since >= self.proof() {
                    Mode::Up { timeouts: 0, spared_until: now }
                } else {
                    let due = sent.saturating_add(PROBE_SPACING).max(now);
                    Mode::Down { due, failed: 0, good_since: Some(since) }
                }
            }
            Err(failure) => {
                let wait = self.jitter.shorten(backoff(failed));
                // The wait counts from when the probe was due: what it took to fail is part of it.
                let due = due.saturating_add(wait).max(now.saturating_add(penalty(failure)));
                Mode::Down { due, failed: failed.saturating_add(1), good_since: None }
            }
        };
    }

    fn go_down(&mut self, now: Duration, failure: Failure) {
        let wait = self.jitter.shorten(backoff(0)).max(penalty(failure));
        self.mode = Mode::Down { due: now.saturating_add(wait), failed: 0, good_since: None };
        self.outages.push_back(now);
        // What comes back may be another path, or another machine.
        self.estimate.forget();
    }

    /// For how long it must answer its probes; once, if it did not go down within the last minute.
    fn proof(&self) -> Duration {
        match self.outages.len() {
            0 => Duration::ZERO,
            outages => {
                let doublings = (outages - 1).min(20);
                FIRST_PROOF.saturating_mul(1 << doublings).min(LONGEST_PROOF)
            }
        }
    }

    fn latest(&self, now: Duration) -> Duration {
        now.max(self.clock)
    }

    fn advance(&mut self, now: Duration) -> Duration {
        self.clock = self.latest(now);
        while self.outages.front().is_some_and(|&t| t.saturating_add(MINUTE) <= self.clock) {
            self.outages.pop_front();
        }
        self.clock
    }
}

/// The wait after `failed` failed probes, before jitter.
fn backoff(failed: u32) -> Duration {
    FIRST_BACKOFF.saturating_mul(1 << failed.min(20)).min(LONGEST_BACKOFF)
}

/// For how long a server is left alone after this failure, whatever came before.
fn penalty(failure: Failure) -> Duration {
    match failure {
        Failure::BadAnswer => QUARANTINE,
        Failure::Overloaded { retry_after } => retry_after.min(LONGEST_PAUSE),
        _ => Duration::ZERO,
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
