//! Packs: what a device installs. The trunk of a full model, and each of its experts in the representation that buys
//! the most quality for its bytes, fitted to a calibration text.
//!
//! The text goes through the model layer by layer, twice: once to measure what approximating each expert costs, once
//! to code each as it was chosen. Memory holds the text's rows and one expert; the experts come from the mapped file.

mod allocate;
mod file;
mod summary;
mod walk;
mod work;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use outrigger_experts::gguf::check_output;
use outrigger_experts::vq::{Fit, LayerMoments};
use outrigger_experts::{ExpertTensors, GgmlType};

use crate::config::{Budget, EngineConfig};
use crate::engine::Engine;
use crate::error::{Error, Result};
use allocate::{Costs, Curve, allocate};
use walk::{Seen, Walk};
use work::Work;

pub use allocate::Choice;
pub use summary::{LayerSummary, Summary};

/// Tokens of a calibration window: each begins with an empty history.
const WINDOW: usize = 512;
/// Weights a code of the two codes that are measured; the others follow.
const MEASURED: [u8; 2] = [3, 12];

/// How a pack is made.
#[derive(Clone, Debug)]
pub struct PackConfig {
    /// The full model.
    pub model: PathBuf,
    /// Where the pack goes.
    pub out: PathBuf,
    /// Bytes for the experts, or a share of what they take in the full model.
    pub budget: Budget,
    /// Texts that are like what the device will see.
    pub calibration: Vec<String>,
    /// Tokens of them to use.
    pub tokens: usize,
    /// Threads that compute.
    pub threads: usize,
}

/// What packing is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Measures what approximations cost; counts experts.
    Measure,
    /// Codes experts; counts them.
    Code,
    /// Writes the file; counts bytes.
    Write,
}

/// What a pack became.
#[derive(Clone, Debug)]
pub struct Packed {
    /// By layer and expert.
    pub choices: Vec<Vec<Choice>>,
    /// The bytes of the experts.
    pub expert_bytes: u64,
    /// The bytes of the experts in the full model.
    pub full_expert_bytes: u64,
    /// Tokens that experts were fitted to.
    pub tokens: usize,
    /// Experts that these tokens never used: nothing says what approximating them costs.
    pub unused: usize,
}

/// Makes a pack. `progress` hears of the stage, how much of it is done, and how much there is. Interrupted, it goes on
/// where it was when it is called again with the same.
///
/// # Errors
/// A model that cannot be used or is a pack itself, a calibration text that is too short, a disk that refuses.
pub async fn pack(
    config: &PackConfig,
    mut progress: impl FnMut(Stage, u64, u64),
) -> Result<Packed> {
    let place = |path: &Path| path.canonicalize().ok();
    if place(&config.model).is_some_and(|model| place(&config.out) == Some(model)) {
        return Err(Error::Output(config.out.clone()));
    }
    check_output(&config.out)?;
    let mut engine_config = EngineConfig::new(&config.model);
    engine_config.threads = config.threads;
    let engine = Engine::open(engine_config).await?;
    if engine.model.is_pack() {
        return Err(Error::StandIns {
            path: config.model.clone(),
            found: "a pack".to_owned(),
            expected: "the full model".to_owned(),
        });
    }
    for width in [engine.spec().n_embd, engine.spec().n_ff] {
        if GgmlType::Vq(2).row_bytes(width).is_none() {
            return Err(Error::Width { found: width });
        }
    }
    let costs = costs(&engine);
    let full_expert_bytes = engine.sizes().experts;
    let budget = config.budget.bytes(full_expert_bytes)?;
    let least = costs.iter().map(|costs| costs.of(Choice::Mean)).sum::<u64>();
    let least = least * engine.spec().n_experts as u64;
    if budget < least {
        return Err(Error::PackBudget { found: budget, least });
    }
    let windows = windows(&engine, &config.calibration, config.tokens)?;
    let tokens = windows.iter().map(Vec::len).sum();
    let work = Work::open(&config.out, &(engine.fingerprint().as_bytes(), &windows))?;
    let packer = Packer { engine, windows, work };
    let curves = packer.measure(&mut progress).await?;
    let choices = allocate(&curves, &costs, budget);
    let errors = packer.code(&choices, &mut progress).await?;
    let about = file::About {
        budget: config.budget.to_string(),
        calibration: format!("{tokens} tokens"),
        choices: &choices,
        mass: curves.iter().flatten().map(|curve| curve.mass as f32).collect(),
        errors,
    };
    let unused = curves.iter().flatten().filter(|curve| curve.mass == 0.0).count();
    let bytes = |at: usize| packer.coded(at, packer.work.bytes(at, &choices[at]));
    file::write(&packer.engine.model, &config.out, &about, bytes, |done, total| {
        progress(Stage::Write, done, total);
    })?;
    packer.work.remove();
    let layers = choices.iter().zip(&costs);
    let bytes = layers.flat_map(|(choices, costs)| choices.iter().map(|choice| costs.of(*choice)));
    let expert_bytes = bytes.sum();
    Ok(Packed { choices, expert_bytes, full_expert_bytes, tokens, unused })
}

