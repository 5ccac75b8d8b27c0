//! A model's sizes and the variants of its arithmetic, read from metadata and checked.

use super::arch::{Arch, ExpertWidth, QkNorm, RopeStyle};
use crate::error::{Error, Result};
use crate::gguf::{Gguf, Metadata, Value};
use crate::ops::Attention;

/// Expert ids are 16 bits wide, and so is how many there are.
const MAX_EXPERTS: usize = u16::MAX as usize;

/// What the forward pass needs to know besides weights. Sizes count values.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The architecture.
    pub arch: Arch,
    /// The model's own name, or else its architecture's.
    pub name: String,
    /// Layers, each with routed experts.
    pub n_layers: usize,
    /// The residual stream's width.
    pub n_embd: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// A head's width.
    pub head_dim: usize,
    /// A routed expert's inner width.
    pub n_ff: usize,
    /// The shared expert's inner width, in architectures that have one.
    pub n_ff_shared: Option<usize>,
    /// Routed experts a layer.
    pub n_experts: usize,
    /// Experts that the gate picks for a token; at most `n_experts`.
    pub n_used: usize,
    /// Tokens in the vocabulary.
    pub n_vocab: usize,
    /// Positions that the model was trained for.
    pub context: usize,
    /// What RMS norms add to the mean square.
    pub norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeSpec,
    /// The norm of queries and keys.
    pub qk_norm: QkNorm,
    /// How logits become scores.
    pub gating: Gating,
    /// Whether the picked experts' weights are divided by their sum.
    pub norm_weights: bool,
    /// What the weights are multiplied by at last; 1 in most models.
    pub weights_scale: f32,
}

/// Rotary position embedding: pair `i` of `dim / 2` turns by `position / scale * base^(-2 i / dim)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeSpec {
    /// The base frequency.
    pub base: f32,
    /// Values of a head that turn, from its start; even, at most `head_dim`.
    pub dim: usize,
    /// Which values turn together.
    pub style: RopeStyle,
    /// The factor of linear scaling; 1 where there is none.
    pub scale: f32,
}

/// How the gate makes scores of its logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// Softmax over all experts.
    Softmax,
    /// Each logit's sigmoid.
    Sigmoid,
    /// Top-k of the logits, then softmax over those.
    SoftmaxAfterTopK,
}

impl ModelSpec {
    /// Reads and checks the metadata; the vocabulary's size is the token embeddings'.
    pub(super) fn read(gguf: &Gguf) -> Result<ModelSpec> {
        let n_vocab = gguf.tensor("token_embd.weight")?.rows();
        ModelSpec::from_metadata(gguf.meta(), n_vocab)
    }

    /// Reads and checks the metadata of a model with `n_vocab` token embeddings.
    ///
    /// # Errors
    /// [`Error::Key`], for a key that is missing, contradicts another, or asks for what is not supported.
    pub fn from_metadata(meta: &Metadata, n_vocab: usize) -> Result<ModelSpec> {
        let arch = Arch::read(meta)?;
        let keys = Keys { meta, arch };
        keys.refuse_unsupported()?;
        keys.check_vocab(n_vocab)?;
        let n_layers = keys.size("block_count")?;
        let n_embd = keys.size("embedding_length")?;
        let (n_experts, n_used) = keys.experts()?;
        let (n_heads, n_kv_heads, head_dim) = keys.heads(n_embd)?;
        let n_ff = keys.expert_width(n_used)?;
        let n_ff_shared = match arch.row().shared_expert {
            true => Some(keys.size_or("expert_shared_feed_forward_length", n_ff)?),
            false => None,
        };
        let norm_weights = meta.bool(&keys.name("expert_weights_norm"))?;
        Ok(ModelSpec {
            arch,
            name: meta.str("general.name")?.unwrap_or(arch.name()).to_owned(),
            n_layers,
            n_embd,
            n_heads,
            n_kv_heads,
            head_dim,
            n_ff,
            n_ff_shared,
            n_experts,
            n_used,
            n_vocab,
            context: keys.size("context_length")?,
            norm_eps: keys.positive("attention.layer_norm_rms_epsilon", None)?,
            rope: keys.rope(head_dim)?,
            qk_norm: arch.qk_norm(),
            gating: keys.gating()?,
            norm_weights: norm_weights.unwrap_or(arch.row().norm_weights),
            weights_scale: keys.weights_scale()?,
        })
    }
}

