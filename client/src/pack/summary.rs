//! What a pack says about itself.

use std::collections::BTreeMap;

use outrigger_experts::{GgmlType, Model, StandIn, pack_names};

use crate::error::Result;

/// What a pack holds, and what that cost in distortion on its calibration text.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The budget for experts, as it was asked for.
    pub budget: String,
    /// What experts were fitted to.
    pub calibration: String,
    /// By layer.
    pub layers: Vec<LayerSummary>,
    /// Matrices of experts by type, the most bits first, as far as there are any.
    pub matrices: Vec<(GgmlType, usize)>,
}

/// One layer of a pack.
#[derive(Clone, Copy, Debug)]
pub struct LayerSummary {
    /// Experts of the full model.
    pub exact: usize,
    /// Experts of which some or all matrices are coded.
    pub coded: usize,
    /// Experts that are their mean output.
    pub mean: usize,
    /// The bytes of all of them.
    pub bytes: u64,
    /// Their bytes in the full model.
    pub full_bytes: u64,
    /// Squared error of an expert's outputs over their own squared sum, averaged by routed weight.
    pub error: f64,
}

impl Summary {
    /// Of a model file; `None` if it is no pack.
    ///
    /// # Errors
    /// A pack whose metadata is not what packs have.
    pub fn of(model: &Model) -> Result<Option<Summary>> {
        if !model.is_pack() {
            return Ok(None);
        }
        let (meta, n) = (model.gguf.meta(), model.spec.n_experts);
        let per_expert = |key| -> Result<&[f32]> {
            let values = meta.f32s(key)?.unwrap_or_default();
            match values.len() == n * model.spec.n_layers {
                true => Ok(values),
                false => Err(meta
                    .mismatch(key, format!("{} values", values.len()), "one an expert")
                    .into()),
            }
        };
        let (mass, errors) = (per_expert(pack_names::MASS)?, per_expert(pack_names::ERRORS)?);
        let layer = |(at, (mass, errors)): (usize, (&[f32], &[f32]))| {
            let error = mass.iter().zip(errors).map(|(m, e)| f64::from(m * e)).sum();
            LayerSummary { error, ..count(model, at) }
        };
        let layers = mass.chunks_exact(n).zip(errors.chunks_exact(n)).enumerate().map(layer);
        let text =
            |key| Ok::<_, outrigger_experts::Error>(meta.str(key)?.unwrap_or("?").to_owned());
        Ok(Some(Summary {
            budget: text(pack_names::BUDGET)?,
            calibration: text(pack_names::CALIBRATION)?,
            layers: layers.collect(),
            matrices: matrices(model),
        }))
    }
}

fn count(model: &Model, layer: usize) -> LayerSummary {
    let exact = &model.experts[layer];
    let standins = model.standins[layer].iter().flatten();
    let mean = standins.clone().filter(|s| matches!(s, StandIn::Mean(_))).count();
    let all = standins.count();
    LayerSummary {
        exact: exact.n_experts() - all,
        coded: all - mean,
        mean,
        bytes: model.expert_bytes(layer),
        full_bytes: exact.full_bytes(),
        error: 0.0,
    }
}

fn matrices(model: &Model) -> Vec<(GgmlType, usize)> {
    let mut counts = BTreeMap::new();
    for standin in model.all_standins().into_iter().flatten().flatten() {
        let StandIn::Copy(tensors) = standin else { continue };
        for tensor in [tensors.gate_proj, tensors.up_proj, tensors.down_proj] {
            let place = GgmlType::vqs().position(|ty| ty == tensor.ty());
            counts.entry(place).or_insert((tensor.ty(), 0)).1 += 1;
        }
    }
    counts.into_values().collect()
}
