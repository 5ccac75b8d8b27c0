//! Lets a scenario happen.

use std::sync::Arc;

use tokio::time::{Instant, sleep};

use super::report::{Row, Run};
use super::scenario::{Input, Scenario};
use super::{Error, Result};
use crate::config::{Dial, EngineConfig};
use crate::engine::Engine;
use crate::pass::Tally;
use crate::prediction::Prediction;
use crate::sample::SamplerConfig;
use crate::session::Session;

/// Lets a scenario happen; `seen` is shown every token as it comes. Nothing in the outcome depends on the machine's
/// speed, clock or entropy.
///
/// # Errors
/// A model that cannot be used, a pack of another, or no token to make.
pub fn run(scenario: &Scenario, mut seen: impl FnMut(&Row) + Send) -> Result<Run> {
    scenario.network().run(|dial| async move {
        let mut life = Life::begin(scenario, dial).await?;
        let mut rows = Vec::new();
        while life.goes_on(rows.len()) {
            let row = life.next(rows.len()).await?;
            seen(&row);
            rows.push(row);
        }
        if rows.is_empty() {
            return Err(Error::Nothing);
        }
        let text = life.engine.tokenizer().decode(&life.session.tokens().collect::<Vec<_>>());
        let divergence = life.session.divergence();
        Ok(Run { scenario: scenario.clone(), rows, text, divergence })
    })?
}

/// A device at work, and the full model that looks over its shoulder.
pub(super) struct Life<'a> {
    scenario: &'a Scenario,
    engine: Arc<Engine>,
    session: Session,
    full: Session,
    /// The text to write; the model says what comes next if there is none.
    text: Option<Vec<u32>>,
    epoch: Instant,
}

/// A token that was just made.
struct Made {
    /// The token that follows.
    next: u32,
    coverage: f32,
    standin: f32,
    tally: Tally,
}

impl Life<'_> {
    pub(super) async fn begin(scenario: &Scenario, dial: Dial) -> Result<Life<'_>> {
        let epoch = Instant::now();
        let engine = Engine::open(scenario.engine(dial)).await?;
        let full = Engine::open(EngineConfig::new(&scenario.model)).await?;
        if let Some(pack) = &scenario.device.pack
            && engine.fingerprint() != full.fingerprint()
        {
            return Err(Error::Pack { pack: pack.clone(), model: scenario.model.clone() });
        }
        let mut session = engine.session(SamplerConfig {
            temperature: scenario.device.temperature,
            seed: scenario.seed,
            ..SamplerConfig::default()
        })?;
        let text = match &scenario.input {
            Input::Prompt(prompt) => {
                session.push_text(prompt)?;
                at_least(1, "prompt", session.len())?;
                None
            }
            Input::Text(text) => {
                let mut text = engine.tokenizer().encode(text, true, true);
                // Nothing predicts the first, and a full context predicts one more.
                at_least(2, "text", text.len())?;
                text.truncate(engine.context() + 1);
                Some(text)
            }
            Input::File(_) => unreachable!("a scenario that was read has its text"),
        };
        let full = full.session(SamplerConfig::greedy())?;
        Ok(Life { scenario, engine, session, full, text, epoch })
    }

    /// Tokens of the text that are predicted; 0 where the model says what comes next.
    pub(super) fn text_len(&self) -> usize {
        self.text.as_ref().map_or(0, |text| text.len() - 1)
    }

    /// Cuts the server off until the end.
    pub(super) fn cut_for_good(&self) {
        self.engine.set_offline(true);
    }

    /// Whether there is a token to make.
    pub(super) fn goes_on(&self, place: usize) -> bool {
        self.epoch.elapsed() < self.scenario.length.0
            && self.session.len() < self.engine.context()
            && self.text.as_ref().is_none_or(|text| place + 1 < text.len())
    }

    /// The next token, and what there is to say about it.
    pub(super) async fn next(&mut self, place: usize) -> Result<Row> {
        let asked = self.epoch.elapsed();
        let link = self.scenario.link_at(asked).to_owned();
        let made = self.make(place).await?;
        let waited = self.epoch.elapsed() - asked;
        let rows = self.rows_of(&made.tally);
        sleep(self.scenario.device.compute.time(rows)).await;
        self.ask_full_model().await?;
        let device = Prediction::new(self.session.logits());
        let full = Prediction::new(self.full.logits());
        let distance = device.distance(&full);
        let computed = self.computed();
        Ok(Row {
            place,
            token: made.next,
            asked,
            waited,
            ready: self.epoch.elapsed(),
            link,
            rows,
            computed,
            settled: self.session.settled(),
            provisional: self.session.settled() < computed,
            coverage: made.coverage,
            standin: made.standin,
            tally: made.tally,
            nll: device.surprise(made.next),
            nll_full: full.surprise(made.next),
            distance,
        })
    }

    async fn make(&mut self, place: usize) -> Result<Made> {
        let Some(text) = &self.text else {
            let token = self.session.step().await?;
            let (coverage, standin) = (token.coverage, token.standin);
            return Ok(Made { next: token.id, coverage, standin, tally: token.tally });
        };
        self.session.push(&text[place..=place])?;
        let pass = self.session.advance().await?;
        let last = pass.rows() - 1;
        let (coverage, standin) = (pass.coverage(last), pass.standin(last));
        Ok(Made { next: text[place + 1], coverage, standin, tally: pass.tally })
    }

    /// Rows of a pass, those that were healed on the way included.
    fn rows_of(&self, tally: &Tally) -> u32 {
        let calls = tally.local + tally.remote + tally.missing;
        let spec = self.engine.spec();
        (calls / (spec.n_layers * spec.n_used) as u64) as u32
    }

    /// Tokens that the session has computed: a token that was sampled is pending.
    fn computed(&self) -> usize {
        self.session.len() - usize::from(self.text.is_none())
    }

    /// Has the full model compute what the session has computed.
    async fn ask_full_model(&mut self) -> Result<()> {
        let known = self.full.len();
        let new: Vec<u32> = self.session.tokens().take(self.computed()).skip(known).collect();
        self.full.push(&new)?;
        self.full.advance().await?;
        Ok(())
    }
}

fn at_least(least: usize, what: &'static str, found: usize) -> Result<()> {
    if found < least { Err(Error::Short { what, found, least }) } else { Ok(()) }
}
