//! A mixture-of-experts language model in a GGUF file: its arithmetic as data, and its tensors as views of the map.

mod arch;
mod experts;
mod layers;
pub mod pack_names;
mod spec;

use std::collections::BTreeSet;
use std::path::Path;

pub use arch::{Arch, QkNorm, RopeStyle};
pub use experts::{ExpertLayer, ExpertTensors, StandIn};
pub use layers::{LayerTensors, SharedExpert};
pub use spec::{Gating, ModelSpec, RopeSpec};

use crate::error::Result;
use crate::gguf::{Gguf, TensorInfo};
use crate::tensor::Tensor;
use layers::Loader;

/// An open model. Every tensor's shape is the one that the metadata asks for, and the file has no tensor besides.
#[derive(Debug)]
pub struct Model {
    /// Sizes, and the arithmetic's variants.
    pub spec: ModelSpec,
    /// The file.
    pub gguf: Gguf,
    /// Token embeddings, `[n_embd, n_vocab]`.
    pub token_embd: Tensor,
    /// The last norm's weights, `[n_embd]`.
    pub output_norm: Tensor,
    /// The output head, `[n_embd, n_vocab]`; the token embeddings where the model ties them.
    pub output: Tensor,
    /// Divisors of RoPE's frequencies, `[rope.dim / 2]`.
    pub rope_freqs: Option<Tensor>,
    /// Everything of each layer but its routed experts.
    pub layers: Vec<LayerTensors>,
    /// The routed experts of each layer.
    pub experts: Vec<ExpertLayer>,
    /// Of a pack, by layer and expert: what stands in for those that it does not hold exactly. Empty of a full file.
    pub standins: Vec<Vec<Option<StandIn>>>,
}

impl Model {
    /// Opens a model file, or from the name of any shard all of them, and checks tensors against metadata.
    ///
    /// # Errors
    /// [`crate::Error`], naming file and key or tensor: what [`Gguf::open`] refuses, an unsupported architecture or
    /// variant, a tensor that is missing, of another shape, or not used.
    pub fn open(path: &Path) -> Result<Model> {
        let gguf = Gguf::open(path)?;
        let spec = ModelSpec::read(&gguf)?;
        let mut loader = Loader::new(&gguf);
        let vocab = [spec.n_embd, spec.n_vocab];
        let token_embd = loader.tensor("token_embd.weight", &vocab)?;
        let output_norm = loader.tensor("output_norm.weight", &[spec.n_embd])?;
        let output = loader.optional("output.weight", &vocab)?.unwrap_or(token_embd.clone());
        let rope_freqs = loader.optional("rope_freqs.weight", &[spec.rope.dim / 2])?;
        let mut layers = Vec::new();
        let (mut experts, mut standins) = (Vec::new(), Vec::new());
        let is_pack = gguf.meta().get(pack_names::TYPES).is_some();
        for layer in 0..spec.n_layers {
            layers.push(LayerTensors::load(&mut loader, &spec, layer)?);
            if is_pack {
                let (exact, approximate) = ExpertLayer::load_pack(&mut loader, &spec, layer)?;
                experts.push(exact);
                standins.push(approximate);
            } else {
                experts.push(ExpertLayer::load(&mut loader, &spec, layer)?);
            }
        }
        loader.expect_all_used()?;
        Ok(Model {
            spec,
            gguf,
            token_embd,
            output_norm,
            output,
            rope_freqs,
            layers,
            experts,
            standins,
        })
    }

    /// Of a pack, by layer and expert, what it has of every expert, the exact ones included.
    pub fn all_standins(&self) -> Vec<Vec<Option<StandIn>>> {
        let of_layer = |(layer, standins): (&ExpertLayer, &Vec<Option<StandIn>>)| {
            let exact = |e| layer.holds(e).then(|| StandIn::Copy(layer.expert(e)));
            standins.iter().enumerate().map(|(e, held)| held.clone().or_else(|| exact(e))).collect()
        };
        self.experts.iter().zip(&self.standins).map(of_layer).collect()
    }

    /// The bytes that the file has of a layer's experts, exact or not.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn expert_bytes(&self, layer: usize) -> u64 {
        let exact = &self.experts[layer];
        let held = (0..exact.n_experts()).filter(|&e| exact.holds(e)).count();
        let standins = self.standins.get(layer).into_iter().flatten().flatten();
        let bytes =
            held * exact.bytes_per_expert() + standins.map(StandIn::byte_len).sum::<usize>();
        bytes as u64
    }

    /// What every token reads: all but the routed experts, and but the token embeddings unless they are the output head
    /// too.
    pub fn trunk(&self) -> impl Iterator<Item = Tensor> + '_ {
        let experts = self.experts.iter().flat_map(ExpertLayer::tensors);
        let mut others: BTreeSet<&str> = experts.map(Tensor::name).collect();
        if self.token_embd.name() != self.output.name() {
            others.insert(self.token_embd.name());
        }
        let names = self.gguf.tensors().map(TensorInfo::name);
        names
            .filter(move |name| !others.contains(name))
            .filter_map(|name| self.gguf.tensor(name).ok())
    }

    /// Reads the trunk into memory and keeps it there, for devices that cannot hold all experts.
    ///
    /// # Errors
    /// As [`Mapping::keep`](crate::Mapping::keep).
    pub fn keep_trunk(&self) -> Result<()> {
        // A token reads one row of it.
        self.token_embd.mapping().advise_random(self.token_embd.range());
        self.trunk().try_for_each(|tensor| tensor.mapping().keep(tensor.range()))
    }

    /// Whether the file is a pack: what a device installs, made from a full file.
    pub fn is_pack(&self) -> bool {
        !self.standins.is_empty()
    }
}
