//! The architectures: one row each, of what metadata does not say.

use crate::error::Result;
use crate::gguf::Metadata;

/// A supported architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arch {
    /// OLMoE.
    Olmoe,
    /// Qwen1.5-MoE and Qwen2-MoE.
    Qwen2Moe,
    /// Qwen3-MoE.
    Qwen3Moe,
    /// Llama with experts: Mixtral.
    Llama,
}

/// Which values RoPE turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Neighbours: `(0, 1), (2, 3), …`.
    Norm,
    /// Halves: `(0, dim / 2), (1, dim / 2 + 1), …`.
    Neox,
}

/// An RMS norm of queries and keys before RoPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// There is none.
    None,
    /// Each head alone, weights `[head_dim]`.
    PerHead,
    /// All heads together, weights `[heads * head_dim]`.
    Full,
}

/// Where an expert's width stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExpertWidth {
    /// `feed_forward_length`.
    FeedForward,
    /// `expert_feed_forward_length`, or else `feed_forward_length / expert_used_count`.
    ExpertFeedForward,
}

/// What an architecture fixes. llama.cpp: `llama_model_rope_type` and the builders under `src/models`.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) arch: Arch,
    pub(super) name: &'static str,
    pub(super) rope: RopeStyle,
    pub(super) qk_norm: QkNorm,
    pub(super) expert_width: ExpertWidth,
    /// Whether each layer has an expert that every token passes.
    pub(super) shared_expert: bool,
    /// Whether selected weights are divided by their sum, where the metadata does not say.
    pub(super) norm_weights: bool,
}

static ROWS: [Row; 4] = [
    Row {
        arch: Arch::Olmoe,
        name: "olmoe",
        rope: RopeStyle::Neox,
        qk_norm: QkNorm::Full,
        expert_width: ExpertWidth::FeedForward,
        shared_expert: false,
        norm_weights: false,
    },
    Row {
        arch: Arch::Qwen2Moe,
        name: "qwen2moe",
        rope: RopeStyle::Neox,
        qk_norm: QkNorm::None,
        expert_width: ExpertWidth::ExpertFeedForward,
        shared_expert: true,
        norm_weights: false,
    },
    Row {
        arch: Arch::Qwen3Moe,
        name: "qwen3moe",
        rope: RopeStyle::Neox,
        qk_norm: QkNorm::PerHead,
        expert_width: ExpertWidth::ExpertFeedForward,
        shared_expert: false,
        norm_weights: true,
    },
    Row {
        arch: Arch::Llama,
        name: "llama",
        rope: RopeStyle::Norm,
        qk_norm: QkNorm::None,
        expert_width: ExpertWidth::FeedForward,
        shared_expert: false,
        norm_weights: true,
    },
];

impl QkNorm {
    /// How many weights the queries' norm has and the keys' one, if there are such.
    pub(crate) fn lens(
        self,
        head_dim: usize,
        q_dim: usize,
        kv_dim: usize,
    ) -> Option<(usize, usize)> {
        match self {
            QkNorm::None => None,
            QkNorm::PerHead => Some((head_dim, head_dim)),
            QkNorm::Full => Some((q_dim, kv_dim)),
        }
    }
}

impl Arch {
    /// The name in `general.architecture`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    pub(crate) fn qk_norm(self) -> QkNorm {
        self.row().qk_norm
    }

    pub(super) fn row(self) -> &'static Row {
        ROWS.iter().find(|row| row.arch == self).expect("every architecture has a row")
    }

    pub(super) fn read(meta: &Metadata) -> Result<Arch> {
        const KEY: &str = "general.architecture";
        let name = meta.require_str(KEY)?;
        ROWS.iter().find(|row| row.name == name).map(|row| row.arch).ok_or_else(|| {
            let supported = ROWS.each_ref().map(|row| row.name).join(", ");
            meta.mismatch(KEY, format!("{name:?}"), format!("one of {supported}"))
        })
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
