//! `outrigger simulate`: a bad day for the network, in virtual time.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use outrigger::simulate::{self, Scenario, Summary, Sweep};
use serde_json::json;

use super::args::from_env;
use super::view::{bar, line, printable, size, table};

/// Simulate a device on a bad network: links, cuts and servers as a scenario says, in virtual time
#[derive(Debug, Args)]
pub(crate) struct Simulate {
    /// The scenario (TOML); docs/simulator.md describes it
    scenario: PathBuf,
    /// Model file instead of the scenario's
    #[arg(short, long, env = "OUTRIGGER_MODEL", value_name = "FILE")]
    model: Option<PathBuf>,
    /// Seed of jitter, loss and sampling instead of the scenario's
    #[arg(short, long)]
    seed: Option<u64>,
    /// Directory for the tables and plots
    #[arg(short, long, value_name = "DIR", default_value = "simulation")]
    out: PathBuf,
    /// Run the scenario's text offline at each of these shares of experts, for each policy, instead
    #[arg(long, value_name = "cache=PCT,PCT")]
    sweep: Option<Sweep>,
    /// The last line is a JSON object
    #[arg(long)]
    json: bool,
}

impl Simulate {
    pub(crate) fn run(self) -> Result<()> {
        let mut scenario = Scenario::read(&self.scenario)?;
        if let Some(model) = &self.model {
            scenario.model.clone_from(model);
        }
        scenario.seed = self.seed.unwrap_or(scenario.seed);
        simulate::prepare(&self.out)?;
        match &self.sweep {
            None => self.run_once(&scenario),
            Some(sweep) => self.run_sweep(&scenario, sweep),
        }
    }

    fn run_once(&self, scenario: &Scenario) -> Result<()> {
        let length = scenario.length.0;
        let progress = bar(length.as_millis() as u64, "simulated ms");
        let run = simulate::run(scenario, |row| {
            progress.set_position(row.ready.min(length).as_millis() as u64);
            progress.set_message(printable(&row.link));
        })
        .with_context(|| self.subject())?;
        progress.finish_and_clear();
        run.write(&self.out)?;
        let summary = run.summary();
        match self.json {
            true => line(json!(summary))?,
            false => line(printable(&self.text(&summary)))?,
        }
        Ok(())
    }

    /// What an error is about: the scenario, and who replaced its model.
    fn subject(&self) -> String {
        let scenario = self.scenario.display();
        match (&self.model, from_env("OUTRIGGER_MODEL")) {
            (None, _) => scenario.to_string(),
            (Some(model), Some(variable)) if *model == Path::new(&variable) => {
                format!("{scenario} with the model of OUTRIGGER_MODEL")
            }
            (Some(_), _) => format!("{scenario} with the model of --model"),
        }
    }

    fn text(&self, summary: &Summary) -> String {
        let Summary { title, model, tokens, seconds, provisional, unsettled, tally, .. } = summary;
        let quality = match summary.ppl.zip(summary.ppl_ratio) {
            Some((ppl, ratio)) => format!("perplexity {ppl:.3}, {ratio:.3} times the full model's"),
            None => format!(
                "acceptance by the full model {:.3}, KL divergence from it {:.3}",
                summary.acceptance, summary.kl
            ),
        };
        format!(
            "{title}, {model}: {tokens} tokens in {seconds:.1} simulated s; {provisional} provisional when said, \
             {unsettled} at the end\n\
             {quality}; coverage {:.3}; longest wait {:.0} ms; {} up, {} down\n\
             {}: tokens.csv, summary.json, timeline.svg, timeline.png",
            summary.coverage,
            summary.longest_wait_ms,
            size(tally.bytes_up),
            size(tally.bytes_down),
            self.out.display(),
        )
    }

    fn run_sweep(&self, scenario: &Scenario, sweep: &Sweep) -> Result<()> {
        let progress = bar(sweep.points() as u64, "points");
        let points = simulate::sweep(scenario, sweep, |point| {
            progress.inc(1);
            progress.set_message(point.policy.to_string());
        })
        .with_context(|| self.subject())?;
        progress.finish_and_clear();
        simulate::write_sweep(scenario, &points, &self.out)?;
        let model = scenario.model.display().to_string();
        if self.json {
            return Ok(line(json!({ "model": model, "points": points }))?);
        }
        let header = ["policy", "resident", "ppl ratio", "acceptance", "KL", "coverage"];
        let mut rows = vec![header.map(String::from).to_vec()];
        rows.extend(points.iter().map(|point| {
            vec![
                point.policy.to_string(),
                format!("{:.0} %", 100.0 * point.cache),
                format!("{:.3}", point.ppl_ratio),
                format!("{:.3}", point.acceptance),
                format!("{:.3}", point.kl),
                format!("{:.3}", point.coverage),
            ]
        }));
        let (title, table, out) = (&scenario.title, table(&rows), self.out.display());
        let text = format!("{title}, {model}\n{table}{out}: sweep.csv, sweep.svg, sweep.png");
        Ok(line(printable(&text))?)
    }
}
