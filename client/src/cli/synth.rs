//! `outrigger synth`: a random-weight model at real dimensions, to measure without downloading.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use outrigger::GgmlType;
use outrigger::synth::{self, Shape};

use super::view::{bar, note, size};

/// Write a random-weight model at real dimensions.
#[derive(Debug, Args)]
pub(crate) struct Synth {
    /// Whose dimensions: olmoe-1b-7b, qwen3-30b-a3b, mixtral-8x7b or tiny
    #[arg(long, value_name = "MODEL")]
    like: Shape,
    /// Weight type: q4_k, q5_k, q6_k, q8_0, q4_0, f16, bf16 or f32
    #[arg(long = "type", value_name = "TYPE", default_value = "q4_k")]
    ty: GgmlType,
    /// Seed of the weights
    #[arg(short, long, default_value_t = 0)]
    seed: u64,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

impl Synth {
    pub(crate) fn run(self) -> Result<()> {
        let progress = bar(0, "bytes");
        synth::write(self.like, self.ty, &self.output, self.seed, |done, total| {
            progress.set_length(total);
            progress.set_position(done);
        })
        .with_context(|| format!("cannot write {}", self.output.display()))?;
        progress.finish_and_clear();
        let written = std::fs::metadata(&self.output)?.len();
        note(format!("{}: {}", self.output.display(), size(written)));
        Ok(())
    }
}
