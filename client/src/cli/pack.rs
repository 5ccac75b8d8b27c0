//! `outrigger pack`: what a device installs.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use outrigger::Budget;
use outrigger::pack::{Choice, Packed};
use serde_json::json;

use super::args::{ThreadsArg, read};
use super::packing::{TOKENS, config, with_progress};
use super::view::{line, size};

/// Make what a device installs: the trunk, and every expert as well as the budget allows.
#[derive(Debug, Args)]
pub(crate) struct Pack {
    /// The full model's file (GGUF), or the first of its shards
    #[arg(short, long, env = "OUTRIGGER_MODEL", value_name = "FILE")]
    model: PathBuf,
    #[command(flatten)]
    threads: ThreadsArg,
    /// Bytes for the experts: a share of what they take in the full model (35%) or a size (6GiB)
    #[arg(short, long, value_name = "SIZE|PCT")]
    budget: Budget,
    /// Text like what the device will see; may be given several times [default: a mixture of prose, code and languages]
    #[arg(long, value_name = "FILE")]
    calibrate: Vec<PathBuf>,
    /// Tokens of it to fit experts to, in windows of 512
    #[arg(long, value_name = "N", default_value_t = TOKENS, value_parser = clap::value_parser!(u32).range(512..))]
    calibration_tokens: u32,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// The last line is a JSON object
    #[arg(long)]
    json: bool,
}

impl Pack {
    pub(crate) async fn run(self) -> Result<()> {
        let mut config = config(&self.model, &self.output, self.budget);
        if !self.calibrate.is_empty() {
            let texts = self.calibrate.iter().map(|path| read(path));
            config.calibration = texts.collect::<Result<_>>()?;
        }
        config.tokens = self.calibration_tokens as usize;
        self.threads.apply(&mut config.threads);
        let packed = with_progress(&config).await?;
        let file = std::fs::metadata(&self.output)?.len();
        match self.json {
            true => line(json(&packed, file))?,
            false => line(text(&packed, file, &self.output))?,
        }
        Ok(())
    }
}

/// Experts by what they became: exact, coded, and their mean output.
fn counts(packed: &Packed) -> [usize; 3] {
    let choices = packed.choices.iter().flatten();
    let exact = choices.clone().filter(|choice| choice.is_exact()).count();
    let mean = choices.clone().filter(|choice| **choice == Choice::Mean).count();
    [exact, choices.count() - exact - mean, mean]
}

fn text(packed: &Packed, file: u64, path: &Path) -> String {
    let [exact, coded, mean] = counts(packed);
    let unused = match packed.unused {
        0 => String::new(),
        n => format!(
            "\n{n} experts are never used by that text: fit to one that is like what the device will see"
        ),
    };
    format!(
        "{}: {}, experts {} of {} ({:.1} %)\n\
         of {} experts {exact} exact, {coded} coded, {mean} as their mean output; fitted to {} tokens{unused}",
        path.display(),
        size(file),
        size(packed.expert_bytes),
        size(packed.full_expert_bytes),
        100.0 * packed.expert_bytes as f64 / packed.full_expert_bytes as f64,
        exact + coded + mean,
        packed.tokens,
    )
}

fn json(packed: &Packed, file: u64) -> serde_json::Value {
    let [exact, coded, mean] = counts(packed);
    json!({
        "file_bytes": file,
        "expert_bytes": packed.expert_bytes,
        "full_expert_bytes": packed.full_expert_bytes,
        "share": packed.expert_bytes as f64 / packed.full_expert_bytes as f64,
        "exact": exact,
        "coded": coded,
        "mean": mean,
        "unused": packed.unused,
        "tokens": packed.tokens,
        "choices": packed.choices,
    })
}
