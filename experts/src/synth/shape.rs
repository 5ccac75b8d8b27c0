//! The dimensions of real models, as their published configurations give them.

use super::Planned;
use super::blocks::Fill;
use crate::gguf::Layout;
use crate::model::Arch;
use crate::types::GgmlType;

/// A model whose dimensions are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// allenai/OLMoE-1B-7B-0924.
    Olmoe1b7b,
    /// Qwen/Qwen3-30B-A3B.
    Qwen3_30bA3b,
    /// mistralai/Mixtral-8x7B-v0.1.
    Mixtral8x7b,
    /// A Qwen3-MoE of a few megabytes, for tests.
    Tiny,
}

/// A shape's row: [`crate::ModelSpec`] has the meaning of each.
#[derive(Debug)]
pub(super) struct Dims {
    shape: Shape,
    name: &'static str,
    pub(super) arch: Arch,
    n_layers: usize,
    n_embd: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    n_ff: usize,
    n_experts: usize,
    n_used: usize,
    pub(super) n_vocab: usize,
    context: u32,
    rope_base: f32,
    norm_eps: f32,
}

static SHAPES: [Dims; 4] = [
    Dims {
        shape: Shape::Olmoe1b7b,
        name: "olmoe-1b-7b",
        arch: Arch::Olmoe,
        n_layers: 16,
        n_embd: 2048,
        n_heads: 16,
        n_kv_heads: 16,
        head_dim: 128,
        n_ff: 1024,
        n_experts: 64,
        n_used: 8,
        n_vocab: 50304,
        context: 4096,
        rope_base: 10_000.0,
        norm_eps: 1e-5,
    },
    Dims {
        shape: Shape::Qwen3_30bA3b,
        name: "qwen3-30b-a3b",
        arch: Arch::Qwen3Moe,
        n_layers: 48,
        n_embd: 2048,
        n_heads: 32,
        n_kv_heads: 4,
        head_dim: 128,
        n_ff: 768,
        n_experts: 128,
        n_used: 8,
        n_vocab: 151_936,
        context: 40_960,
        rope_base: 1_000_000.0,
        norm_eps: 1e-6,
    },
    Dims {
        shape: Shape::Mixtral8x7b,
        name: "mixtral-8x7b",
        arch: Arch::Llama,
        n_layers: 32,
        n_embd: 4096,
        n_heads: 32,
        n_kv_heads: 8,
        head_dim: 128,
        n_ff: 14336,
        n_experts: 8,
        n_used: 2,
        n_vocab: 32000,
        context: 32_768,
        rope_base: 1_000_000.0,
        norm_eps: 1e-5,
    },
    Dims {
        shape: Shape::Tiny,
        name: "tiny",
        arch: Arch::Qwen3Moe,
        n_layers: 3,
        n_embd: 256,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 64,
        n_ff: 256,
        n_experts: 8,
        n_used: 2,
        n_vocab: 1024,
        context: 2048,
        rope_base: 10_000.0,
        norm_eps: 1e-6,
    },
];

