//! A calibration text through the full model, layer by layer: what each expert sees.

use std::sync::Arc;
use std::time::Duration;

use crate::config::KvType;
use crate::engine::Engine;
use crate::error::Result;
use crate::forward::{Forward, Row, Scratch};
use crate::kv::KvCache;
use crate::pass::Pass;

/// Windows of a text between two layers.
pub(super) struct Walk {
    engine: Arc<Engine>,
    /// The tokens of each window.
    windows: Vec<Vec<Row>>,
    /// The residual stream of each window, `[rows, n_embd]`.
    streams: Vec<Vec<f32>>,
    kv: KvCache,
    scratch: Scratch,
    /// The next layer.
    layer: usize,
}

/// What the experts of one layer see, over all windows.
pub(super) struct Seen {
    /// The normed rows, `[rows, n_embd]`.
    pub(super) x: Vec<f32>,
    /// By expert: each row that is routed to it, and with what weight.
    pub(super) calls: Vec<Vec<(u32, f32)>>,
    /// What the residual stream behind the layer adds up to, squared.
    pub(super) energy: f64,
}

impl Walk {
    /// Before the first layer.
    pub(super) fn new(engine: Arc<Engine>, windows: &[Vec<u32>]) -> Walk {
        let rows = |window: &Vec<u32>| {
            (0..).zip(window).map(|(position, &token)| Row { token, position }).collect()
        };
        let windows: Vec<Vec<Row>> = windows.iter().map(rows).collect();
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
        let mut walk = Walk {
            kv: KvCache::new(engine.spec(), KvType::F16, longest),
            scratch: Scratch::new(engine.spec()),
            streams: Vec::new(),
            layer: 0,
            engine,
            windows,
        };
        for at in 0..walk.windows.len() {
            let rows = std::mem::take(&mut walk.windows[at]);
            walk.forward().embed(&rows);
            let stream = walk.scratch.stream().clone();
            walk.streams.push(stream);
            walk.windows[at] = rows;
        }
        walk
    }

    fn forward(&mut self) -> Forward<'_> {
        Forward { engine: &self.engine, kv: &mut self.kv, scratch: &mut self.scratch }
    }

    /// Takes every window through the next layer.
    pub(super) async fn step(&mut self) -> Result<Seen> {
        let layer = self.layer;
        self.layer += 1;
        let mut seen = Seen {
            x: Vec::new(),
            calls: vec![Vec::new(); self.engine.spec().n_experts],
            energy: 0.0,
        };
        for at in 0..self.windows.len() {
            self.scratch.place(&self.windows[at], &mut self.streams[at]);
            // Nothing is remote, so nothing is waited for.
            let mut patience = Duration::from_secs(3600);
            let mut pass = Pass::new(self.windows[at].len());
            self.forward().layer(layer, &mut patience, &mut pass).await?;
            self.scratch.place(&self.windows[at], &mut self.streams[at]);
            self.record(at, &mut seen);
        }
        self.forget(layer);
        Ok(seen)
    }

    /// Appends what the experts saw in window `at`, which has just passed.
    fn record(&self, at: usize, seen: &mut Seen) {
        let first = (seen.x.len() / self.engine.spec().n_embd) as u32;
        seen.x.extend_from_slice(self.scratch.normed());
        let routing = self.scratch.routing();
        for row in 0..routing.rows() {
            for (expert, weight) in routing.row(row) {
                seen.calls[usize::from(expert)].push((first + row as u32, weight));
            }
        }
        let stream = self.streams[at].iter();
        seen.energy += stream.map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
    }

    /// A layer is passed once: its experts give their memory back.
    fn forget(&self, layer: usize) {
        if layer + 1 < self.engine.spec().n_layers {
            let store = self.engine.store();
            let budget = store.budget_bytes();
            store.resize(0);
            store.resize(budget);
        }
    }
}

impl Seen {
    /// The rows that are routed to expert `e`, `[calls, n_embd]`, and their weights.
    pub(super) fn of(&self, e: usize, n_embd: usize) -> (Vec<f32>, Vec<f32>) {
        let calls = &self.calls[e];
        let rows = calls.iter().map(|&(row, _)| &self.x[row as usize * n_embd..][..n_embd]);
        (rows.flatten().copied().collect(), calls.iter().map(|call| call.1).collect())
    }
}
