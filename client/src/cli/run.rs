//! `outrigger run`: text in, text out.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use outrigger::Token;
use serde_json::json;

use super::args::{MetricsArgs, ModelArgs, PlacementArgs, SamplingArgs, open, tokens};
use super::generate::{Cut, generate};
use super::view::{MarkedText, Totals, line, note, size};

/// Generate text.
#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to continue
    #[arg(short, long, conflicts_with = "file", value_name = "TEXT")]
    prompt: Option<String>,
    /// A file with the text to continue
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Tokens to generate; -1, the default: until the model ends or the context is full
    #[arg(short = 'n', long, value_name = "N", allow_negative_numbers = true, value_parser = tokens)]
    predict: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    placement: PlacementArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
    /// One JSON object a token, then one with the totals
    #[arg(long)]
    json: bool,
}

impl Run {
    pub(crate) async fn run(self) -> Result<()> {
        let (prompt, sampler) = (self.prompt()?, self.sampling.config()?);
        let engine =
            open(self.placement.config(self.model.model, &self.model.compute).await?).await?;
        self.metrics.publish(&engine).await?;
        let mut session = engine.session(sampler)?;
        session.push_text(&prompt)?;
        let mut text = MarkedText::new();
        if !self.json {
            text.prompt(&prompt)?;
        }
        let said = generate(&engine, &mut session, self.predict, |token| {
            match self.json {
                true => line(token_json(token))?,
                false => text.print(token)?,
            }
            Ok(!token.end)
        });
        let said = said.await?;
        match self.json {
            true => line(totals_json(&said.totals))?,
            false => {
                text.end()?;
                note(summary(&said.totals));
            }
        }
        if let Some(fault) = &said.totals.fault
            && !self.placement.servers().is_empty()
        {
            note(format!("experts were missing: {fault}"));
        }
        match said.cut {
            Some(cut @ Cut::User) => bail!("{cut}"),
            Some(cut) => note(cut),
            None => {}
        }
        Ok(())
    }

    fn prompt(&self) -> Result<String> {
        let text = match (&self.prompt, &self.file) {
            (Some(text), _) => text.clone(),
            (None, Some(path)) => std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the prompt from {}", path.display()))?,
            (None, None) => bail!("no prompt: give it with -p TEXT or -f FILE"),
        };
        if text.is_empty() {
            bail!("the prompt is empty");
        }
        Ok(text)
    }
}

/// One line for people: speed, coverage and traffic.
pub(crate) fn summary(totals: &Totals) -> String {
    let [local, remote, standin, missing] = totals.shares();
    format!(
        "{} tokens, {:.1} tok/s, coverage {:.3}; experts {local:.0} % local, {remote:.0} % remote, \
         {standin:.0} % approximated, {missing:.0} % missing; {} up, {} down",
        totals.tokens,
        totals.tokens_per_second(),
        totals.mean_coverage(),
        size(totals.tally.bytes_up),
        size(totals.tally.bytes_down),
    )
}

fn token_json(token: &Token) -> serde_json::Value {
    json!({
        "id": token.id,
        "text": token.text,
        "coverage": token.coverage,
        "standin": token.standin,
        "provisional": token.provisional,
        "healed": token.healed,
        "divergence": token.divergence,
        "tally": token.tally,
        "fault": token.fault,
        "ms": token.elapsed.as_secs_f64() * 1e3,
    })
}

/// The totals as the last line of machine-readable output.
pub(crate) fn totals_json(totals: &Totals) -> serde_json::Value {
    json!({
        "tokens": totals.tokens,
        "tok_s": totals.tokens_per_second(),
        "coverage": totals.mean_coverage(),
        "tally": totals.tally,
        "slowest_ms": totals.slowest.as_secs_f64() * 1e3,
        "seconds": totals.elapsed.as_secs_f64(),
    })
}
