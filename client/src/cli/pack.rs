//! `outrigger pack`: what a device installs.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use outrigger::pack::{Choice, PackConfig, Packed, Stage, pack};
use outrigger::{Budget, Model};
use serde_json::json;

use super::args::ModelArgs;
use super::view::{bar, line, note, size};

/// Prose, tales, program code and the Romance languages: what experts are fitted to unless the user knows better.
const CALIBRATION: &str = include_str!("calibration.txt");
/// Tokens of it.
const TOKENS: usize = 32_768;

/// Make what a device installs: the trunk, and every expert as well as the budget allows.
#[derive(Debug, Args)]
pub(crate) struct Pack {
    #[command(flatten)]
    model: ModelArgs,
    /// Bytes for the experts: a share of what they take in the full model (35%) or a size (6GiB)
    #[arg(short, long, value_name = "SIZE|PCT")]
    budget: Budget,
    /// Text like what the device will see; may be given several times [default: a mixture of prose, code and languages]
    #[arg(long, value_name = "FILE")]
    calibrate: Vec<PathBuf>,
    /// Tokens of it to fit experts to
    #[arg(long, value_name = "N", default_value_t = TOKENS)]
    calibration_tokens: usize,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// The last line is a JSON object
    #[arg(long)]
    json: bool,
}

impl Pack {
    pub(crate) async fn run(self) -> Result<()> {
        let mut config = config(&self.model.model, &self.output, self.budget);
        if !self.calibrate.is_empty() {
            let read = |path: &PathBuf| {
                std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read {}", path.display()))
            };
            config.calibration = self.calibrate.iter().map(read).collect::<Result<_>>()?;
        }
        config.tokens = self.calibration_tokens;
        if let Some(threads) = self.model.compute.threads {
            config.threads = threads.into();
        }
        let packed = with_progress(&config).await?;
        let file = std::fs::metadata(&self.output)?.len();
        match self.json {
            true => line(json(&packed, file))?,
            false => line(text(&packed, file, &self.output))?,
        }
        Ok(())
    }
}

/// The pack of `model` with this budget that stands in for experts outside the cache: made once, then kept in the
/// user's cache directory.
pub(crate) async fn cached(model: &Path, budget: Budget) -> Result<PathBuf> {
    let fingerprint = Model::open(model)?.gguf.fingerprint().to_string();
    let name = format!("{}-{budget}.gguf", &fingerprint[..16]).replace(' ', "");
    let path = cache_dir()?.join(name);
    if !path.exists() {
        note(format!("fitting stand-ins of {budget} once, to {}", path.display()));
        with_progress(&config(model, &path, budget)).await?;
    }
    Ok(path)
}

fn config(model: &Path, out: &Path, budget: Budget) -> PackConfig {
    PackConfig {
        model: model.to_owned(),
        out: out.to_owned(),
        budget,
        calibration: vec![CALIBRATION.to_owned()],
        tokens: TOKENS,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
    }
}

/// `$XDG_CACHE_HOME/outrigger`, or the same under the home directory's `.cache`.
fn cache_dir() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let Some(base) = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache"))) else {
        bail!(
            "neither XDG_CACHE_HOME nor HOME says where to keep stand-ins: give --standins a pack's file"
        );
    };
    let dir = base.join("outrigger");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

async fn with_progress(config: &PackConfig) -> Result<Packed> {
    let mut shown = None;
    let packed = pack(config, |stage, done, total| {
        let (_, progress) = match shown.take() {
            Some((at, progress)) if at == stage => shown.insert((at, progress)),
            _ => shown.insert((stage, stage_bar(stage, total))),
        };
        progress.set_position(done);
    })
    .await;
    if let Some((_, progress)) = shown {
        progress.finish_and_clear();
    }
    packed.with_context(|| format!("cannot pack {}", config.model.display()))
}

fn stage_bar(stage: Stage, total: u64) -> indicatif::ProgressBar {
    let (unit, message) = match stage {
        Stage::Measure => ("experts", "measuring"),
        Stage::Code => ("experts", "coding"),
        Stage::Write => ("bytes", ""),
    };
    bar(total, unit).with_message(message)
}

fn text(packed: &Packed, file: u64, path: &Path) -> String {
    let choices = packed.choices.iter().flatten();
    let exact = choices.clone().filter(|choice| choice.is_exact()).count();
    let mean = choices.filter(|choice| **choice == Choice::Mean).count();
    let all = packed.choices.iter().map(Vec::len).sum::<usize>();
    format!(
        "{}: {}, experts {} of {} ({:.1} %)\n\
         of {all} experts {exact} exact, {} coded, {mean} as their mean output; fitted to {} tokens",
        path.display(),
        size(file),
        size(packed.expert_bytes),
        size(packed.full_expert_bytes),
        100.0 * packed.expert_bytes as f64 / packed.full_expert_bytes as f64,
        all - exact - mean,
        packed.tokens,
    )
}

fn json(packed: &Packed, file: u64) -> serde_json::Value {
    json!({
        "file_bytes": file,
        "expert_bytes": packed.expert_bytes,
        "full_expert_bytes": packed.full_expert_bytes,
        "share": packed.expert_bytes as f64 / packed.full_expert_bytes as f64,
        "tokens": packed.tokens,
        "choices": packed.choices,
    })
}