impl Shape {
    /// Every shape.
    pub fn all() -> impl Iterator<Item = Shape> {
        SHAPES.iter().map(|dims| dims.shape)
    }

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        self.dims().name
    }

    pub(super) fn dims(self) -> &'static Dims {
        SHAPES.iter().find(|dims| dims.shape == self).expect("every shape has a row")
    }

    pub(super) fn set_metadata(self, layout: &mut Layout, ty: GgmlType) {
        let d = self.dims();
        layout.set("general.architecture", d.arch.name());
        layout.set("general.name", format!("{} with random weights", d.name));
        layout.set("general.file_type", file_type(ty));
        layout.set("general.quantization_version", 2u32);
        let mut set = |key: &str, value: usize| {
            layout.set(&format!("{}.{key}", d.arch), value as u32);
        };
        set("context_length", d.context as usize);
        set("block_count", d.n_layers);
        set("embedding_length", d.n_embd);
        set("vocab_size", d.n_vocab);
        set("attention.head_count", d.n_heads);
        set("attention.head_count_kv", d.n_kv_heads);
        set("attention.key_length", d.head_dim);
        set("attention.value_length", d.head_dim);
        set("rope.dimension_count", d.head_dim);
        set("expert_count", d.n_experts);
        set("expert_used_count", d.n_used);
        set("expert_feed_forward_length", d.n_ff);
        set("feed_forward_length", d.n_ff);
        layout.set(&format!("{}.rope.freq_base", d.arch), d.rope_base);
        layout.set(&format!("{}.attention.layer_norm_rms_epsilon", d.arch), d.norm_eps);
    }

    /// The tensors in the order of the file. A matrix of n inputs has a spread of 1 / sqrt(n), so that inputs of mean
    /// square 1, as the norms make them, give outputs of mean square 1: gate logits too. Embeddings are as large as all
    /// that the layers add to them: attention mixes tokens, and would leave the deeper gates but one choice for all.
    pub(super) fn tensors(self, ty: GgmlType) -> Vec<Planned> {
        let d = self.dims();
        let mut tensors = Vec::new();
        let mut add = |name: String, ty: GgmlType, dims: &[usize], fill: Fill| {
            tensors.push(Planned { name, ty, dims: dims.to_vec(), fill });
        };
        let spread = |inputs: usize| Fill::Spread((inputs as f32).sqrt().recip());
        let (q_dim, kv_dim) = (d.n_heads * d.head_dim, d.n_kv_heads * d.head_dim);
        let head_ty = match ty {
            GgmlType::Q4_K | GgmlType::Q5_K => GgmlType::Q6_K,
            _ => ty,
        };
        let embedding = Fill::Spread((2.0 * d.n_layers as f32).sqrt());
        add("token_embd.weight".into(), ty, &[d.n_embd, d.n_vocab], embedding);
        for layer in 0..d.n_layers {
            let mut matrix = |part: &str, ty: GgmlType, dims: &[usize]| {
                add(format!("blk.{layer}.{part}.weight"), ty, dims, spread(dims[0]));
            };
            matrix("attn_q", ty, &[d.n_embd, q_dim]);
            matrix("attn_k", ty, &[d.n_embd, kv_dim]);
            matrix("attn_v", ty, &[d.n_embd, kv_dim]);
            matrix("attn_output", ty, &[q_dim, d.n_embd]);
            matrix("ffn_gate_inp", GgmlType::F32, &[d.n_embd, d.n_experts]);
            matrix("ffn_gate_exps", ty, &[d.n_embd, d.n_ff, d.n_experts]);
            matrix("ffn_up_exps", ty, &[d.n_embd, d.n_ff, d.n_experts]);
            matrix("ffn_down_exps", ty, &[d.n_ff, d.n_embd, d.n_experts]);
            let mut norm = |part: &str, len: usize| {
                let name = format!("blk.{layer}.{part}.weight");
                add(name, GgmlType::F32, &[len], Fill::NearOne);
            };
            norm("attn_norm", d.n_embd);
            norm("ffn_norm", d.n_embd);
            if let Some((q_len, k_len)) = d.arch.qk_norm().lens(d.head_dim, q_dim, kv_dim) {
                norm("attn_q_norm", q_len);
                norm("attn_k_norm", k_len);
            }
        }
        add("output_norm.weight".into(), GgmlType::F32, &[d.n_embd], Fill::NearOne);
        add("output.weight".into(), head_ty, &[d.n_embd, d.n_vocab], spread(d.n_embd));
        tensors
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Shape {
    type Err = String;

    fn from_str(name: &str) -> Result<Shape, String> {
        Shape::all().find(|shape| shape.name() == name).ok_or_else(|| {
            let names: Vec<_> = Shape::all().map(Shape::name).collect();
            format!("unknown shape {name:?}: expected one of {}", names.join(", "))
        })
    }
}

/// llama.cpp's `llama_ftype`, which it shows as the model's type.
fn file_type(ty: GgmlType) -> u32 {
    match ty {
        GgmlType::F32 => 0,
        GgmlType::F16 => 1,
        GgmlType::Q4_0 => 2,
        GgmlType::Q8_0 => 7,
        GgmlType::Q4_K => 14,
        GgmlType::Q5_K => 16,
        GgmlType::Q6_K => 18,
        GgmlType::BF16 => 32,
        GgmlType::Vq(_) => unreachable!("no generated model has codes: synth::write checks"),
    }
}
