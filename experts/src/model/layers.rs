//! A layer's tensors, found by name and checked against the spec.

use std::collections::HashSet;

use super::spec::ModelSpec;
use crate::error::{Error, Mismatch, Result};
use crate::gguf::{Gguf, Metadata};
use crate::tensor::Tensor;
use crate::types::GgmlType;

/// Everything of one layer but its routed experts. Dimensions are GGUF's, the fastest first: a matrix is
/// `[inputs, outputs]`.
#[derive(Clone, Debug)]
pub struct LayerTensors {
    /// The norm before attention, `[n_embd]`.
    pub attn_norm: Tensor,
    /// Queries, `[n_embd, n_heads * head_dim]`.
    pub q: Tensor,
    /// Keys, `[n_embd, n_kv_heads * head_dim]`.
    pub k: Tensor,
    /// Values, `[n_embd, n_kv_heads * head_dim]`.
    pub v: Tensor,
    /// Attention's output, `[n_heads * head_dim, n_embd]`.
    pub o: Tensor,
    /// Added to the queries.
    pub q_bias: Option<Tensor>,
    /// Added to the keys.
    pub k_bias: Option<Tensor>,
    /// Added to the values.
    pub v_bias: Option<Tensor>,
    /// The queries' norm, `[head_dim]` or `[n_heads * head_dim]`: see [`ModelSpec::qk_norm`].
    pub q_norm: Option<Tensor>,
    /// The keys' norm, `[head_dim]` or `[n_kv_heads * head_dim]`.
    pub k_norm: Option<Tensor>,
    /// The norm before the experts, `[n_embd]`.
    pub ffn_norm: Tensor,
    /// The router's matrix (`ffn_gate_inp`), `[n_embd, n_experts]`.
    pub router: Tensor,
    /// The expert that every token passes.
    pub shared: Option<SharedExpert>,
}

/// An expert that every token passes, weighted by the sigmoid of one logit.
#[derive(Clone, Debug)]
pub struct SharedExpert {
    /// `[n_embd, n_ff_shared]`.
    pub gate_proj: Tensor,
    /// `[n_embd, n_ff_shared]`.
    pub up_proj: Tensor,
    /// `[n_ff_shared, n_embd]`.
    pub down_proj: Tensor,
    /// Makes the logit: `[n_embd]`.
    pub gate_inp: Tensor,
}

impl LayerTensors {
    pub(super) fn load(
        loader: &mut Loader,
        spec: &ModelSpec,
        layer: usize,
    ) -> Result<LayerTensors> {
        let n_embd = spec.n_embd;
        // Absurd sizes saturate, and match no tensor.
        let q_dim = spec.n_heads.saturating_mul(spec.head_dim);
        let kv_dim = spec.n_kv_heads.saturating_mul(spec.head_dim);
        let (q_norm, k_norm) = spec.qk_norm.lens(spec.head_dim, q_dim, kv_dim).unzip();
        let name = |part: &str| format!("blk.{layer}.{part}");
        let mut norm = |part: &str, len: Option<usize>| {
            len.map(|len| loader.tensor(&name(part), &[len])).transpose()
        };
        let (q_norm, k_norm) =
            (norm("attn_q_norm.weight", q_norm)?, norm("attn_k_norm.weight", k_norm)?);
        Ok(LayerTensors {
            attn_norm: loader.tensor(&name("attn_norm.weight"), &[n_embd])?,
            q: loader.tensor(&name("attn_q.weight"), &[n_embd, q_dim])?,
            k: loader.tensor(&name("attn_k.weight"), &[n_embd, kv_dim])?,
            v: loader.tensor(&name("attn_v.weight"), &[n_embd, kv_dim])?,
            o: loader.tensor(&name("attn_output.weight"), &[q_dim, n_embd])?,
            q_bias: loader.optional(&name("attn_q.bias"), &[q_dim])?,
            k_bias: loader.optional(&name("attn_k.bias"), &[kv_dim])?,
            v_bias: loader.optional(&name("attn_v.bias"), &[kv_dim])?,
            q_norm,
            k_norm,
            ffn_norm: loader.tensor(&name("ffn_norm.weight"), &[n_embd])?,
            router: loader.tensor(&name("ffn_gate_inp.weight"), &[n_embd, spec.n_experts])?,
            shared: spec
                .n_ff_shared
                .map(|n_ff| SharedExpert::load(loader, n_embd, n_ff, layer))
                .transpose()?,
        })
    }
}

