//! `outrigger bench`: prefill and decode, as fast as this machine runs them.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use outrigger::{Engine, SamplerConfig, Session};
use outrigger_experts::Pool;
use serde_json::json;

use super::args::{ModelArgs, PlacementArgs, open};
use super::view::{bar, line, size};

/// Measure the speed of prefill and decode.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens to prefill
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens to decode
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64)]
    predict: usize,
    /// Also decode behind so many tokens, in turn with decoding behind the prompt
    #[arg(short, long, value_name = "N")]
    depth: Option<usize>,
    /// Repeats; the median counts
    #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    repeats: u16,
    /// Also measure how fast the threads read memory, which is what decoding is bound by
    #[arg(long)]
    bandwidth: bool,
    #[command(flatten)]
    placement: PlacementArgs,
    /// The last line is a JSON object
    #[arg(long)]
    json: bool,
}

impl Bench {
    pub(crate) async fn run(self) -> Result<()> {
        let mut config =
            self.placement.config(self.model.model.clone(), &self.model.compute).await?;
        let needed = self.prompt.max(self.depth.unwrap_or(0)).max(1) + self.predict + 1;
        config.context = Some(config.context.unwrap_or(needed));
        if config.context.is_some_and(|context| context < needed) {
            bail!("so many tokens need a context of {needed}");
        }
        let threads = config.threads;
        let engine = open(config).await?;
        let progress = bar(u64::from(self.repeats) + 1, "runs");
        let mut deep = match self.depth {
            Some(depth) => Some(self.prefill(&engine, depth).await?.0),
            None => None,
        };
        let (mut prefill, mut decode, mut behind) = (Vec::new(), Vec::new(), Vec::new());
        for run in 0..=self.repeats {
            let (mut session, prefilled) = self.prefill(&engine, self.prompt.max(1)).await?;
            let decoded = self.decode(&engine, &mut session).await?;
            let decoded_deep = match &mut deep {
                Some(session) => Some(self.decode(&engine, session).await?),
                None => None,
            };
            progress.inc(1);
            // The first run faults the weights in.
            if run > 0 {
                prefill.push(prefilled);
                decode.push(decoded);
                behind.extend(decoded_deep);
            }
        }
        progress.finish_and_clear();
        let (prefill, decode) = (median(prefill), median(decode));
        let behind = self.depth.map(|depth| (depth, median(behind)));
        let weight_bytes = engine.sizes().token;
        let gb_per_s = decode * weight_bytes as f64 / 1e9;
        let read = self.bandwidth.then(|| memory_gb_per_s(threads));
        let report = match self.json {
            true => json!({
                "prefill_tok_s": prefill,
                "decode_tok_s": decode,
                "depth": self.depth,
                "decode_at_depth_tok_s": behind.map(|(_, speed)| speed),
                "weight_bytes_per_token": weight_bytes,
                "gb_per_s": gb_per_s,
                "memory_gb_per_s": read,
                "threads": threads,
                "cpu": outrigger::cpu_features(),
            })
            .to_string(),
            false => format!(
                "prefill {prefill:.1} tok/s ({} tokens), decode {decode:.1} tok/s ({} tokens), {threads} threads, {}\n\
                 {}{} of weights a token: {gb_per_s:.1} GB/s{}",
                self.prompt,
                self.predict,
                outrigger::cpu_features(),
                behind.map_or(String::new(), |(depth, speed)| format!(
                    "decode {speed:.1} tok/s behind {depth} tokens, {:.2} x the time of behind {}\n",
                    decode / speed,
                    self.prompt.max(1),
                )),
                size(weight_bytes),
                read.map_or(String::new(), |read| format!(
                    " of the {read:.1} that the memory gives"
                )),
            ),
        };
        Ok(line(report)?)
    }

    /// A session of `len` tokens, and how many a second it took in.
    async fn prefill(&self, engine: &Arc<Engine>, len: usize) -> Result<(Session, f64)> {
        let mut session = engine.session(SamplerConfig::greedy())?;
        let vocab = engine.spec().n_vocab;
        session.push(&(0..len).map(|i| token(i, vocab)).collect::<Vec<_>>())?;
        let seconds = timed(&mut session).await?;
        Ok((session, len as f64 / seconds))
    }

    /// Tokens a second behind those of `session`, which forgets them again.
    async fn decode(&self, engine: &Engine, session: &mut Session) -> Result<f64> {
        let (len, vocab) = (session.len(), engine.spec().n_vocab);
        let mut seconds = 0.0;
        for i in len..len + self.predict {
            session.push(&[token(i, vocab)])?;
            seconds += timed(session).await?;
        }
        session.truncate(len);
        Ok(self.predict as f64 / seconds.max(1e-9))
    }
}

/// Token `i` of a text that nobody wrote.
fn token(i: usize, vocab: usize) -> u32 {
    (i as u64 * 2_654_435_761 % vocab as u64) as u32
}

/// How fast `threads` threads read memory together.
fn memory_gb_per_s(threads: usize) -> f64 {
    const MORE_THAN_CACHES: usize = 512 << 20;
    outrigger_experts::read_bandwidth(&Pool::new(threads), &vec![1; MORE_THAN_CACHES]) / 1e9
}

async fn timed(session: &mut Session) -> Result<f64> {
    let started = Instant::now();
    session.advance().await?;
    Ok(started.elapsed().as_secs_f64())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
