//! Logits to a token: the filters that llama.cpp's users expect, in its order (biases, penalties,
//! top-k, top-p, min-p, temperature), and a draw that a seed repeats on every platform.

use std::cmp::Ordering;
use std::hash::{BuildHasher as _, RandomState};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How to choose a token. The defaults are llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Keep only so many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the likeliest tokens that together have this probability; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens that are at least this probable relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1 changes nothing.
    pub repeat_penalty: f32,
    /// Taken from the logits of recent tokens, once each; 0 changes nothing.
    pub presence_penalty: f32,
    /// Taken from the logits of recent tokens, as often as they are there; 0 changes nothing.
    pub frequency_penalty: f32,
    /// How many of the last tokens count as recent.
    pub repeat_last_n: usize,
    /// Added to the logits of these tokens, before anything else.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed draws the same tokens from the same logits.
    pub seed: u64,
}

impl Default for SamplerConfig {
    fn default() -> SamplerConfig {
        SamplerConfig {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repeat_last_n: 64,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplerConfig {
    /// Always the likeliest token.
    pub fn greedy() -> SamplerConfig {
        SamplerConfig { temperature: 0.0, ..SamplerConfig::default() }
    }

    /// Whether every parameter means something; for front ends, before they pass on what was typed.
    ///
    /// # Errors
    /// The first parameter that is out of its range.
    pub fn check(&self) -> Result<(), SamplerError> {
        let finite = |x: f32| x.is_finite() && x >= 0.0;
        let fraction = |x: f32| (0.0..=1.0).contains(&x);
        let odd = self.logit_bias.iter().map(|bias| bias.1).find(|bias| !bias.is_finite());
        let checks = [
            ("temperature", self.temperature, finite(self.temperature), "a number from 0 up"),
            ("top-p", self.top_p, fraction(self.top_p), "a number from 0 to 1"),
            ("min-p", self.min_p, fraction(self.min_p), "a number from 0 to 1"),
            (
                "repeat-penalty",
                self.repeat_penalty,
                finite(self.repeat_penalty) && self.repeat_penalty > 0.0,
                "a number above 0",
            ),
            (
                "presence-penalty",
                self.presence_penalty,
                self.presence_penalty.is_finite(),
                "a number",
            ),
            (
                "frequency-penalty",
                self.frequency_penalty,
                self.frequency_penalty.is_finite(),
                "a number",
            ),
            ("logit-bias", odd.unwrap_or_default(), odd.is_none(), "a number"),
        ];
        match checks.into_iter().find(|(.., ok, _)| !ok) {
            Some((field, found, _, expected)) => Err(SamplerError { field, found, expected }),
            None => Ok(()),
        }
    }
}

/// A sampling parameter that means nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field}: found {found}, expected {expected}")]
pub struct SamplerError {
    /// Which.
    pub field: &'static str,
    /// Its value.
    pub found: f32,
    /// What it may be.
    pub expected: &'static str,
}

/// A seed that nobody chose.
pub fn random_seed() -> u64 {
    // It takes its keys from the system's entropy.
    RandomState::new().hash_one(())
}

/// Chooses one token after another. A clone goes on to choose the same ones. A [`Session`](crate::Session) has its own;
/// this is for who samples from [`Session::logits`](crate::Session::logits).
#[derive(Clone, Debug)]
pub struct Sampler {
    config: SamplerConfig,
    rng: ChaCha8Rng,
    // Scratch, reused so that no token allocates.
    changed: Vec<f32>,
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    logit: f32,
    /// Relative to the likeliest token's, which is 1.
    weight: f64,
}

impl Sampler {
    /// A sampler at the start of a text. A parameter that [`SamplerConfig::check`] refuses, and a
    /// NaN, filter nothing; such a temperature is 0.
    pub fn new(config: SamplerConfig) -> Sampler {
        Sampler {
            rng: ChaCha8Rng::seed_from_u64(config.seed),
            config,
            changed: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Chooses the token after `history`, all tokens before it. `logits`: `[vocab]`. NaN and -inf are never chosen
    /// while anything else is there; with nothing else, token 0 is. Equals: the lowest id first.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let draw = self.draw();
        self.choose(logits, history, draw)
    }

    /// The next random number, uniform in [0, 1).
    pub(crate) fn draw(&mut self) -> f64 {
        unit(&mut self.rng)
    }

    /// What [`Sampler::sample`] chooses where the random number is `draw`.
    pub(crate) fn choose(&mut self, logits: &[f32], history: &[u32], draw: f64) -> u32 {
        let logits = if self.changes_logits() {
            self.changed.clear();
            self.changed.extend_from_slice(logits);
            favour(&mut self.changed, &self.config.logit_bias);
            let recent = &history[history.len().saturating_sub(self.config.repeat_last_n)..];
            penalise(&mut self.changed, recent, &self.config);
            &self.changed
        } else {
            logits
        };
        if self.config.temperature > 0.0 {
            filter(logits, &self.config, &mut self.candidates);
            pick(&self.candidates, draw)
        } else {
            likeliest(logits)
        }
    }

    fn changes_logits(&self) -> bool {
        let config = &self.config;
        let penalties = [config.presence_penalty, config.frequency_penalty];
        let penalised = config.repeat_penalty != 1.0 || penalties.iter().any(|p| *p != 0.0);
        !config.logit_bias.is_empty() || (penalised && config.repeat_last_n > 0)
    }
}

fn favour(logits: &mut [f32], biases: &[(u32, f32)]) {
    for &(id, bias) in biases {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit += bias;
        }
    }
}

/// Makes recent tokens less likely (llama.cpp's penalties).
fn penalise(logits: &mut [f32], recent: &[u32], config: &SamplerConfig) {
    let repeat = if config.repeat_penalty > 0.0 { config.repeat_penalty } else { 1.0 };
    for (i, &id) in recent.iter().enumerate() {
        let Some(logit) = logits.get_mut(id as usize) else { continue };
        if !recent[..i].contains(&id) {
            *logit = if *logit > 0.0 { *logit / repeat } else { *logit * repeat };
            *logit -= config.presence_penalty;
        }
        *logit -= config.frequency_penalty;
    }
}

fn likeliest(logits: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, 0);
    for (id, &logit) in (0..).zip(logits) {
        if logit > best.0 {
            best = (logit, id);
        }
    }
    best.1
}

/// The tokens that may be drawn, likeliest first, with their weights.
fn filter(logits: &[f32], config: &SamplerConfig, candidates: &mut Vec<Candidate>) {
    top_k(logits, config.top_k, candidates);
    let Some(&Candidate { logit: max, .. }) = candidates.first() else { return };

    // In f64, so that the last bit of one platform's `exp` decides nothing.
    let weigh = |candidates: &mut [Candidate], temperature: f32| {
        for c in candidates.iter_mut() {
            // +inf too is a maximum, of weight 1.
            let below = if c.logit == max { 0.0 } else { f64::from(c.logit) - f64::from(max) };
            c.weight = (below / f64::from(temperature)).exp();
        }
    };
    weigh(candidates, 1.0);
    if config.top_p < 1.0 {
        let enough = f64::from(config.top_p) * total(candidates);
        let mut sum = 0.0;
        let reached = candidates.iter().position(|c| {
            sum += c.weight;
            sum >= enough
        });
        candidates.truncate(reached.map_or(usize::MAX, |last| last + 1));
    }
    if config.min_p > 0.0 {
        let enough = f64::from(config.min_p);
        candidates.truncate(candidates.partition_point(|c| c.weight >= enough).max(1));
    }
    weigh(candidates, config.temperature);
}

/// The `k` likeliest tokens, in order, in one pass; all where `k` is 0.
fn top_k(logits: &[f32], k: usize, candidates: &mut Vec<Candidate>) {
    let k = if k == 0 { logits.len() } else { k };
    // Twice as many are gathered before the worse half is dropped: O(1) a token on average.
    let full = k.saturating_mul(2);
    let mut floor = f32::NEG_INFINITY;
    candidates.clear();
    for (id, &logit) in (0..).zip(logits) {
        if logit > floor {
            candidates.push(Candidate { id, logit, weight: 0.0 });
            if candidates.len() == full {
                let (_, worst, _) = candidates.select_nth_unstable_by(k - 1, likelier_first);
                floor = worst.logit;
                candidates.truncate(k);
            }
        }
    }
    candidates.sort_unstable_by(likelier_first);
    candidates.truncate(k);
}

fn likelier_first(a: &Candidate, b: &Candidate) -> Ordering {
    // No NaN gets here.
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| c.weight).sum()
}

/// The token at `u`, from 0 to 1, of the candidates' weights laid end to end.
fn pick(candidates: &[Candidate], u: f64) -> u32 {
    let mut left = u * total(candidates);
    for c in candidates {
        left -= c.weight;
        if left < 0.0 {
            return c.id;
        }
    }
    // Rounding, or no candidates at all.
    candidates.last().map_or(0, |c| c.id)
}

/// Uniform in [0, 1), of 53 bits.
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
