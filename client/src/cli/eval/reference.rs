//! The full model beside the device: all experts at home, over the same tokens.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use outrigger::{Engine, EngineConfig, Model, SamplerConfig, Session};
use outrigger_experts::pack_names;

/// Rows that the full model computes in one pass, and that are held at a time: a row has the same bits in any batch.
const ROWS: usize = 32;

/// The full model.
pub(super) struct Reference(Arc<Engine>);

impl Reference {
    /// Opens the full model with all of its experts resident, for comparing `device` with it.
    ///
    /// # Errors
    /// An unreadable file.
    pub(super) async fn open(path: &Path, device: &Engine, threads: usize) -> Result<Reference> {
        let mut config = EngineConfig::new(path);
        config.threads = threads;
        config.context = Some(device.context());
        let full = Engine::open(config).await.context("cannot open the full model")?;
        Ok(Reference(full))
    }

    /// The full model over one window.
    pub(super) fn window<'a>(&self, tokens: &'a [u32]) -> Result<FullWindow<'a>> {
        Ok(FullWindow {
            tokens,
            session: self.0.session(SamplerConfig::greedy())?,
            vocab: self.0.spec().n_vocab,
            held: 0..0,
            logits: Vec::new(),
        })
    }
}

/// Refuses a `full` file that is another model than the device's, or was itself made from a full model: that has its
/// fingerprint, but not its experts.
pub(super) fn check_full(full: &Path, device: &Path) -> Result<()> {
    let model = Model::open(full).context("cannot open the full model")?;
    let made_from_another = model.gguf.meta().get(pack_names::FINGERPRINT).is_some();
    ensure!(
        !made_from_another,
        "{}: found a pack, expected the full model that it was made from; \
         give that with --against-full FULL.gguf",
        full.display()
    );
    let found = model.gguf.fingerprint();
    let expected = Model::open(device).context("cannot open the model")?.gguf.fingerprint();
    ensure!(
        found == expected,
        "{} is not the full model of {}: its fingerprint is {found}, expected {expected}",
        full.display(),
        device.display(),
    );
    Ok(())
}

/// One window, a few rows of logits at a time.
pub(super) struct FullWindow<'a> {
    tokens: &'a [u32],
    session: Session,
    vocab: usize,
    /// Rows whose logits are held.
    held: Range<usize>,
    /// `[held, vocab]`.
    logits: Vec<f32>,
}

impl FullWindow<'_> {
    /// The logits after token `row` of the window. Rows must be asked for in ascending order.
    pub(super) async fn logits(&mut self, row: usize) -> Result<&[f32]> {
        if row >= self.held.end {
            self.compute(row).await?;
        }
        Ok(&self.logits[(row - self.held.start) * self.vocab..][..self.vocab])
    }

    async fn compute(&mut self, row: usize) -> Result<()> {
        if row > self.held.end {
            // Nobody asked for these rows: only their keys and values are needed.
            self.session.push(&self.tokens[self.held.end..row])?;
            self.session.advance().await?;
        }
        self.held = row..self.tokens.len().min(row + ROWS);
        self.session.push(&self.tokens[self.held.clone()])?;
        self.logits.clear();
        let logits = &mut self.logits;
        self.session.advance_all(|batch| logits.extend_from_slice(batch)).await?;
        Ok(())
    }
}
