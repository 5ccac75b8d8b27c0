//! The forward pass, as the papers write it: embed, attend, experts, read out.

use std::time::Duration;

use crate::engine::Engine;
use crate::error::Result;
use crate::kv::KvCache;
use crate::moe::{Moe, MoeScratch};
use crate::pass::Pass;
use crate::trunk::TrunkLayer;
use outrigger_experts::ops::{self, Attention, AttentionScratch, attend};
use outrigger_experts::{
    Activations, LayerTensors, ModelSpec, Tensor, dequantize, matmul, matmul_many,
};
use outrigger_router::Routing;

/// Buffers that one session reuses from pass to pass.
pub(crate) struct Scratch {
    positions: Vec<usize>,
    /// The residual stream, `[rows, width]`; after a pass, what is read out.
    x: Vec<f32>,
    /// The normed residual stream.
    h: Activations,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    parts: AttentionScratch,
    /// What attention sums up, `[rows, heads * head_dim]`.
    attended: Activations,
    /// Attention's output, `[rows, width]`.
    o: Vec<f32>,
    moe: MoeScratch,
}

impl Scratch {
    pub(crate) fn new(spec: &ModelSpec) -> Scratch {
        Scratch {
            positions: Vec::new(),
            x: Vec::new(),
            h: Activations::new(spec.n_embd),
            q: Vec::new(),
            k: Vec::new(),
            v: Vec::new(),
            parts: AttentionScratch::default(),
            attended: Activations::new(spec.n_heads * spec.head_dim),
            o: Vec::new(),
            moe: MoeScratch::default(),
        }
    }

    /// The residual stream, `[rows, width]`.
    pub(crate) fn stream(&self) -> &Vec<f32> {
        &self.x
    }

    /// Exchanges the residual stream for that of other rows.
    pub(crate) fn place(&mut self, rows: &[Row], stream: &mut Vec<f32>) {
        self.positions.clear();
        self.positions.extend(rows.iter().map(|row| row.position));
        std::mem::swap(&mut self.x, stream);
    }

    /// What the last layer's experts read, `[rows, width]`.
    pub(crate) fn normed(&self) -> &[f32] {
        self.h.f32()
    }

    /// What the last layer's gate chose.
    pub(crate) fn routing(&self) -> &Routing {
        self.moe.routing()
    }

    /// logits = W_out norm(x), `[rows, vocab]`, of some of the last pass's rows, by index.
    pub(crate) fn read_out(&mut self, engine: &Engine, rows: &[usize], logits: &mut Vec<f32>) {
        let (width, eps) = (engine.model.spec.n_embd, engine.model.spec.norm_eps);
        let Scratch { x, h, .. } = self;
        engine.pool.for_rows(h.reset(rows.len()), width, |i, h| {
            ops::rms_norm(&x[rows[i] * width..][..width], &engine.trunk.output_norm, eps, h);
        });
        multiply(engine, &engine.model.output, h, logits);
    }
}

/// One row of a pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) token: u32,
    /// Where it is in the text; its keys and values take the place of any that the cache holds there.
    pub(crate) position: usize,
}

/// One pass over some rows of one session.
pub(crate) struct Forward<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) kv: &'a mut KvCache,
    pub(crate) scratch: &'a mut Scratch,
}

