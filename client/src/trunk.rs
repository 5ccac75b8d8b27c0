//! The trunk's small vectors, decoded once: norms, biases and rotary frequencies. Its matrices stay in the map.

use outrigger_experts::{Model, RopeStyle, Tensor, ops};

/// What the forward pass reads besides matrices.
pub(crate) struct Trunk {
    pub(crate) layers: Vec<TrunkLayer>,
    pub(crate) output_norm: Vec<f32>,
    pub(crate) rope: Rope,
}

/// One layer's norms and biases; the fields are those of [`outrigger_experts::LayerTensors`].
pub(crate) struct TrunkLayer {
    pub(crate) attn_norm: Vec<f32>,
    pub(crate) ffn_norm: Vec<f32>,
    pub(crate) q_norm: Option<Vec<f32>>,
    pub(crate) k_norm: Option<Vec<f32>>,
    pub(crate) q_bias: Option<Vec<f32>>,
    pub(crate) k_bias: Option<Vec<f32>>,
    pub(crate) v_bias: Option<Vec<f32>>,
}

impl Trunk {
    pub(crate) fn new(model: &Model) -> Trunk {
        let optional = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::to_f32);
        let layers = model.layers.iter().map(|layer| TrunkLayer {
            attn_norm: layer.attn_norm.to_f32(),
            ffn_norm: layer.ffn_norm.to_f32(),
            q_norm: optional(&layer.q_norm),
            k_norm: optional(&layer.k_norm),
            q_bias: optional(&layer.q_bias),
            k_bias: optional(&layer.k_bias),
            v_bias: optional(&layer.v_bias),
        });
        let layers = layers.collect();
        Trunk { layers, output_norm: model.output_norm.to_f32(), rope: Rope::new(model) }
    }
}

/// Pairs of a head at most.
const MAX_PAIRS: usize = ops::Attention::MAX_HEAD_DIM / 2;

/// Rotary position embedding (Su et al. 2021, arXiv 2104.09864).
pub(crate) struct Rope {
    style: RopeStyle,
    head_dim: usize,
    /// Angle a position, by pair.
    frequencies: Vec<f32>,
}

impl Rope {
    fn new(model: &Model) -> Rope {
        let spec = &model.spec.rope;
        let mut frequencies = ops::rope_frequencies(spec.dim, spec.base, spec.scale);
        if let Some(divisors) = &model.rope_freqs {
            frequencies.iter_mut().zip(divisors.to_f32()).for_each(|(f, divisor)| *f /= divisor);
        }
        Rope { style: spec.style, head_dim: model.spec.head_dim, frequencies }
    }

    /// Turns the heads of the row at `position`, `[heads, head_dim]`.
    pub(crate) fn turn(&self, values: &mut [f32], position: usize) {
        let (mut cos, mut sin) = ([0.0; MAX_PAIRS], [0.0; MAX_PAIRS]);
        let pairs = self.frequencies.len();
        let (cos, sin) = (&mut cos[..pairs], &mut sin[..pairs]);
        ops::rope_angles(position, &self.frequencies, cos, sin);
        match self.style {
            RopeStyle::Norm => ops::rope_norm(values, self.head_dim, cos, sin),
            RopeStyle::Neox => ops::rope_neox(values, self.head_dim, cos, sin),
        }
    }
}
