//! One text through the device, in decoding order, each prediction scored as it comes.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::ProgressBar;
use outrigger::{Distance, Engine, Pass, Prediction, SamplerConfig, Session, Tally};
use outrigger_experts::LayerStats;

use super::logits_file::LogitsFile;
use super::reference::{FullWindow, Reference};

/// How long healing waits for the servers to come back.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// How a text is read.
pub(super) struct Reading {
    /// Tokens a window; each starts with an empty history.
    pub(super) window: usize,
    /// Tokens a pass.
    pub(super) batch: usize,
    /// Tokens of each window after which the servers are cut off, if they are; the rest is scored.
    pub(super) cut: Option<usize>,
}

impl Reading {
    /// Tokens of each window that are not scored: they only warm the cache.
    pub(super) fn connected(&self) -> usize {
        self.cut.unwrap_or(0)
    }
}

/// One scored prediction.
pub(super) struct Row {
    /// Index in the text of the token that was predicted.
    pub(super) position: usize,
    /// -log probability of that token on the device, nats.
    pub(super) nll: f64,
    /// Arrived over routed weight of the row that it was predicted from.
    pub(super) coverage: f64,
    /// Share of that routed weight that approximations stood in for.
    pub(super) standin: f64,
    /// Beside the full model's prediction.
    pub(super) against_full: Option<RowAgainstFull>,
}

/// One scored prediction beside the full model's.
pub(super) struct RowAgainstFull {
    /// -log probability of the token on the full model, nats.
    pub(super) nll: f64,
    pub(super) distance: Distance,
}

/// What was measured on one text.
#[derive(Default)]
pub(super) struct Measured {
    pub(super) rows: Vec<Row>,
    /// Of the passes whose rows were scored.
    pub(super) tally: Tally,
    /// What the expert cache did in all passes.
    pub(super) cache: LayerStats,
    /// That the device computed.
    pub(super) elapsed: Duration,
    /// How far the logits after the last token are from the full model's after the servers came back.
    pub(super) healed_divergence: Option<f64>,
}

/// Reads texts and scores the device's predictions.
pub(super) struct Meter<'a> {
    pub(super) engine: &'a Arc<Engine>,
    pub(super) reading: &'a Reading,
    pub(super) reference: Option<&'a Reference>,
    pub(super) logits_file: Option<&'a mut LogitsFile>,
    pub(super) progress: &'a ProgressBar,
}

impl Meter<'_> {
    /// Reads a text window by window. Heals after the last one only: what is used while connected enters the cache, and
    /// another window would find it warmer than the device had it.
    pub(super) async fn measure(mut self, text: &[u32]) -> Result<Measured> {
        let mut measured = Measured::default();
        let mut last = None;
        let shortest = self.reading.connected() + 2;
        let starts = (0..).step_by(self.reading.window);
        for (start, tokens) in starts.zip(text.chunks(self.reading.window)) {
            if tokens.len() < shortest {
                // Nothing of it would be scored.
                continue;
            }
            let session = self.engine.session(SamplerConfig::greedy())?;
            let full = self.reference.map(|full| full.window(tokens)).transpose()?;
            let mut window = Window { start, tokens, session, full };
            self.read(&mut window, &mut measured).await?;
            last = Some(window);
        }
        measured.cache = self.engine.cache_stats().total();
        if let Some(window) = last {
            measured.healed_divergence = window.heal(self.engine).await?;
        }
        Ok(measured)
    }

    async fn read(&mut self, window: &mut Window<'_>, measured: &mut Measured) -> Result<()> {
        let (len, cut) = (window.tokens.len(), self.reading.connected());
        let mut at = 0;
        while at < len {
            let scored = at >= cut;
            self.engine.set_offline(scored && self.reading.cut.is_some());
            // A pass never straddles the cut.
            let end = if scored { len } else { cut };
            let rows = at..end.min(at + self.reading.batch);
            let started = Instant::now();
            let (logits, pass) = advance(&mut window.session, &window.tokens[rows.clone()]).await?;
            if let Some(file) = &mut self.logits_file {
                file.write(&logits)?;
            }
            if scored {
                measured.elapsed += started.elapsed();
                measured.tally += pass.tally;
                window.score(rows.clone(), &logits, &pass, &mut measured.rows).await?;
            }
            at = rows.end;
            self.progress.inc(rows.len() as u64);
        }
        Ok(())
    }
}

/// Computes `tokens` and returns every row's logits, `[rows, vocab]`.
async fn advance(session: &mut Session, tokens: &[u32]) -> Result<(Vec<f32>, Pass)> {
    session.push(tokens)?;
    let mut logits = Vec::new();
    let pass = session.advance_all(|batch| logits.extend_from_slice(batch)).await?;
    Ok((logits, pass))
}

/// A part of a text that starts with an empty history.
struct Window<'a> {
    /// Where it starts in the text.
    start: usize,
    tokens: &'a [u32],
    session: Session,
    full: Option<FullWindow<'a>>,
}

impl Window<'_> {
    /// Scores the predictions of `rows`, as far as the window says what came next.
    async fn score(
        &mut self,
        rows: Range<usize>,
        logits: &[f32],
        pass: &Pass,
        scored: &mut Vec<Row>,
    ) -> Result<()> {
        let vocab = logits.len() / rows.len();
        for (i, (at, logits)) in rows.zip(logits.chunks_exact(vocab)).enumerate() {
            let Some(&next) = self.tokens.get(at + 1) else { break };
            let device = Prediction::new(logits);
            let against_full = match &mut self.full {
                Some(full) => {
                    let full = Prediction::new(full.logits(at).await?);
                    Some(RowAgainstFull {
                        nll: full.surprise(next),
                        distance: device.distance(&full),
                    })
                }
                None => None,
            };
            scored.push(Row {
                position: self.start + at + 1,
                nll: device.surprise(next),
                coverage: pass.coverage(i).into(),
                standin: pass.standin(i).into(),
                against_full,
            });
        }
        Ok(())
    }

    /// Reconnects and settles; the largest absolute difference of the logits after the last token from the full model's.
    /// `None` where there is no full model to compare with, or no server comes back.
    async fn heal(mut self, engine: &Engine) -> Result<Option<f64>> {
        engine.set_offline(false);
        let Some(full) = &mut self.full else { return Ok(None) };
        if engine.servers().is_empty() || !engine.wait_connected(RECONNECT_PATIENCE).await {
            return Ok(None);
        }
        self.session.settle().await?;
        let full = full.logits(self.tokens.len() - 1).await?;
        let differences =
            self.session.logits().iter().zip(full).map(|(a, b)| f64::from((a - b).abs()));
        Ok(Some(differences.fold(0.0, f64::max)))
    }
}
