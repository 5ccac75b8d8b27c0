//! What a simulation leaves: a row a token, and a summary.

use std::time::Duration;

use serde::Serialize;

use super::scenario::{Input, Scenario};
use crate::pass::Tally;
use crate::prediction::Distance;

/// One token.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its place, from 0.
    pub place: usize,
    /// Its id.
    pub token: u32,
    /// When it was asked for, in simulated time.
    pub asked: Duration,
    /// How long the device waited for the server.
    pub waited: Duration,
    /// When it was there: asked, waited and computed.
    pub ready: Duration,
    /// The link's name when it was asked for.
    pub link: String,
    /// Rows of the pass: the new one, a prompt's, and those that were healed.
    pub rows: u32,
    /// Tokens before it, all of them computed.
    pub computed: usize,
    /// Those of them that are settled.
    pub settled: usize,
    /// Whether anything that it rests on is not settled.
    pub provisional: bool,
    /// Arrived over routed weight of the row that it was predicted from.
    pub coverage: f32,
    /// Share of that row's routed weight that approximations stood in for.
    pub standin: f32,
    /// Calls and bytes of the pass.
    pub tally: Tally,
    /// What the device thought of it, -log probability in nats.
    pub nll: f64,
    /// What the full model thought of it after the same text.
    pub nll_full: f64,
    /// How far the device's prediction was from the full model's.
    pub distance: Distance,
}

/// What happened in a scenario.
#[derive(Clone, Debug)]
pub struct Run {
    /// The scenario.
    pub scenario: Scenario,
    /// Every token, in order.
    pub rows: Vec<Row>,
    /// What the device wrote, a prompt included.
    pub text: String,
    /// [`Session::divergence`](crate::Session::divergence) at the end.
    pub divergence: Option<usize>,
}

/// A run in a few figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The scenario's title.
    pub title: String,
    /// The model's file, whoever named it.
    pub model: String,
    /// The scenario's seed.
    pub seed: u64,
    /// Tokens.
    pub tokens: usize,
    /// Simulated seconds.
    pub seconds: f64,
    /// Longest wait of a token for the server, milliseconds.
    pub longest_wait_ms: f64,
    /// Tokens that were provisional when they were said.
    pub provisional: usize,
    /// Tokens that were not settled at the end.
    pub unsettled: usize,
    /// Mean coverage.
    pub coverage: f64,
    /// Mean share that approximations stood in for.
    pub standin: f64,
    /// Perplexity of the device; none where it wrote the text itself, which is what it finds likely.
    pub ppl: Option<f64>,
    /// Perplexity of the full model; none likewise.
    pub ppl_full: Option<f64>,
    /// The first over the second; none likewise.
    pub ppl_ratio: Option<f64>,
    /// Mean KL divergence from the full model, nats.
    pub kl: f64,
    /// Share of the tokens at which both find the same token likeliest.
    pub top1: f64,
    /// Mean expected acceptance.
    pub acceptance: f64,
    /// The first position at which the full model would have said something else, as far as rows were settled.
    pub divergence: Option<usize>,
    /// All calls and bytes.
    pub tally: Tally,
    /// What the device wrote, a prompt included.
    pub text: String,
}

/// The mean of a figure; 0 of nothing.
pub(super) fn mean(rows: &[Row], figure: impl Fn(&Row) -> f64) -> f64 {
    rows.iter().map(figure).sum::<f64>() / rows.len().max(1) as f64
}

impl Run {
    /// Whether the model wrote the text, rather than read it.
    pub(super) fn is_own_text(&self) -> bool {
        matches!(self.scenario.input, Input::Prompt(_))
    }

    /// The run in a few figures.
    pub fn summary(&self) -> Summary {
        let rows = &self.rows;
        let (nll, nll_full) = (mean(rows, |row| row.nll), mean(rows, |row| row.nll_full));
        let perplexity = |nll: f64| (!self.is_own_text()).then_some(nll.exp());
        let mut tally = Tally::default();
        rows.iter().for_each(|row| tally += row.tally);
        let longest = rows.iter().map(|row| row.waited).max().unwrap_or_default();
        Summary {
            title: self.scenario.title.clone(),
            model: self.scenario.model.display().to_string(),
            seed: self.scenario.seed,
            tokens: rows.len(),
            seconds: rows.last().map_or(0.0, |row| row.ready.as_secs_f64()),
            longest_wait_ms: longest.as_secs_f64() * 1e3,
            provisional: rows.iter().filter(|row| row.provisional).count(),
            unsettled: rows.last().map_or(0, |row| row.computed - row.settled),
            coverage: mean(rows, |row| f64::from(row.coverage)),
            standin: mean(rows, |row| f64::from(row.standin)),
            ppl: perplexity(nll),
            ppl_full: perplexity(nll_full),
            ppl_ratio: perplexity(nll - nll_full),
            kl: mean(rows, |row| row.distance.kl),
            top1: mean(rows, |row| f64::from(u8::from(row.distance.top1))),
            acceptance: mean(rows, |row| row.distance.acceptance),
            divergence: self.divergence,
            tally,
            text: self.text.clone(),
        }
    }

    /// A header and a line a token.
    pub fn csv(&self) -> String {
        let header = COLUMNS.map(|(name, _)| name.to_owned());
        let lines = self.rows.iter().map(|row| COLUMNS.map(|(_, cell)| cell(row)));
        let lines = std::iter::once(header).chain(lines);
        lines.map(|cells| cells.join(",") + "\n").collect()
    }
}

/// A column's name, and its cell in a row.
type Column = (&'static str, fn(&Row) -> String);

const COLUMNS: [Column; 23] = [
    ("place", |row| row.place.to_string()),
    ("token", |row| row.token.to_string()),
    ("asked_s", |row| seconds(row.asked)),
    ("waited_s", |row| seconds(row.waited)),
    ("ready_s", |row| seconds(row.ready)),
    ("link", |row| quoted(&row.link)),
    ("rows", |row| row.rows.to_string()),
    ("computed", |row| row.computed.to_string()),
    ("settled", |row| row.settled.to_string()),
    ("provisional", |row| u8::from(row.provisional).to_string()),
    ("coverage", |row| decimal(row.coverage.into())),
    ("standin_share", |row| decimal(row.standin.into())),
    ("local", |row| row.tally.local.to_string()),
    ("remote", |row| row.tally.remote.to_string()),
    ("missing", |row| row.tally.missing.to_string()),
    ("standin", |row| row.tally.standin.to_string()),
    ("substituted", |row| row.tally.substituted.to_string()),
    ("bytes_up", |row| row.tally.bytes_up.to_string()),
    ("bytes_down", |row| row.tally.bytes_down.to_string()),
    ("nll", |row| decimal(row.nll)),
    ("nll_full", |row| decimal(row.nll_full)),
    ("kl", |row| decimal(row.distance.kl)),
    ("acceptance", |row| decimal(row.distance.acceptance)),
];

/// A text as a cell, after RFC 4180.
fn quoted(text: &str) -> String {
    match text.contains([',', '"', '\r', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.4}", time.as_secs_f64())
}

fn decimal(value: f64) -> String {
    format!("{value:.6}")
}
