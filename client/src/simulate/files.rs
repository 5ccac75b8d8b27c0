//! The files that hold what a simulation leaves.

use std::path::Path;

use super::report::Run;
use super::scenario::Scenario;
use super::sweep::Point;
use super::{Error, Result, draw};

/// Makes a directory for what is to be written, and sees that it takes files: before a simulation rather than after it.
///
/// # Errors
/// A directory that cannot be made or written to.
pub fn prepare(directory: &Path) -> Result<()> {
    let probe = directory.join(format!(".outrigger-{}", std::process::id()));
    std::fs::create_dir_all(directory)
        .and_then(|()| std::fs::File::create_new(&probe))
        .and_then(|_| std::fs::remove_file(&probe))
        .map_err(|source| Error::Write { path: directory.to_owned(), source })
}

impl Run {
    /// Writes `tokens.csv`, `summary.json`, `timeline.svg` and `timeline.png`.
    ///
    /// # Errors
    /// A directory or file that cannot be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let summary = serde_json::to_string_pretty(&self.summary()).expect("plain values") + "\n";
        let figure = draw::timeline(self);
        write(directory, "tokens.csv", self.csv().as_bytes())?;
        write(directory, "summary.json", summary.as_bytes())?;
        write(directory, "timeline.svg", figure.svg().as_bytes())?;
        write(directory, "timeline.png", &figure.png()?)
    }
}

/// Writes `sweep.csv`, `sweep.svg` and `sweep.png`.
///
/// # Errors
/// A directory or file that cannot be written.
pub fn write_sweep(scenario: &Scenario, points: &[Point], directory: &Path) -> Result<()> {
    let mut csv = "policy,cache,tokens,ppl_ratio,kl,acceptance,coverage\n".to_owned();
    for Point { policy, cache, tokens, ppl_ratio, kl, acceptance, coverage } in points {
        csv += &format!(
            "{policy},{cache},{tokens},{ppl_ratio:.6},{kl:.6},{acceptance:.6},{coverage:.6}\n"
        );
    }
    let figure = draw::sweep(&scenario.title, points);
    write(directory, "sweep.csv", csv.as_bytes())?;
    write(directory, "sweep.svg", figure.svg().as_bytes())?;
    write(directory, "sweep.png", &figure.png()?)
}

/// Writes a file, and the directories above it where there are none.
fn write(directory: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = directory.join(name);
    std::fs::create_dir_all(directory)
        .and_then(|()| std::fs::write(&path, bytes))
        .map_err(|source| Error::Write { path, source })
}
