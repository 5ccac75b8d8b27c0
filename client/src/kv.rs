//! Keys and values of one timeline.

use half::f16;
use outrigger_experts::{ModelSpec, ops};

/// A session's keys and values, f16, by layer; truncating is free, cloning copies what the clone can see.
#[derive(Debug)]
pub(crate) struct KvCache {
    layers: Vec<LayerKv>,
    head_dim: usize,
    capacity: usize,
    /// Positions that are written.
    len: usize,
}

/// Keys and values of one layer, each `[kv_heads, capacity, head_dim]`.
#[derive(Debug)]
pub(crate) struct LayerKv {
    pub(crate) keys: Vec<f16>,
    pub(crate) values: Vec<f16>,
}

impl KvCache {
    /// Room for `capacity` positions. The memory is only reserved; the system commits it as positions are written.
    pub(crate) fn new(spec: &ModelSpec, capacity: usize) -> KvCache {
        let values = spec.n_kv_heads * capacity * spec.head_dim;
        let layer = |_| LayerKv { keys: zeroed(values), values: zeroed(values) };
        let layers = (0..spec.n_layers).map(layer).collect();
        KvCache { layers, head_dim: spec.head_dim, capacity, len: 0 }
    }

    /// The memory of a cache of `capacity` positions once all are written.
    pub(crate) fn bytes(spec: &ModelSpec, capacity: usize) -> u64 {
        let values = spec.n_layers * 2 * spec.n_kv_heads * capacity * spec.head_dim;
        (values * size_of::<f16>()) as u64
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets every position from `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Counts the positions before `len` as written, after every layer stored them.
    pub(crate) fn commit(&mut self, len: usize) {
        self.len = self.len.max(len);
    }

    pub(crate) fn layer(&self, layer: usize) -> &LayerKv {
        &self.layers[layer]
    }

    /// Stores the keys and values of `layer`, each `[rows, kv_heads, head_dim]`, at `positions`, `[rows]`.
    pub(crate) fn store(
        &mut self,
        layer: usize,
        positions: &[usize],
        keys: &[f32],
        values: &[f32],
    ) {
        let (dim, capacity) = (self.head_dim, self.capacity);
        let kv = &mut self.layers[layer];
        let kv_heads = kv.keys.len() / (capacity * dim);
        for (into, from) in [(&mut kv.keys, keys), (&mut kv.values, values)] {
            for (i, head) in from.chunks_exact(dim).enumerate() {
                let (row, kv_head) = (i / kv_heads, i % kv_heads);
                let at = (kv_head * capacity + positions[row]) * dim;
                ops::to_f16(head, &mut into[at..at + dim]);
            }
        }
    }
}

impl Clone for KvCache {
    fn clone(&self) -> KvCache {
        let (dim, capacity, used) = (self.head_dim, self.capacity, self.len * self.head_dim);
        let copy = |all: &Vec<f16>| {
            let mut copy = zeroed(all.len());
            for (to, from) in
                copy.chunks_exact_mut(capacity * dim).zip(all.chunks_exact(capacity * dim))
            {
                to[..used].copy_from_slice(&from[..used]);
            }
            copy
        };
        let layer = |kv: &LayerKv| LayerKv { keys: copy(&kv.keys), values: copy(&kv.values) };
        KvCache { layers: self.layers.iter().map(layer).collect(), ..*self }
    }
}

/// Zeros straight from the system, so that untouched pages cost nothing.
fn zeroed(len: usize) -> Vec<f16> {
    vec![f16::ZERO; len]
}
