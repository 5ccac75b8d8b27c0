//! A mixture-of-experts language model in a GGUF file: its arithmetic as data, and its tensors as views of the map.

mod arch;
mod layers;
mod spec;

use std::path::Path;

pub use arch::{Arch, QkNorm, RopeStyle};
pub use layers::{ExpertLayer, ExpertTensors, LayerTensors, SharedExpert};
pub use spec::{Gating, ModelSpec, RopeSpec};

use crate::error::Result;
use crate::gguf::Gguf;
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
}

impl Model {
    /// Opens a model file, or from the name of any shard all of them, and checks tensors against metadata.
    ///
    /// # Errors
    /// [`crate::Error`], naming file and key or tensor: what [`Gguf::open`] refuses, an unsupported architecture or
    /// variant, a tensor that is missing, of another shape, or not used.
    pub fn open(path: &Path) -> Result<Model> {
        Model::from_gguf(Gguf::open(path)?)
    }

    /// As [`Model::open`], of a file that is open already.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_gguf(gguf: Gguf) -> Result<Model> {
        let spec = ModelSpec::read(&gguf)?;
        let mut loader = Loader::new(&gguf);
        let vocab = [spec.n_embd, spec.n_vocab];
        let token_embd = loader.tensor("token_embd.weight", &vocab)?;
        let output_norm = loader.tensor("output_norm.weight", &[spec.n_embd])?;
        let output = loader.optional("output.weight", &vocab)?.unwrap_or(token_embd.clone());
        let rope_freqs = loader.optional("rope_freqs.weight", &[spec.rope.dim / 2])?;
        let mut layers = Vec::new();
        let mut experts = Vec::new();
        for layer in 0..spec.n_layers {
            layers.push(LayerTensors::load(&mut loader, &spec, layer)?);
            experts.push(ExpertLayer::load(&mut loader, &spec, layer)?);
        }
        loader.expect_all_used()?;
        Ok(Model { spec, gguf, token_embd, output_norm, output, rope_freqs, layers, experts })
    }
}
