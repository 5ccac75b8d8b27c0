//! `outrigger bench`: prefill and decode, as fast as this machine runs them.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use outrigger::{Engine, Pass, SamplerConfig, Session};
use outrigger_experts::Pool;
use serde_json::json;

use super::args::{ModelArgs, PlacementArgs, open};
use super::view::{bar, line, size};

/// Measure the speed of prefill and decode.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens to prefill; 0 to decode only
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens to decode
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    predict: u32,
    /// Also decode behind so many tokens, in turn with decoding behind the prompt
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    depth: Option<u32>,
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

/// Medians of all repeats, in tokens a second.
struct Speeds {
    /// None where there is no prompt.
    prefill: Option<f64>,
    decode: f64,
    /// Beside the depth.
    behind: Option<(u32, f64)>,
    /// What ran where.
    seen: Seen,
}

/// What was computed while the clock ran.
#[derive(Default)]
struct Seen {
    rows: f64,
    coverage: f64,
    /// Expert calls that did not run on the device.
    elsewhere: u64,
    fault: Option<String>,
}

impl Seen {
    fn add(&mut self, pass: Pass) {
        let coverage = |row| f64::from(pass.coverage(row));
        self.coverage += (0..pass.rows()).map(coverage).sum::<f64>();
        self.rows += pass.rows() as f64;
        self.elsewhere += pass.tally.remote + pass.tally.missing;
        self.fault = pass.fault.or(self.fault.take());
    }

    /// The mean over rows.
    fn coverage(&self) -> f64 {
        self.coverage / self.rows
    }

    /// That these are not the full model's speeds, if so.
    fn warning(&self) -> String {
        let coverage = self.coverage();
        if coverage == 1.0 {
            return String::new();
        }
        let fault = self.fault.as_deref().unwrap_or_default();
        format!(
            "not the full model's speed: coverage {coverage:.3}; experts were approximated or missing: {fault}\n"
        )
    }
}

impl Bench {
    pub(crate) async fn run(self) -> Result<()> {
        let mut config =
            self.placement.config(self.model.model.clone(), &self.model.compute).await?;
        let longest = self.prompt.max(self.depth.unwrap_or(0) as usize).max(1);
        let needed = longest + self.predict as usize + 1;
        config.context = Some(config.context.unwrap_or(needed));
        if config.context.is_some_and(|context| context < needed) {
            bail!("so many tokens need a context of {needed}");
        }
        let threads = config.threads;
        let engine = open(config).await?;
        let speeds = self.measure(&engine).await?;
        let memory = self.bandwidth.then(|| memory_gb_per_s(threads));
        Ok(line(self.report(&speeds, engine.sizes().token, memory, threads))?)
    }

    async fn measure(&self, engine: &Arc<Engine>) -> Result<Speeds> {
        let predict = self.predict as usize;
        let progress = bar(u64::from(self.repeats) + 1 + u64::from(self.depth.is_some()), "runs");
        progress.tick();
        let (mut deep, mut seen) = (None, Seen::default());
        if let Some(depth) = self.depth {
            deep = Some(prefill(engine, depth as usize, &mut seen).await?.0);
            progress.inc(1);
        }
        let (mut prefills, mut decodes, mut behind) = (Vec::new(), Vec::new(), Vec::new());
        for run in 0..=self.repeats {
            let (mut session, prefilled) = prefill(engine, self.prompt.max(1), &mut seen).await?;
            let decoded = decode(engine, &mut session, predict, &mut seen).await?;
            let decoded_deep = match &mut deep {
                Some(session) => Some(decode(engine, session, predict, &mut seen).await?),
                None => None,
            };
            progress.inc(1);
            // The first run faults the weights in.
            if run > 0 {
                prefills.push(prefilled);
                decodes.push(decoded);
                behind.extend(decoded_deep);
            }
        }
        progress.finish_and_clear();
        Ok(Speeds {
            prefill: (self.prompt > 0).then(|| median(prefills)),
            decode: median(decodes),
            behind: self.depth.map(|depth| (depth, median(behind))),
            seen,
        })
    }

    /// What was measured, where a token touches `weight_bytes` and the threads read `memory` GB a second.
    fn report(
        &self,
        speeds: &Speeds,
        weight_bytes: u64,
        memory: Option<f64>,
        threads: usize,
    ) -> String {
        let &Speeds { prefill, decode, behind, ref seen } = speeds;
        // Only where the device read all of a token's weights itself.
        let gb_per_s = (seen.elsewhere == 0).then(|| decode * weight_bytes as f64 / 1e9);
        let cpu = outrigger::cpu_features();
        if self.json {
            return json!({
                "prefill_tok_s": prefill,
                "decode_tok_s": decode,
                "depth": self.depth,
                "decode_at_depth_tok_s": behind.map(|(_, speed)| speed),
                "weight_bytes_per_token": weight_bytes,
                "gb_per_s": gb_per_s,
                "coverage": seen.coverage(),
                "fault": seen.fault,
                "memory_gb_per_s": memory,
                "threads": threads,
                "cpu": cpu,
            })
            .to_string();
        }
        let (prompt, predict) = (self.prompt, self.predict);
        let prefill = prefill.map(|speed| format!("prefill {speed:.1} tok/s ({prompt} tokens), "));
        let behind = behind.map(|(depth, speed)| {
            let (times, than) = (decode / speed, prompt.max(1));
            format!("decode {speed:.1} tok/s behind {depth} tokens, {times:.2} x the time of behind {than}\n")
        });
        let memory = memory.map(|gb_per_s| format!(" of the {gb_per_s:.1} that the memory gives"));
        let read = gb_per_s.map_or(", of which not all were read here".to_owned(), |gb_per_s| {
            format!(": {gb_per_s:.1} GB/s{}", memory.unwrap_or_default())
        });
        format!(
            "{}{}decode {decode:.1} tok/s ({predict} tokens), {threads} threads, {cpu}\n\
             {}{} of weights a token{read}",
            seen.warning(),
            prefill.unwrap_or_default(),
            behind.unwrap_or_default(),
            size(weight_bytes),
        )
    }
}

/// A session of `len` tokens, and how many a second it took in.
async fn prefill(engine: &Arc<Engine>, len: usize, seen: &mut Seen) -> Result<(Session, f64)> {
    let mut session = engine.session(SamplerConfig::greedy())?;
    let vocab = engine.spec().n_vocab;
    session.push(&(0..len).map(|i| token(i, vocab)).collect::<Vec<_>>())?;
    let seconds = timed(&mut session, seen).await?;
    Ok((session, len as f64 / seconds))
}

/// How many of `count` tokens a second come behind those of `session`, which forgets them again.
async fn decode(
    engine: &Engine,
    session: &mut Session,
    count: usize,
    seen: &mut Seen,
) -> Result<f64> {
    let (len, vocab) = (session.len(), engine.spec().n_vocab);
    let mut seconds = 0.0;
    for i in len..len + count {
        session.push(&[token(i, vocab)])?;
        seconds += timed(session, seen).await?;
    }
    session.truncate(len);
    Ok(count as f64 / seconds.max(1e-9))
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

async fn timed(session: &mut Session, seen: &mut Seen) -> Result<f64> {
    let started = Instant::now();
    let pass = session.advance().await?;
    let seconds = started.elapsed().as_secs_f64();
    seen.add(pass);
    Ok(seconds)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
