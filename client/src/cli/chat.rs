//! `outrigger chat`: turns, with the model's own template.

use std::io::IsTerminal;

use anyhow::Result;
use clap::Args;
use outrigger::text::Message;
use outrigger::{Engine, Session};
use tokio::sync::mpsc;

use super::args::{MetricsArgs, ModelArgs, PlacementArgs, SamplingArgs, open, tokens};
use super::generate::generate;
use super::run::summary;
use super::view::{MarkedText, note, put};

/// Talk to the model.
#[derive(Debug, Args)]
pub(crate) struct Chat {
    #[command(flatten)]
    model: ModelArgs,
    /// What the model is told before the first turn
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Longest answer, in tokens; -1: until the model ends it or the context is full
    #[arg(short = 'n', long, value_name = "N", default_value = "512", allow_negative_numbers = true, value_parser = tokens)]
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
        let sampler = self.sampling.config()?;
        let engine =
            open(self.placement.config(self.model.model.clone(), &self.model.compute).await?)
                .await?;
        self.metrics.publish(&engine).await?;
        let mut session = engine.session(sampler)?;
        let mut messages = Vec::new();
        if let Some(system) = &self.system {
            messages.push(Message::new("system", system));
        }
        let terminal = std::io::stdin().is_terminal();
        if terminal {
            note("Type a message; an empty line or Ctrl-D ends, Ctrl-C ends an answer.");
        }
        let mut lines = lines();
        while let Some(line) = next(&mut lines, terminal).await? {
            messages.push(Message::new("user", &line));
            let Some(prompt) = self.prompt(&engine, &mut messages)? else { continue };
            let kept = session.rewind(&prompt);
            session.push(&prompt[kept..])?;
            let answer = self.answer(&engine, &mut session).await?;
            messages.push(Message::new("assistant", &answer));
        }
        Ok(())
    }

    /// What the model reads. Forgets the oldest turns where they leave no room for an answer; where the last message
    /// alone is too long, forgets that one instead, and there is nothing to read.
    fn prompt(&self, engine: &Engine, messages: &mut Vec<Message>) -> Result<Option<Vec<u32>>> {
        let context = engine.context();
        let room = context - self.predict.min(context / 2);
        let first = usize::from(self.system.is_some());
        let mut kept = messages.clone();
        loop {
            let rendered = engine.template().render(&kept, true)?;
            let prompt = engine.tokenizer().encode(&rendered, true, true);
            let (found, alone) = (prompt.len(), kept.len() == first + 1);
            if found <= room || alone && found <= context {
                let forgotten = (messages.len() - kept.len()) / 2;
                if forgotten > 0 {
                    note(format!("(the oldest turns are forgotten to make room: {forgotten})"));
                }
                *messages = kept;
                return Ok(Some(prompt));
            }
            if alone {
                note(format!("(this takes {found} tokens, the context holds {context}: say less)"));
                messages.pop();
                return Ok(None);
            }
            // A question and its answer.
            kept.drain(first..first + 2);
        }
    }

    async fn answer(&self, engine: &Engine, session: &mut Session) -> Result<String> {
        let mut text = MarkedText::new();
        let mut answer = String::new();
        let said = generate(engine, session, Some(self.predict), |token| {
            answer.push_str(&token.text);
            text.print(token)?;
            Ok(!token.end)
        });
        let said = said.await?;
        text.end()?;
        let cut = said.cut.map_or(String::new(), |cut| format!("{cut}; "));
        note(format!("({cut}{})", summary(&said.totals)));
        Ok(answer)
    }
}

/// The lines of standard input, read by a thread of its own: the runtime would wait for one of its threads at the end.
fn lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (send, receive) = mpsc::channel(1);
    std::thread::spawn(move || {
        std::io::stdin().lines().try_for_each(|line| send.blocking_send(line))
    });
    receive
}

/// What the user says next; nothing once the conversation is over.
async fn next(
    lines: &mut mpsc::Receiver<std::io::Result<String>>,
    terminal: bool,
) -> Result<Option<String>> {
    if terminal {
        put("> ")?;
    }
    let line = tokio::select! {
        line = lines.recv() => line.transpose()?,
        _ = tokio::signal::ctrl_c() => None,
    };
    if terminal && line.is_none() {
        put("\n")?;
    }
    Ok(line.filter(|line| !line.trim().is_empty()))
}
