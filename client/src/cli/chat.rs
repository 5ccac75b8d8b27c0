//! `outrigger chat`: turns, with the model's own template.

use std::io::{BufRead, IsTerminal};

use anyhow::Result;
use clap::Args;
use outrigger::Session;
use outrigger::text::Message;

use super::args::{MetricsArgs, ModelArgs, PlacementArgs, SamplingArgs, open};
use super::run::summary;
use super::view::{MarkedText, Totals, note, put};

/// Talk to the model.
#[derive(Debug, Args)]
pub(crate) struct Chat {
    #[command(flatten)]
    model: ModelArgs,
    /// What the model is told before the first turn
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Longest answer, in tokens
    #[arg(short = 'n', long, value_name = "N", default_value_t = 512)]
    predict: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    placement: PlacementArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

impl Chat {
    pub(crate) async fn run(self) -> Result<()> {
        let engine =
            open(self.placement.config(self.model.model.clone(), &self.model.compute).await?)
                .await?;
        self.metrics.publish(&engine).await?;
        let mut session = engine.session(self.sampling.config())?;
        let mut messages = Vec::new();
        if let Some(system) = &self.system {
            messages.push(Message::new("system", system));
        }
        let terminal = std::io::stdin().is_terminal();
        if terminal {
            note("Type a message; an empty line or Ctrl-D ends.");
        }
        for line in prompts(terminal) {
            let line = line?;
            if line.trim().is_empty() {
                break;
            }
            messages.push(Message::new("user", &line));
            let rendered = engine.template().render(&messages, true)?;
            let prompt = engine.tokenizer().encode(&rendered, true, true);
            let kept = session.rewind(&prompt);
            session.push(&prompt[kept..])?;
            let answer = self.answer(&mut session).await?;
            messages.push(Message::new("assistant", &answer));
        }
        Ok(())
    }

    async fn answer(&self, session: &mut Session) -> Result<String> {
        let (mut text, mut totals) = (MarkedText::new(), Totals::default());
        let mut answer = String::new();
        for _ in 0..self.predict {
            let token = session.step().await?;
            totals.add(&token);
            text.print(&token)?;
            answer.push_str(&token.text);
            if token.end {
                break;
            }
        }
        text.end()?;
        note(format!("({})", summary(&totals)));
        Ok(answer)
    }
}

fn prompts(terminal: bool) -> impl Iterator<Item = std::io::Result<String>> {
    let mut lines = std::io::stdin().lock().lines();
    std::iter::from_fn(move || {
        let prompted = if terminal { put("> ") } else { Ok(()) };
        prompted.map_or_else(|error| Some(Err(error)), |()| lines.next())
    })
}
