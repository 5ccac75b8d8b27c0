//! Keys and values of one timeline.

use outrigger_experts::ops::{KvSide, KvTensor, KvType, store};
use outrigger_experts::{ModelSpec, Pool};

/// A session's keys and values by layer; truncating is free, cloning copies what the clone can see.
#[derive(Debug)]
pub(crate) struct KvCache {
    layers: Vec<LayerKv>,
    capacity: usize,
    /// Positions that are written.
    len: usize,
}

/// Keys and values of one layer.
#[derive(Debug)]
pub(crate) struct LayerKv {
    pub(crate) keys: KvTensor,
    pub(crate) values: KvTensor,
}

impl KvCache {
    /// Room for `capacity` positions. The memory is only reserved; the system commits it as positions are written.
    pub(crate) fn new(spec: &ModelSpec, ty: KvType, capacity: usize) -> KvCache {
        let tensor = |side| KvTensor::new(side, ty, spec.n_kv_heads, capacity, spec.head_dim);
        let layer = |_| LayerKv { keys: tensor(KvSide::Keys), values: tensor(KvSide::Values) };
        let layers = (0..spec.n_layers).map(layer).collect();
        KvCache { layers, capacity, len: 0 }
    }

    /// The memory of a cache of `capacity` positions once all are written.
    pub(crate) fn bytes(spec: &ModelSpec, ty: KvType, capacity: usize) -> u64 {
        (spec.n_layers * 2 * spec.n_kv_heads * ty.bytes(spec.head_dim, capacity)) as u64
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
        pool: &Pool,
        layer: usize,
        positions: &[usize],
        keys: &[f32],
        values: &[f32],
    ) {
        let kv = &mut self.layers[layer];
        store(pool, positions, [(&mut kv.keys, keys), (&mut kv.values, values)]);
    }
}

impl Clone for KvCache {
    fn clone(&self) -> KvCache {
        let layer = |kv: &LayerKv| LayerKv {
            keys: kv.keys.copy_of(self.len),
            values: kv.values.copy_of(self.len),
        };
        KvCache { layers: self.layers.iter().map(layer).collect(), ..*self }
    }
}