/// Windows from all over the texts, `tokens` in all.
fn windows(engine: &Engine, texts: &[String], tokens: usize) -> Result<Vec<Vec<u32>>> {
    let wanted = (tokens / WINDOW).max(1).div_ceil(texts.len().max(1));
    let mut windows = Vec::new();
    for text in texts {
        for part in 0..wanted {
            let start = boundary(text, text.len() * part / wanted);
            let end = text.len() * (part + 1) / wanted;
            // No tokenizer makes less than a tenth of a token of a byte.
            let end = boundary(text, end.min(start + 10 * WINDOW));
            let mut window = engine.tokenizer().encode(&text[start..end], true, true);
            window.truncate(WINDOW.min(engine.context()));
            windows.push(window);
        }
    }
    let found = windows.iter().map(Vec::len).sum();
    if found < WINDOW {
        return Err(Error::Calibration { found, expected: WINDOW });
    }
    Ok(windows)
}

/// The first character's start from byte `at` on.
fn boundary(text: &str, at: usize) -> usize {
    (at..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len())
}

/// By layer.
fn costs(engine: &Engine) -> Vec<Costs> {
    let (model, spec) = (&engine.model, engine.spec());
    let costs = model.experts.iter().map(|layer| Costs::new(layer.types(), spec.n_embd, spec.n_ff));
    costs.collect()
}

struct Packer {
    engine: Arc<Engine>,
    windows: Vec<Vec<u32>>,
    work: Work,
}

impl Packer {
    /// What each expert's approximations cost.
    async fn measure(&self, progress: &mut impl FnMut(Stage, u64, u64)) -> Result<Vec<Vec<Curve>>> {
        let n_layers = self.engine.spec().n_layers;
        let mut curves = self.work.curves();
        if curves.len() >= n_layers {
            return Ok(curves);
        }
        let mut walk = Walk::new(self.engine.clone(), &self.windows);
        for layer in 0..n_layers {
            let seen = walk.step().await?;
            if layer < curves.len() {
                continue;
            }
            let mut report = self.progress(Stage::Measure, layer, progress);
            let measured = self.for_each_expert(layer, &seen, |fit, mass| {
                report();
                curve(fit, seen.energy, mass)
            });
            self.work.put_curves(layer, &measured)?;
            curves.push(measured);
        }
        Ok(curves)
    }

    /// Codes every layer as chosen; returns each expert's error.
    async fn code(
        &self,
        choices: &[Vec<Choice>],
        progress: &mut impl FnMut(Stage, u64, u64),
    ) -> Result<Vec<f32>> {
        let done = |(at, choices): (usize, &Vec<Choice>)| self.work.errors(at, choices).is_some();
        let mut walk = None;
        if !choices.iter().enumerate().all(done) {
            walk = Some(Walk::new(self.engine.clone(), &self.windows));
        }
        let mut errors = Vec::new();
        for (layer, choices) in choices.iter().enumerate() {
            let seen = match &mut walk {
                Some(walk) => Some(walk.step().await?),
                None => None,
            };
            if let (Some(seen), None) = (seen, self.work.errors(layer, choices)) {
                let mut report = self.progress(Stage::Code, layer, progress);
                let mut experts = choices.iter().enumerate();
                let mut bytes = Vec::new();
                let errors = self.for_each_expert(layer, &seen, |fit, _| {
                    report();
                    let (e, choice) = experts.next().expect("a choice for every expert");
                    let exact = self.engine.model.experts[layer].expert(e);
                    let error = code(fit, *choice, &exact, &mut bytes);
                    (error / fit.energy().max(f64::MIN_POSITIVE)) as f32
                });
                self.work.put_layer(layer, choices, &errors, &bytes)?;
            }
            errors.extend(self.coded(layer, self.work.errors(layer, choices))?);
        }
        Ok(errors)
    }

