//! A pack's file: the full model's metadata and trunk, and each expert as chosen.

use std::collections::BTreeSet;
use std::path::Path;

use outrigger_experts::gguf::{Array, Layout, Value, Writer};
use outrigger_experts::{ExpertLayer, GgmlType, Model, Tensor, checksum, pack_names};

use super::allocate::Choice;
use crate::error::Result;

/// The matrices of an expert: its name in the file, and whether it reads the input.
pub(super) const PARTS: [(&str, bool); 3] =
    [("ffn_gate", true), ("ffn_up", true), ("ffn_down", false)];

/// What a pack says about itself.
pub(super) struct About<'a> {
    /// As it was asked for.
    pub(super) budget: String,
    /// The text that experts were fitted to.
    pub(super) calibration: String,
    /// By layer and expert.
    pub(super) choices: &'a [Vec<Choice>],
    /// By layer and expert: the share of the layer's routed weight.
    pub(super) mass: Vec<f32>,
    /// By layer and expert: squared error of the weighted outputs over their own squared sum.
    pub(super) errors: Vec<f32>,
}

/// Writes a pack of `full` to `path`; `bytes` gives those of each layer's experts, in order. `progress` hears of bytes: written
/// so far, and in all.
pub(super) fn write(
    full: &Model,
    path: &Path,
    about: &About<'_>,
    bytes: impl Fn(usize) -> Result<Vec<u8>>,
    mut progress: impl FnMut(u64, u64),
) -> Result<()> {
    let mut layout = Layout::new(path);
    set_metadata(&mut layout, full, about);
    layout.set(pack_names::CHECKSUMS, checksums(full, about.choices, &bytes)?);
    let experts = full.experts.iter().flat_map(ExpertLayer::tensors);
    let experts: BTreeSet<&str> = experts.map(Tensor::name).collect();
    let trunk = full.gguf.tensors().filter(|tensor| !experts.contains(tensor.name()));
    let trunk: Vec<_> = trunk.collect();
    for tensor in &trunk {
        let ty = full.gguf.tensor(tensor.name())?.ty();
        layout.tensor(tensor.name(), ty, tensor.dims())?;
    }
    for (at, choices) in about.choices.iter().enumerate() {
        for (e, choice) in choices.iter().enumerate() {
            for (name, ty, dims) in tensors(full, at, e, *choice) {
                layout.tensor(&name, ty, &dims)?;
            }
        }
    }
    let total = layout.tensor_bytes();
    let mut writer = Writer::create(layout)?;
    let mut done = 0;
    let mut put = |bytes: &[u8]| -> Result<()> {
        writer.write(bytes)?;
        done += bytes.len() as u64;
        progress(done, total);
        Ok(())
    };
    for tensor in &trunk {
        put(full.gguf.tensor(tensor.name())?.bytes())?;
    }
    for (at, choices) in about.choices.iter().enumerate() {
        let bytes = bytes(at)?;
        split(full, at, choices, &bytes).into_iter().flatten().try_for_each(&mut put)?;
    }
    Ok(writer.finish()?)
}

/// The tensors of an expert in a pack: name, type and dimensions.
pub(super) fn tensors(
    full: &Model,
    layer: usize,
    e: usize,
    choice: Choice,
) -> Vec<(String, GgmlType, Vec<usize>)> {
    let (n_embd, n_ff) = (full.spec.n_embd, full.spec.n_ff);
    let Choice::Copy { inputs, output } = choice else {
        return vec![(pack_names::mean(layer, e), GgmlType::F16, vec![n_embd])];
    };
    let exact = full.experts[layer].types();
    let parts = PARTS.iter().zip(exact).map(|(&(part, reads_input), exact)| {
        let (dim, dims) =
            if reads_input { (inputs, [n_embd, n_ff]) } else { (output, [n_ff, n_embd]) };
        let ty = dim.map_or(exact, GgmlType::Vq);
        (pack_names::matrix(layer, part, e, ty), ty, dims.to_vec())
    });
    parts.collect()
}

/// Three an expert, as [`pack_names::CHECKSUMS`] says.
fn checksums(
    full: &Model,
    choices: &[Vec<Choice>],
    bytes: impl Fn(usize) -> Result<Vec<u8>>,
) -> Result<Vec<u64>> {
    let mut all = Vec::new();
    for (at, choices) in choices.iter().enumerate() {
        for parts in split(full, at, choices, &bytes(at)?) {
            let mut of_expert = [0; 3];
            of_expert.iter_mut().zip(parts).for_each(|(sum, bytes)| *sum = checksum(bytes));
            all.extend(of_expert);
        }
    }
    Ok(all)
}

/// The bytes of each tensor of a layer, by expert.
fn split<'a>(full: &Model, at: usize, choices: &[Choice], bytes: &'a [u8]) -> Vec<Vec<&'a [u8]>> {
    let mut rest = bytes;
    let mut part = |(_, ty, dims): (String, GgmlType, Vec<usize>)| {
        let rows = dims.get(1).copied().unwrap_or(1);
        let (part, after) = rest.split_at(ty.row_bytes(dims[0]).unwrap_or(0) * rows);
        rest = after;
        part
    };
    let experts = choices.iter().enumerate();
    experts
        .map(|(e, choice)| tensors(full, at, e, *choice).into_iter().map(&mut part).collect())
        .collect()
}

fn set_metadata(layout: &mut Layout, full: &Model, about: &About<'_>) {
    for (key, value) in full.gguf.meta().iter().filter(|(key, _)| !key.starts_with("split.")) {
        layout.set(key, value.clone());
    }
    let types = full.experts.iter().flat_map(|layer| layer.types().map(|ty| ty.name().to_owned()));
    layout.set(pack_names::FINGERPRINT, full.gguf.fingerprint().to_string().as_str());
    layout.set(pack_names::TYPES, Value::Array(Array::String(types.collect())));
    layout.set(pack_names::BUDGET, about.budget.as_str());
    layout.set(pack_names::CALIBRATION, about.calibration.as_str());
    layout.set(pack_names::MASS, Value::Array(Array::F32(about.mass.clone())));
    layout.set(pack_names::ERRORS, Value::Array(Array::F32(about.errors.clone())));
}
