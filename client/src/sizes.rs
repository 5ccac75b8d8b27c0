//! A model's bytes by tier.

use outrigger_experts::{Model, Tensor};

/// A model's bytes by tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// The file, or all its shards.
    pub file: u64,
    /// Everything but the routed experts.
    pub trunk: u64,
    /// All routed experts, as far as the file has them.
    pub experts: u64,
    /// A routed expert, in the layer with the largest: the mean where they differ, as in a pack.
    pub expert: u64,
    /// Weights that one decoded token reads, with such experts.
    pub token: u64,
}

impl Sizes {
    /// The sizes of `model`.
    pub fn of(model: &Model) -> Sizes {
        let spec = &model.spec;
        let bytes = |tensor: Tensor| tensor.byte_len() as u64;
        let all: u64 = model.gguf.tensors().map(|tensor| tensor.range().len() as u64).sum();
        let layers = (0..spec.n_layers).map(|layer| model.expert_bytes(layer));
        let experts = layers.clone().sum();
        let used: u64 =
            layers.clone().map(|bytes| bytes * spec.n_used as u64 / spec.n_experts as u64).sum();
        Sizes {
            file: model.gguf.file_bytes(),
            trunk: all - experts,
            experts,
            expert: layers.max().unwrap_or(0) / spec.n_experts as u64,
            token: model.trunk().map(bytes).sum::<u64>() + used,
        }
    }
}
