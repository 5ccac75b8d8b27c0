//! `outrigger bench`: prefill and decode, as fast as this machine runs them.

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
        let needed = self.prompt.max(1) + self.predict + 1;
        config.context = Some(config.context.unwrap_or(needed));
        if config.context.is_some_and(|context| context < needed) {
            bail!("-p {} and -n {} need a context of {needed}", self.prompt, self.predict);
        }
        let threads = config.threads;
        let engine = open(config).await?;
        let progress = bar(u64::from(self.repeats) + 1, "runs");
        let (mut prefill, mut decode) = (Vec::new(), Vec::new());
        for run in 0..=self.repeats {
            let speed = self.once(&engine).await?;
            progress.inc(1);
            // The first run faults the weights in.
            if run > 0 {
                prefill.push(speed.0);
                decode.push(speed.1);
            }
        }
        progress.finish_and_clear();
        let (prefill, decode) = (median(prefill), median(decode));
        let weight_bytes = engine.sizes().token;
        let gb_per_s = decode * weight_bytes as f64 / 1e9;
        let read = self.bandwidth.then(|| memory_gb_per_s(threads));
        let report = match self.json {
            true => json!({
                "prefill_tok_s": prefill,
                "decode_tok_s": decode,
                "weight_bytes_per_token": weight_bytes,
                "gb_per_s": gb_per_s,
                "memory_gb_per_s": read,
                "threads": threads,
                "cpu": outrigger::cpu_features(),
            })
            .to_string(),
            false => format!(
                "prefill {prefill:.1} tok/s ({} tokens), decode {decode:.1} tok/s ({} tokens), {threads} threads, {}\n\
                 {} of weights a token: {gb_per_s:.1} GB/s{}",
                self.prompt,
                self.predict,
                outrigger::cpu_features(),
                size(weight_bytes),
                read.map_or(String::new(), |read| format!(
                    " of the {read:.1} that the memory gives"
                )),
            ),
        };
        Ok(line(report)?)
    }

    /// Prefill and decode speed of one run, tokens a second.
    async fn once(&self, engine: &std::sync::Arc<Engine>) -> Result<(f64, f64)> {
        let vocab = engine.spec().n_vocab as u64;
        let token = |i: usize| (i as u64 * 2_654_435_761 % vocab) as u32;
        let mut session = engine.session(SamplerConfig::greedy())?;
        let prompt: Vec<u32> = (0..self.prompt.max(1)).map(token).collect();
        session.push(&prompt)?;
        let prefill = timed(&mut session).await?;
        let mut decode = 0.0;
        for i in 0..self.predict {
            session.push(&[token(self.prompt + i)])?;
            decode += timed(&mut session).await?;
        }
        Ok((prompt.len() as f64 / prefill, self.predict as f64 / decode.max(1e-9)))
    }
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
