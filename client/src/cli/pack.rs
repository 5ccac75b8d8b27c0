//! `outrigger pack`: what a device installs.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use outrigger::pack::{Choice, PackConfig, Packed, Stage, pack};
use outrigger::{Budget, Model};
use serde_json::json;

use super::args::{ThreadsArg, read};
use super::view::{bar, line, note, size};

/// Prose, tales, program code and the Romance languages: what experts are fitted to unless the user knows better.
const CALIBRATION: &str = include_str!("calibration.txt");
/// Tokens of it.
const TOKENS: u32 = 32_768;

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
        tokens: TOKENS as usize,
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