impl SharedExpert {
    fn load(loader: &mut Loader, n_embd: usize, n_ff: usize, layer: usize) -> Result<SharedExpert> {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        Ok(SharedExpert {
            gate_proj: loader.tensor(&name("ffn_gate_shexp"), &[n_embd, n_ff])?,
            up_proj: loader.tensor(&name("ffn_up_shexp"), &[n_embd, n_ff])?,
            down_proj: loader.tensor(&name("ffn_down_shexp"), &[n_ff, n_embd])?,
            gate_inp: loader.tensor(&name("ffn_gate_inp_shexp"), &[n_embd])?,
        })
    }
}

/// Hands out a file's tensors by name and shape, and remembers which.
pub(super) struct Loader<'a> {
    gguf: &'a Gguf,
    used: HashSet<String>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(gguf: &'a Gguf) -> Loader<'a> {
        Loader { gguf, used: HashSet::new() }
    }

    /// A tensor that must be there.
    pub(super) fn tensor(&mut self, name: &str, dims: &[usize]) -> Result<Tensor> {
        self.optional(name, dims)?.ok_or_else(|| {
            let expected = format!("dimensions {dims:?}");
            Mismatch::new("no such tensor", expected).in_tensor(self.gguf.path(), name)
        })
    }

    pub(super) fn optional(&mut self, name: &str, dims: &[usize]) -> Result<Option<Tensor>> {
        let Some(tensor) = self.gguf.find(name)? else { return Ok(None) };
        if !same_shape(tensor.dims(), dims) {
            let found = format!("dimensions {:?}", tensor.dims());
            let expected = format!("{dims:?}, from the metadata");
            return Err(Mismatch::new(found, expected).in_tensor(tensor.mapping().path(), name));
        }
        self.used.insert(name.to_owned());
        Ok(Some(tensor.with_dims(dims)))
    }

    /// A vector-quantised matrix of `dims`, whose name says its type.
    pub(super) fn codes(
        &mut self,
        name: &str,
        ty: GgmlType,
        dims: &[usize],
    ) -> Result<Option<Tensor>> {
        let found = self.gguf.find_codes(name, ty, dims)?;
        self.used.extend(found.iter().map(|tensor| tensor.name().to_owned()));
        Ok(found)
    }

    /// What is wrong with a tensor of the file.
    pub(super) fn wrong(&self, name: &str, found: &str, expected: &str) -> Error {
        Mismatch::new(found, expected).in_tensor(self.gguf.path(), name)
    }

    pub(super) fn meta(&self) -> &'a Metadata {
        self.gguf.meta()
    }

    /// A tensor that nothing uses would change the answers if it were used: the model is another than it seems.
    pub(super) fn expect_all_used(&self) -> Result<()> {
        match self.gguf.tensors().find(|tensor| !self.used.contains(tensor.name())) {
            None => Ok(()),
            Some(tensor) => {
                let found = "a tensor that this architecture does not use";
                let expected = "only those that it does";
                Err(Mismatch::new(found, expected).in_tensor(self.gguf.path(), tensor.name()))
            }
        }
    }
}

/// Equal up to trailing ones, which writers drop or keep as they like.
fn same_shape(a: &[usize], b: &[usize]) -> bool {
    let dim = |dims: &[usize], i| dims.get(i).copied().unwrap_or(1);
    (0..a.len().max(b.len())).all(|i| dim(a, i) == dim(b, i))
}
