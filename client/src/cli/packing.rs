//! Making packs: for `outrigger pack`, and those that are kept as stand-ins.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use outrigger::pack::{PackConfig, Packed, Stage, pack};
use outrigger::{Budget, Model};

use super::view::{bar, note};

/// Prose, tales, program code and the Romance languages: what experts are fitted to unless the user knows better.
const CALIBRATION: &str = include_str!("calibration.txt");
/// Tokens of it.
pub(crate) const TOKENS: u32 = 32_768;

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

/// With the usual calibration, on every core.
pub(crate) fn config(model: &Path, out: &Path, budget: Budget) -> PackConfig {
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

/// Makes a pack, and shows how far it is.
pub(crate) async fn with_progress(config: &PackConfig) -> Result<Packed> {
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