/// The metadata under an architecture's prefix.
struct Keys<'a> {
    meta: &'a Metadata,
    arch: Arch,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn mismatch(
        &self,
        key: &str,
        found: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> Error {
        self.meta.mismatch(&self.name(key), found.to_string(), expected)
    }

    /// A size that must be there, and positive.
    fn size(&self, key: &str) -> Result<usize> {
        let size = self.meta.require_u32(&self.name(key))?;
        self.check_size(key, size)
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.meta.u32(&self.name(key))? {
            Some(size) => self.check_size(key, size),
            None => Ok(default),
        }
    }

    fn check_size(&self, key: &str, size: u32) -> Result<usize> {
        match size {
            0 => Err(self.mismatch(key, 0, "a positive number")),
            _ => Ok(size as usize),
        }
    }

    /// A float that must be positive and finite, and there if it has no default.
    fn positive(&self, key: &str, default: Option<f32>) -> Result<f32> {
        let name = self.name(key);
        let value = match (self.meta.f32(&name)?, default) {
            (Some(value), _) | (None, Some(value)) => value,
            (None, None) => self.meta.require_f32(&name)?,
        };
        match value.is_finite() && value > 0.0 {
            true => Ok(value),
            false => Err(self.mismatch(key, value, "a positive number")),
        }
    }

    fn experts(&self) -> Result<(usize, usize)> {
        let key = "expert_count";
        let n_experts = self.meta.u32(&self.name(key))?.unwrap_or(0) as usize;
        if n_experts == 0 {
            let expected = "a mixture of experts: dense models are not supported";
            return Err(self.mismatch(key, "no experts", expected));
        }
        if n_experts > MAX_EXPERTS {
            return Err(self.mismatch(key, n_experts, format!("at most {MAX_EXPERTS}")));
        }
        let n_used = self.size("expert_used_count")?;
        if n_used > n_experts {
            let expected = format!("at most the {n_experts} experts that there are");
            return Err(self.mismatch("expert_used_count", n_used, expected));
        }
        Ok((n_experts, n_used))
    }

    fn heads(&self, n_embd: usize) -> Result<(usize, usize, usize)> {
        let n_heads = self.size("attention.head_count")?;
        let n_kv_heads = self.size_or("attention.head_count_kv", n_heads)?;
        if !n_heads.is_multiple_of(n_kv_heads) {
            let expected = format!("a divisor of the {n_heads} heads");
            return Err(self.mismatch("attention.head_count_kv", n_kv_heads, expected));
        }
        let (key, most) = ("attention.key_length", Attention::MAX_HEAD_DIM);
        let head_dim = match self.meta.u32(&self.name(key))? {
            Some(size) => self.check_size(key, size)?,
            None if n_embd / n_heads > most => {
                let expected = format!("at most {most} for each of the {n_heads} heads");
                return Err(self.mismatch("embedding_length", n_embd, expected));
            }
            None if n_embd.is_multiple_of(n_heads) => n_embd / n_heads,
            None => {
                let expected = format!("a divisor of the width {n_embd}, or {}", self.name(key));
                return Err(self.mismatch("attention.head_count", n_heads, expected));
            }
        };
        if head_dim > most {
            return Err(self.mismatch(key, head_dim, format!("at most {most}")));
        }
        let value_dim = self.size_or("attention.value_length", head_dim)?;
        if value_dim != head_dim {
            let expected = format!("{head_dim}, as the keys");
            return Err(self.mismatch("attention.value_length", value_dim, expected));
        }
        Ok((n_heads, n_kv_heads, head_dim))
    }

    fn expert_width(&self, n_used: usize) -> Result<usize> {
        let (whole, expert) = ("feed_forward_length", "expert_feed_forward_length");
        let given = match self.arch.row().expert_width {
            ExpertWidth::FeedForward => None,
            ExpertWidth::ExpertFeedForward => self.meta.u32(&self.name(expert))?,
        };
        match (given, self.arch.row().expert_width) {
            (Some(size), _) => self.check_size(expert, size),
            (None, ExpertWidth::FeedForward) => self.size(whole),
            (None, ExpertWidth::ExpertFeedForward) => {
                let size = self.size(whole)?;
                match size.is_multiple_of(n_used) {
                    true => Ok(size / n_used),
                    false => {
                        let expected = format!("a multiple of the {n_used} experts used");
                        Err(self.mismatch(whole, size, expected))
                    }
                }
            }
        }
    }

    fn gating(&self) -> Result<Gating> {
        let key = "expert_gating_func";
        match self.meta.u32(&self.name(key))? {
            None | Some(0 | 1) => Ok(Gating::Softmax),
            Some(2) => Ok(Gating::Sigmoid),
            Some(3) => Ok(Gating::SoftmaxAfterTopK),
            Some(other) => {
                let expected = "1 (softmax), 2 (sigmoid) or 3 (softmax after top-k)";
                Err(self.mismatch(key, other, expected))
            }
        }
    }

    /// Zero means "not scaled" in llama.cpp's files.
    fn weights_scale(&self) -> Result<f32> {
        let key = "expert_weights_scale";
        match self.meta.f32(&self.name(key))? {
            Some(0.0) => Ok(1.0),
            _ => self.positive(key, Some(1.0)),
        }
    }

    fn rope(&self, head_dim: usize) -> Result<RopeSpec> {
        let dim = self.size_or("rope.dimension_count", head_dim)?;
        if dim > head_dim || !dim.is_multiple_of(2) {
            let expected = format!("an even number up to the head's width of {head_dim}");
            return Err(self.mismatch("rope.dimension_count", dim, expected));
        }
        let base = self.positive("rope.freq_base", Some(10_000.0))?;
        Ok(RopeSpec { base, dim, style: self.arch.row().rope, scale: self.rope_scale()? })
    }

    /// As llama.cpp's `load_hparams`: without a type the scaling is linear, and a factor of zero is none.
    fn rope_scale(&self) -> Result<f32> {
        let key = "rope.scaling.type";
        match self.meta.str(&self.name(key))? {
            Some("none") => return Ok(1.0),
            None | Some("linear") => {}
            Some(other) => {
                return Err(self.mismatch(key, format!("{other:?}"), "\"none\" or \"linear\""));
            }
        }
        for key in ["rope.scaling.factor", "rope.scale_linear"] {
            match self.meta.f32(&self.name(key))? {
                None => {}
                Some(0.0) => return Ok(1.0),
                Some(_) => return self.positive(key, None),
            }
        }
        Ok(1.0)
    }

    /// The vocabulary, where there is one, has a token for each embedding.
    fn check_vocab(&self, n_vocab: usize) -> Result<()> {
        const KEY: &str = "tokenizer.ggml.tokens";
        match self.meta.strings(KEY)? {
            Some(tokens) if tokens.len() != n_vocab => {
                let expected = format!("{n_vocab}, as tensor `token_embd.weight` has rows");
                Err(self.meta.mismatch(KEY, format!("{} tokens", tokens.len()), expected))
            }
            _ => Ok(()),
        }
    }

    /// Keys that change the arithmetic in ways that this crate's users do not know.
    fn refuse_unsupported(&self) -> Result<()> {
        let off = [Value::U32(0), Value::I32(0), Value::F32(0.0), Value::Bool(false)];
        for key in ["attention.clamp_kqv", "attention.sliding_window", "logit_scale"] {
            match self.meta.get(&self.name(key)) {
                Some(value) if !off.contains(value) => {
                    return Err(self.mismatch(key, value, "none: it is not supported"));
                }
                _ => {}
            }
        }
        let key = "expert_group_count";
        match self.meta.u32(&self.name(key))? {
            Some(groups @ 2..) => {
                Err(self.mismatch(key, groups, "at most 1: choosing by groups is not supported"))
            }
            _ => Ok(()),
        }
    }
}