impl Forward<'_> {
    /// Computes `rows`, positions ascending: those that the cache holds already again, and new ones behind it. Every
    /// row sees the others before it as this pass makes them.
    pub(crate) async fn run(mut self, rows: &[Row]) -> Result<Pass> {
        let mut patience = self.engine.config.patience(rows.len());
        let mut pass = Pass::new(rows.len());
        self.embed(rows);
        for layer in 0..self.engine.model.layers.len() {
            self.layer(layer, &mut patience, &mut pass).await?;
            // Others get their turn, and whoever has waited long enough can give up.
            tokio::task::yield_now().await;
        }
        self.kv.commit(rows.last().map_or(0, |row| row.position + 1));
        Ok(pass)
    }

    /// x += attention(x); x += experts(norm(x)), which waits for servers no longer than `patience`, less what it waited.
    pub(crate) async fn layer(
        &mut self,
        layer: usize,
        patience: &mut Duration,
        pass: &mut Pass,
    ) -> Result<()> {
        let engine = self.engine;
        let tensors = &engine.model.layers[layer];
        self.attend(layer, tensors);
        self.norm(&engine.trunk.layers[layer].ffn_norm);
        let Scratch { positions, x, h, moe, .. } = &mut *self.scratch;
        multiply(engine, &tensors.router, h, &mut moe.router_logits);
        let token = positions.first().map_or(0, |position| *position);
        Moe { engine, layer, token, patience, h, scratch: moe, pass }.run(x).await
    }

    /// x = the rows' embeddings
    pub(crate) fn embed(&mut self, rows: &[Row]) {
        let (table, width) = (&self.engine.model.token_embd, self.engine.model.spec.n_embd);
        let row_bytes = table.byte_len() / table.rows();
        let Scratch { positions, x, .. } = &mut *self.scratch;
        positions.clear();
        positions.extend(rows.iter().map(|row| row.position));
        x.resize(rows.len() * width, 0.0);
        for (row, x) in rows.iter().zip(x.chunks_exact_mut(width)) {
            let bytes = &table.bytes()[row.token as usize * row_bytes..][..row_bytes];
            dequantize(table.ty(), bytes, x);
        }
    }

    /// x += W_o attention(rope(norm(W_q h)), rope(norm(W_k h)), W_v h)
    fn attend(&mut self, layer: usize, tensors: &LayerTensors) {
        let engine = self.engine;
        let small = &engine.trunk.layers[layer];
        self.norm(&small.attn_norm);
        self.project(tensors, small);
        let spec = &engine.model.spec;
        let Scratch { positions, x, q, k, v, parts, attended, o, .. } = &mut *self.scratch;
        norm_and_turn(engine, positions, (q, spec.n_heads), small.q_norm.as_deref());
        norm_and_turn(engine, positions, (k, spec.n_kv_heads), small.k_norm.as_deref());
        self.kv.store(&engine.pool, layer, positions, k, v);
        let kv = self.kv.layer(layer);
        let attention = Attention {
            n_heads: spec.n_heads,
            n_kv_heads: spec.n_kv_heads,
            head_dim: spec.head_dim,
            scale: 1.0 / (spec.head_dim as f32).sqrt(),
        };
        attend(
            &engine.pool,
            &attention,
            q,
            (&kv.keys, &kv.values),
            positions,
            parts,
            attended.reset(positions.len()),
        );
        multiply(engine, &tensors.o, attended, o);
        let width = spec.n_embd;
        engine.pool.for_rows(x, width, |row, x| ops::add(&o[row * width..][..width], x));
    }

    /// h = norm(x)
    fn norm(&mut self, weight: &[f32]) {
        let (width, eps) = (weight.len(), self.engine.model.spec.norm_eps);
        let Scratch { x, h, .. } = &mut *self.scratch;
        self.engine.pool.for_rows(h.reset(x.len() / width), width, |row, h| {
            ops::rms_norm(&x[row * width..][..width], weight, eps, h);
        });
    }

    /// q, k, v = W h + b, all three in one parallel region.
    fn project(&mut self, tensors: &LayerTensors, small: &TrunkLayer) {
        let Scratch { h, q, k, v, .. } = &mut *self.scratch;
        let (pool, rows) = (&self.engine.pool, h.rows());
        for (weight, out) in [(&tensors.q, &mut *q), (&tensors.k, &mut *k), (&tensors.v, &mut *v)] {
            out.resize(rows * weight.rows(), 0.0);
        }
        let all = &mut [
            (tensors.q.mat(), &mut q[..]),
            (tensors.k.mat(), &mut k[..]),
            (tensors.v.mat(), &mut v[..]),
        ];
        matmul_many(pool, all, h);
        let biases = [(&small.q_bias, q), (&small.k_bias, k), (&small.v_bias, v)];
        for (bias, out) in biases {
            let Some(bias) = bias else { continue };
            pool.for_rows(out, bias.len(), |_, row| ops::add(bias, row));
        }
    }
}

/// out = W h, `[rows, w.rows()]`.
fn multiply(engine: &Engine, weight: &Tensor, h: &mut Activations, out: &mut Vec<f32>) {
    out.resize(h.rows() * weight.rows(), 0.0);
    matmul(&engine.pool, weight.mat(), h, out);
}

/// values = rope(norm(values)), `[rows, heads, head_dim]`; what is normed is each group of the weight's length: a head
/// (Qwen3) or the whole row (OLMoE).
fn norm_and_turn(
    engine: &Engine,
    positions: &[usize],
    (values, heads): (&mut [f32], usize),
    weight: Option<&[f32]>,
) {
    let (rope, spec) = (&engine.trunk.rope, &engine.model.spec);
    engine.pool.for_rows(values, heads * spec.head_dim, |row, values| {
        if let Some(weight) = weight {
            let groups = values.chunks_exact_mut(weight.len());
            groups.for_each(|group| ops::rms_norm_in_place(group, weight, spec.norm_eps));
        }
        rope.turn(values, positions[row]);
    });
}
