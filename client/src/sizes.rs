//! A model's bytes by tier.

use outrigger_experts::{LayerTensors, Model, Tensor};

/// A model's bytes by tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// The file, or all its shards.
    pub file: u64,
    /// Everything but the routed experts.
    pub trunk: u64,
    /// All routed experts, as far as the file has them.
    pub experts: u64,
    /// The largest routed expert of the full model.
    pub expert: u64,
    /// Weights that one decoded token of the full model reads.
    pub token: u64,
}

impl Sizes {
    /// The sizes of `model`.
    pub fn of(model: &Model) -> Sizes {
        let spec = &model.spec;
        let all: u64 = model.gguf.tensors().map(|tensor| tensor.range().len() as u64).sum();
        let an_expert = |layer: usize| model.experts[layer].bytes_per_expert() as u64;
        let experts = (0..spec.n_layers).map(|layer| model.expert_bytes(layer)).sum();
        let used: u64 = (0..spec.n_layers).map(|layer| an_expert(layer) * spec.n_used as u64).sum();
        let layers: u64 = model.layers.iter().map(layer_bytes).sum();
        Sizes {
            file: model.gguf.file_bytes(),
            trunk: all - experts,
            experts,
            expert: (0..spec.n_layers).map(an_expert).max().unwrap_or(0),
            token: layers + used + bytes(&model.output) + bytes(&model.output_norm),
        }
    }
}

fn bytes(tensor: &Tensor) -> u64 {
    tensor.byte_len() as u64
}

fn layer_bytes(layer: &LayerTensors) -> u64 {
    let always =
        [&layer.attn_norm, &layer.q, &layer.k, &layer.v, &layer.o, &layer.ffn_norm, &layer.router];
    let optional = [&layer.q_bias, &layer.k_bias, &layer.v_bias, &layer.q_norm, &layer.k_norm];
    let shared =
        layer.shared.iter().flat_map(|s| [&s.gate_proj, &s.up_proj, &s.down_proj, &s.gate_inp]);
    always.into_iter().chain(optional.into_iter().flatten()).chain(shared).map(bytes).sum()
}
