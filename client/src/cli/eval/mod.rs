//! `outrigger eval`: how good the model is, here and offline, and how far from the full model.

mod logits_file;
mod measure;
mod reference;
mod report;
mod stats;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use outrigger::text::Tokenizer;
use outrigger::{Engine, EngineConfig, Error, Model, OnMiss};

use super::args::{ModelArgs, PlacementArgs, open, read};
use super::embedded::EmbeddedServer;
use super::view::{bar, line, put, spinner};
use logits_file::LogitsFile;
use measure::{Measured, Meter, Reading};
use reference::{Reference, check_full};
use report::{Figures, view};

/// Measure perplexity and coverage on texts, and the distance to the full model.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("text").required(true)))]
pub(crate) struct Eval {
    #[command(flatten)]
    model: ModelArgs,
    /// The text; several may be given, one a domain, and count the same however long they are
    #[arg(short, long, group = "text", value_name = "FILE")]
    file: Vec<PathBuf>,
    /// Token ids instead of a text
    #[arg(long, group = "text", value_delimiter = ',', value_name = "1,2,3")]
    token_ids: Vec<u32>,
    /// Use only the first N tokens of each text
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
    /// Compare every prediction with the full model's: perplexity ratio, KL, top-1 agreement and acceptance,
    /// with 95 % intervals. FULL is the file that a pack was made from [default: the model itself, all
    /// experts at home]. Without --server and --offline-after, the device is cut off from the start
    #[arg(long, value_name = "FULL", num_args = 0..=1)]
    against_full: Option<Option<PathBuf>>,
    /// Write the logits to a new file, raw little-endian f32 [tokens, vocab]
    #[arg(long, value_name = "FILE")]
    save_logits: Option<PathBuf>,
    #[command(flatten)]
    placement: PlacementArgs,
    /// One JSON object a text where there are several, then one of all of them
    #[arg(long)]
    json: bool,
}

/// How long a token waits for the server in this process: an answer that is late because this machine is busy would
/// change the figures, and says nothing about the model.
const EMBEDDED_DEADLINE: Duration = Duration::from_secs(60);

/// What was measured, of each text by its name.
struct Results {
    /// Of the model.
    fingerprint: String,
    /// Tokens a window.
    window: usize,
    texts: Vec<(String, Measured)>,
}

/// A text and what people call it.
struct Text {
    name: String,
    tokens: Vec<u32>,
}

impl Eval {
    pub(crate) async fn run(self) -> Result<()> {
        ensure!(
            self.placement.trace.is_none() || self.file.len() <= 1,
            "--trace: found {} texts, expected one: each is read with an expert cache of its own",
            self.file.len()
        );
        ensure!(
            self.save_logits.is_none() || self.placement.trace != self.save_logits,
            "--trace and --save-logits: found the same file, expected two"
        );
        let mut config =
            self.placement.config(self.model.model.clone(), &self.model.compute).await?;
        let embedded = self.serve(&mut config).await?;
        let results = self.measure(&config).await?;
        if let Some(server) = embedded {
            server.stop().await?;
        }
        self.report(&results)
    }

    /// The full model's file, if there is something to compare with it.
    fn full(&self) -> Option<&Path> {
        let given = self.against_full.as_ref()?;
        Some(given.as_deref().unwrap_or(&self.model.model))
    }

    /// Tokens of a window after which the device is cut off.
    fn cut(&self) -> Option<usize> {
        let alone = self.against_full.is_some() && self.placement.servers().is_empty();
        self.offline_after.or(alone.then_some(0))
    }

    /// Starts the server that is cut off, where none is given but one is needed: before the cut, or to heal after it.
    async fn serve(&self, config: &mut EngineConfig) -> Result<Option<EmbeddedServer>> {
        if let Some(full) = self.full() {
            check_full(full, &self.model.model)?;
        }
        if self.cut().is_some() && config.on_miss == OnMiss::Wait {
            bail!("--on-miss wait would wait for ever once the servers are cut off");
        }
        let needed = self.cut().is_some_and(|tokens| tokens > 0) || self.full().is_some();
        if !needed || !config.servers.is_empty() {
            return Ok(None);
        }
        let model = &self.model.model;
        ensure!(
            self.full().is_some() || !Model::open(model)?.is_pack(),
            "{}: found a pack, which no server has; say --against-full FULL or --server URL",
            model.display()
        );
        let server = EmbeddedServer::start(self.full().unwrap_or(model)).await?;
        config.servers.push(server.address.to_string());
        config.deadline = EMBEDDED_DEADLINE;
        Ok(Some(server))
    }

