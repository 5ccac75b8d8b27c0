//! `outrigger eval`: how good the model is, here and offline.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use outrigger::{Engine, Pass, SamplerConfig, Session, Tally};
use serde_json::json;

use super::args::{ModelArgs, PlacementArgs, open};
use super::embedded::EmbeddedServer;
use super::view::{bar, line, size};

/// Measure perplexity and coverage on a text.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("text").required(true)))]
pub(crate) struct Eval {
    #[command(flatten)]
    model: ModelArgs,
    /// The text
    #[arg(short, long, group = "text", value_name = "FILE")]
    file: Option<PathBuf>,
    /// Token ids instead of a text
    #[arg(long, group = "text", value_delimiter = ',', value_name = "1,2,3")]
    token_ids: Option<Vec<u32>>,
    /// Use only the first N tokens
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Tokens a pass; 1 is real sequential decoding
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=512))]
    batch: u16,
    /// Tokens a window; each starts with an empty history [default: the context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    window: Option<u32>,
    /// Cut every server off after N tokens of each window; the figures then cover the rest of it.
    /// Without --server, the experts' server runs inside this process until then
    #[arg(long, value_name = "N")]
    offline_after: Option<usize>,
    /// Write the logits, raw little-endian f32 [tokens, vocab]
    #[arg(long, value_name = "FILE")]
    save_logits: Option<PathBuf>,
    #[command(flatten)]
    placement: PlacementArgs,
    /// The last line is a JSON object
    #[arg(long)]
    json: bool,
}

impl Eval {
    pub(crate) async fn run(self) -> Result<()> {
        let mut config = self.placement.config(self.model.model.clone(), &self.model.compute);
        let mut embedded = None;
        if self.offline_after.is_some_and(|n| n > 0) && config.servers.is_empty() {
            let server = EmbeddedServer::start(&self.model.model).await?;
            config.servers.push(server.address.to_string());
            embedded = Some(server);
        }
        let engine = open(config).await?;
        let tokens = self.read_tokens(&engine)?;
        let measured = self.measure(&engine, &tokens).await?;
        drop(engine);
        if let Some(server) = embedded {
            server.stop().await?;
        }
        match self.json {
            true => line(measured.json())?,
            false => line(measured.text())?,
        }
        Ok(())
    }

    fn read_tokens(&self, engine: &Engine) -> Result<Vec<u32>> {
        let mut tokens = match (&self.token_ids, &self.file) {
            (Some(ids), _) => ids.clone(),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                engine.tokenizer().encode(&text, true, true)
            }
            (None, None) => bail!("no text: give it with -f FILE or --token-ids 1,2,3"),
        };
        tokens.truncate(self.tokens.unwrap_or(usize::MAX));
        if tokens.len() < 2 {
            bail!("{} tokens: at least 2 are needed to predict one", tokens.len());
        }
        Ok(tokens)
    }

    async fn measure(&self, engine: &Arc<Engine>, tokens: &[u32]) -> Result<Measured> {
        let window = self.window.map_or(engine.context(), |n| n as usize).min(engine.context());
        if self.offline_after.is_some_and(|n| n + 1 >= window.min(tokens.len())) {
            bail!(
                "--offline-after leaves nothing of a window of {} tokens",
                window.min(tokens.len())
            );
        }
        let mut measured = Measured::default();
        let mut logits_file = self.save_logits.as_ref().map(LogitsFile::create).transpose()?;
        let progress = bar(tokens.len() as u64, "tokens");
        let started = Instant::now();
        for part in tokens.chunks(window).filter(|part| part.len() > 1) {
            engine.set_offline(self.offline_after == Some(0));
            let mut session = engine.session(SamplerConfig::greedy())?;
            let mut at = 0;
            while at < part.len() {
                let connected = self.offline_after.unwrap_or(0).saturating_sub(at);
                if connected == 0 && self.offline_after.is_some() {
                    engine.set_offline(true);
                }
                // A pass never straddles the cut.
                let cut = if connected > 0 { connected } else { usize::MAX };
                let rows = usize::from(self.batch).min(part.len() - at).min(cut);
                let (logits, pass) = advance(&mut session, &part[at..at + rows]).await?;
                if let Some(file) = &mut logits_file {
                    file.write(&logits)?;
                }
                if connected == 0 {
                    measured.add(&logits, &part[at + 1..part.len().min(at + rows + 1)], &pass);
                }
                at += rows;
                progress.inc(rows as u64);
            }
        }
        measured.elapsed = started.elapsed();
        progress.finish_and_clear();
        logits_file.map(LogitsFile::finish).transpose()?;
        Ok(measured)
    }
}

/// Computes `tokens` and returns every row's logits, `[rows, vocab]`.
async fn advance(session: &mut Session, tokens: &[u32]) -> Result<(Vec<f32>, Pass)> {
    session.push(tokens)?;
    let mut logits = Vec::new();
    let pass = session.advance_all(|batch| logits.extend_from_slice(batch)).await?;
    Ok((logits, pass))
}

/// What was measured over all scored rows.
#[derive(Default)]
struct Measured {
    /// Predictions that were scored.
    scored: u64,
    /// Summed negative log likelihood, nats.
    nll: f64,
    rows: u64,
    coverage: f64,
    tally: Tally,
    elapsed: Duration,
}

impl Measured {
    /// Scores each row of `logits` that has a next token.
    fn add(&mut self, logits: &[f32], next: &[u32], pass: &Pass) {
        self.tally += pass.tally;
        self.rows += pass.rows() as u64;
        self.coverage += (0..pass.rows()).map(|row| f64::from(pass.coverage(row))).sum::<f64>();
        let vocab = logits.len() / pass.rows();
        for (row, &target) in logits.chunks_exact(vocab).zip(next) {
            self.nll += negative_log_likelihood(row, target);
            self.scored += 1;
        }
    }

    fn mean_nll(&self) -> f64 {
        self.nll / self.scored as f64
    }

    fn mean_coverage(&self) -> f64 {
        self.coverage / self.rows as f64
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "tokens": self.scored,
            "nll": self.mean_nll(),
            "ppl": self.mean_nll().exp(),
            "coverage": self.mean_coverage(),
            "local": self.tally.local,
            "remote": self.tally.remote,
            "missing": self.tally.missing,
            "substituted": self.tally.substituted,
            "bytes_up": self.tally.bytes_up,
            "bytes_down": self.tally.bytes_down,
            "seconds": self.elapsed.as_secs_f64(),
        })
    }

    fn text(&self) -> String {
        let Tally { local, remote, missing, .. } = self.tally;
        format!(
            "perplexity {:.4} (nll {:.4}) over {} tokens, coverage {:.4}\n\
             expert calls: {local} local, {remote} remote, {missing} missing; {} up, {} down; {:.1} s",
            self.mean_nll().exp(),
            self.mean_nll(),
            self.scored,
            self.mean_coverage(),
            size(self.tally.bytes_up),
            size(self.tally.bytes_down),
            self.elapsed.as_secs_f64(),
        )
    }
}

/// -log softmax(logits)[target], in f64.
fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    max + sum.ln() - f64::from(logits[target as usize])
}

struct LogitsFile {
    path: PathBuf,
    out: BufWriter<File>,
}

impl LogitsFile {
    fn create(path: &PathBuf) -> Result<LogitsFile> {
        let file =
            File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(LogitsFile { path: path.clone(), out: BufWriter::new(file) })
    }

    fn write(&mut self, logits: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        self.out.write_all(&bytes).with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn finish(mut self) -> Result<()> {
        self.out.flush().with_context(|| format!("cannot write {}", self.path.display()))
    }
}
