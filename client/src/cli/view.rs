//! What people see: marked text, notes, progress, tables. All of it plain where the output is no terminal.

use std::fmt::{self, Display};
use std::io::{IsTerminal, Result, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use outrigger::{Tally, Token};
use outrigger_experts::LayerStats;
use serde_json::{Value, json};

/// Text as it streams, with what is provisional visibly marked: yellow and underlined on a terminal, in `[~ ~]`
/// elsewhere. Dropping it leaves no mark and no line open.
pub(crate) struct MarkedText {
    terminal: bool,
    styled: bool,
    marking: bool,
    /// Whether something stands on the line.
    open: bool,
}

impl MarkedText {
    pub(crate) fn new() -> MarkedText {
        let terminal = std::io::stdout().is_terminal();
        MarkedText { terminal, styled: terminal && styled(), marking: false, open: false }
    }

    /// Prints what the tokens continue.
    pub(crate) fn prompt(&mut self, text: &str) -> Result<()> {
        self.put(text)
    }

    /// Prints a token's text at once.
    pub(crate) fn print(&mut self, token: &Token) -> Result<()> {
        if token.text.is_empty() {
            return Ok(());
        }
        self.mark(token.provisional)?;
        self.put(&token.text)
    }

    /// Closes an open mark and ends the line.
    pub(crate) fn end(&mut self) -> Result<()> {
        self.open = false;
        self.mark(false)?;
        put("\n")
    }

    /// Nobody's text commands the terminal.
    fn put(&mut self, text: &str) -> Result<()> {
        self.open = true;
        match self.terminal {
            true => put(&text.replace(is_command, "")),
            false => put(text),
        }
    }

    /// Changes between marked and plain.
    fn mark(&mut self, provisional: bool) -> Result<()> {
        if provisional == self.marking {
            return Ok(());
        }
        self.marking = provisional;
        put(match (self.styled, provisional) {
            (true, true) => "\x1b[33;4m",
            (true, false) => "\x1b[0m",
            (false, true) => "[~",
            (false, false) => "~]",
        })
    }
}

impl Drop for MarkedText {
    fn drop(&mut self) {
        if self.open {
            // Whatever went wrong is reported already.
            let _ = self.end();
        }
    }
}

/// Whether a terminal may be sent escape sequences: see <https://no-color.org>.
pub(crate) fn styled() -> bool {
    let set = |name| std::env::var_os(name).unwrap_or_default();
    set("NO_COLOR").is_empty() && set("TERM") != "dumb"
}

/// Whether a terminal would do something at this character.
fn is_command(c: char) -> bool {
    c.is_control() && !matches!(c, '\n' | '\t')
}

/// Text of unknown origin with control characters written out.
pub(crate) fn printable(text: &str) -> String {
    let mut printable = String::new();
    for c in text.chars() {
        match is_command(c) {
            true => printable.extend(c.escape_default()),
            false => printable.push(c),
        }
    }
    printable
}

/// Prints a line to standard error. If that fails there is nobody to tell: unlike `eprintln!`, it does not panic.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(std::io::stderr(), "{}", printable(&text.to_string()));
}

/// Prints without a line break, at once.
///
/// # Errors
/// The reader is gone, or the disk is full: unlike `print!`, which panics, so that the command can end in good order.
pub(crate) fn put(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Prints a line, at once.
///
/// # Errors
/// As [`put`].
pub(crate) fn line(text: impl Display) -> Result<()> {
    put(&format!("{text}\n"))
}

/// A spinner on standard error; invisible where that is no terminal.
pub(crate) fn spinner(message: &'static str) -> ProgressBar {
    let spinner = shown(ProgressBar::new_spinner()).with_message(message);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// A bar on standard error; invisible where that is no terminal.
pub(crate) fn bar(total: u64, unit: &str) -> ProgressBar {
    let template = match unit {
        "bytes" => "{wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
        _ => "{msg} {wide_bar} {pos}/{len} {per_second} {eta}",
    };
    let style = ProgressStyle::with_template(template).expect("the template is well formed");
    let style = style.with_key("per_second", |state: &ProgressState, out: &mut dyn fmt::Write| {
        // A terminal that takes nothing is nobody's loss.
        let _ = write!(out, "{:.1}/s", state.per_sec());
    });
    shown(ProgressBar::new(total)).with_style(style)
}

fn shown(progress: ProgressBar) -> ProgressBar {
    if !styled() {
        progress.set_draw_target(ProgressDrawTarget::hidden());
    }
    progress
}

/// Totals over some tokens.
#[derive(Clone, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) tokens: u64,
    pub(crate) elapsed: Duration,
    pub(crate) slowest: Duration,
    pub(crate) tally: Tally,
    /// Why experts were missing, the last time that any were.
    pub(crate) fault: Option<String>,
    coverage: f64,
}

impl Totals {
    pub(crate) fn add(&mut self, token: &Token) {
        self.tokens += 1;
        self.elapsed += token.elapsed;
        self.slowest = self.slowest.max(token.elapsed);
        self.tally += token.tally;
        self.coverage += f64::from(token.coverage);
        if token.fault.is_some() {
            self.fault.clone_from(&token.fault);
        }
    }

    pub(crate) fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    pub(crate) fn mean_coverage(&self) -> f64 {
        if self.tokens == 0 { 1.0 } else { self.coverage / self.tokens as f64 }
    }

    /// Shares of routed expert calls that ran locally, remotely, by approximation and not at all, in per cent.
    pub(crate) fn shares(&self) -> [f64; 4] {
        let Tally { local, remote, missing, standin, .. } = self.tally;
        let all = (local + remote + missing).max(1) as f64;
        [local, remote, standin, missing - standin].map(|calls| 100.0 * calls as f64 / all)
    }
}

/// What an expert cache did, for machines.
pub(crate) fn cache_json(stats: &LayerStats) -> Value {
    json!({
        "hits": stats.hits,
        "misses": stats.misses,
        "evictions": stats.evictions,
        "bytes_read": stats.bytes_read,
    })
}

/// A size as people write it.
pub(crate) fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// A table with a header, columns padded to their widest cell; the first column to the left, the others to the right.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |c: usize| rows.iter().filter_map(|row| row.get(c)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|c| width(c).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(c, (cell, &width))| match c {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}