    /// Measures each text on an engine of its own, so that its figures are the same whatever was measured before.
    async fn measure(&self, config: &EngineConfig) -> Result<Results> {
        let first = open(config.clone()).await?;
        let reference = match self.full() {
            Some(full) => Some(Reference::open(full, &first, config.threads).await?),
            None => None,
        };
        let texts = self.texts(&first)?;
        let reading = self.reading(&first, &texts)?;
        let (fingerprint, window) = (first.fingerprint().to_string(), reading.window);
        let mut logits_file = self.save_logits.as_deref().map(LogitsFile::create).transpose()?;
        let progress = bar(texts.iter().map(|text| text.tokens.len() as u64).sum(), "tokens");
        let (mut first, mut measured) = (Some(first), Vec::new());
        for text in texts {
            let engine = match first.take() {
                Some(engine) => engine,
                None => Engine::open(config.clone()).await.context("cannot open the model")?,
            };
            progress.set_message(short(&text.name).to_owned());
            let meter = Meter {
                engine: &engine,
                reading: &reading,
                reference: reference.as_ref(),
                logits_file: logits_file.as_mut(),
                progress: &progress,
            };
            measured.push((text.name, meter.measure(&text.tokens).await?));
        }
        progress.finish_and_clear();
        logits_file.map(LogitsFile::finish).transpose()?;
        Ok(Results { fingerprint, window, texts: measured })
    }

    fn texts(&self, engine: &Engine) -> Result<Vec<Text>> {
        let reading = spinner("reading the texts");
        let mut texts = Vec::new();
        for path in &self.file {
            let tokens =
                encode(engine.tokenizer(), &read(path)?, self.tokens.unwrap_or(usize::MAX));
            texts.push(Text { name: path.display().to_string(), tokens });
        }
        if !self.token_ids.is_empty() {
            let ids =
                &self.token_ids[..self.token_ids.len().min(self.tokens.unwrap_or(usize::MAX))];
            let vocab = engine.spec().n_vocab;
            if let Some(&id) = ids.iter().find(|id| **id as usize >= vocab) {
                return Err(Error::TokenId { id, vocab }).context("--token-ids");
            }
            texts.push(Text { name: "--token-ids".to_owned(), tokens: ids.to_vec() });
        }
        for Text { name, tokens } in &texts {
            let found = tokens.len();
            ensure!(found >= 2, "{name}: {found} tokens, at least 2 are needed to predict one");
        }
        reading.finish_and_clear();
        Ok(texts)
    }

    fn reading(&self, engine: &Engine, texts: &[Text]) -> Result<Reading> {
        let context = engine.context();
        ensure!(
            context >= 2,
            "-c: found {context}, expected at least 2: nothing predicts the first"
        );
        let window = self.window.map_or(context, |n| n as usize);
        ensure!(
            window <= context,
            "--window: found {window}, expected at most the context, {context}: see --ctx-size"
        );
        let reading = Reading { window, batch: self.batch.into(), cut: self.cut() };
        for Text { name, tokens } in texts {
            let tokens = window.min(tokens.len());
            ensure!(
                reading.connected() + 1 < tokens,
                "{name}: --offline-after leaves nothing of a window of {tokens} tokens"
            );
        }
        Ok(reading)
    }

    fn report(&self, Results { fingerprint, window, texts }: &Results) -> Result<()> {
        let total = Figures::of(texts.iter().map(|(_, measured)| measured));
        let single = texts.iter().map(|(name, text)| (name, Figures::of([text])));
        if !self.json {
            return Ok(put(&view(&single.collect::<Vec<_>>(), &total))?);
        }
        let about = |figures: &Figures, file: Option<&String>| {
            let mut about = figures.json();
            about["file"] = file.cloned().into();
            about["fingerprint"] = fingerprint.as_str().into();
            about["window"] = (*window).into();
            about
        };
        if let [(name, _)] = &texts[..] {
            return Ok(line(about(&total, Some(name)))?);
        }
        for (name, figures) in single {
            line(about(&figures, Some(name)))?;
        }
        Ok(line(about(&total, None))?)
    }
}

/// A path's last part, for a line that has little room.
fn short(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The first `most` tokens of a text, for which no more of it is looked at than need be.
fn encode(tokenizer: &Tokenizer, text: &str, most: usize) -> Vec<u32> {
    // Where a text is cut, its last tokens are others.
    const LAST: usize = 64;
    let mut end = most.saturating_add(LAST).saturating_mul(8);
    loop {
        let part = text.get(..text.ceil_char_boundary(end)).unwrap_or(text);
        let mut tokens = tokenizer.encode(part, true, true);
        if part.len() == text.len() || tokens.len() >= most + LAST {
            tokens.truncate(most);
            return tokens;
        }
        end *= 2;
    }
}