    /// What is kept of a layer that was coded.
    fn coded<T>(&self, layer: usize, kept: Option<T>) -> Result<T> {
        kept.ok_or(Error::Interrupted { layer })
    }

    /// Fits every expert of a layer to what it sees; `look` is also told its share of the layer's routed weight.
    fn for_each_expert<T>(
        &self,
        layer: usize,
        seen: &Seen,
        mut look: impl FnMut(&Fit<'_>, f64) -> T,
    ) -> Vec<T> {
        let (pool, width) = (&self.engine.pool, self.engine.spec().n_embd);
        let moments = LayerMoments::new(pool, &seen.x, width);
        let weight = |calls: &Vec<(u32, f32)>| calls.iter().map(|c| f64::from(c.1)).sum::<f64>();
        let total: f64 = seen.calls.iter().map(weight).sum();
        let fit = |e: usize| {
            let expert = self.engine.model.experts[layer].expert(e);
            let (x, weights) = seen.of(e, width);
            let matrices = [&expert.gate_proj, &expert.up_proj, &expert.down_proj];
            let fit = Fit::new(pool, matrices.map(|t| t.mat()), &moments, &x, &weights);
            look(&fit, weight(&seen.calls[e]) / total)
        };
        (0..seen.calls.len()).map(fit).collect()
    }

    /// Counts experts of `layer` and those before.
    fn progress<'a>(
        &self,
        stage: Stage,
        layer: usize,
        progress: &'a mut impl FnMut(Stage, u64, u64),
    ) -> impl FnMut() + 'a {
        let (n_layers, n_experts) = (self.engine.spec().n_layers, self.engine.spec().n_experts);
        let mut done = (layer * n_experts) as u64;
        move || {
            done += 1;
            progress(stage, done, (n_layers * n_experts) as u64);
        }
    }
}

/// What approximating one expert costs, over the energy of the residual stream.
fn curve(fit: &Fit<'_>, energy: f64, mass: f64) -> Curve {
    let inputs = |dim| (dim, fit.inputs_error(&fit.inputs(dim)) / energy);
    let output = |dim| (dim, fit.output(None, Some(dim)).error / energy);
    Curve {
        inputs: MEASURED.map(inputs),
        output: MEASURED.map(output),
        mean: fit.mean().1 / energy,
        mass,
    }
}

/// Appends an expert's bytes as chosen, `exact` where nothing is approximated; returns the error of its outputs.
fn code(fit: &Fit<'_>, choice: Choice, exact: &ExpertTensors, bytes: &mut Vec<u8>) -> f64 {
    let Choice::Copy { inputs, output } = choice else {
        let (mean, error) = fit.mean();
        bytes.extend(mean.iter().flat_map(|y| f16::from_f32(*y).to_le_bytes()));
        return error;
    };
    let coded = inputs.map(|dim| fit.inputs(dim));
    let (gate, up) = match &coded {
        Some(coded) => (coded.gate_proj.as_slice(), coded.up_proj.as_slice()),
        None => (exact.gate_proj.bytes(), exact.up_proj.bytes()),
    };
    bytes.extend_from_slice(gate);
    bytes.extend_from_slice(up);
    let written = fit.output(coded.as_ref(), output);
    bytes.extend_from_slice(match output {
        Some(_) => &written.down_proj,
        None => exact.down_proj.bytes(),
    });
    written.error
}
