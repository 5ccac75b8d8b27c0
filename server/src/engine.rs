//! The arithmetic: experts of one layer over one batch of requests.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use outrigger_experts::{
    Activations, Elsewhere, ExpertStore, FfnScratch, Group, Pool, run_experts,
};
use outrigger_proto::encoding::{Decoded, encode_f16, encode_f32, encode_f48};
use outrigger_proto::v1::Encoding;
use tokio::time::Instant;
use tonic::Status;

use crate::metrics::Metrics;
use crate::request::Work;
use crate::shard::Shard;
use crate::{Result, ServerConfig};

/// Runs batches, one at a time. Its buffers stay between them.
pub(crate) struct Engine {
    width: usize,
    pub(crate) store: Arc<ExpertStore>,
    pool: Pool,
    activations: Activations,
    scratch: FfnScratch,
    /// `[rows of the batch, width]`
    sums: Vec<f64>,
    metrics: Arc<Metrics>,
}

/// What one request gets back.
#[derive(Debug)]
pub(crate) struct Sums {
    pub(crate) encoding: Encoding,
    pub(crate) bytes: Bytes,
    /// Experts that are held but cannot be read, ascending.
    pub(crate) unreadable: Vec<u32>,
    pub(crate) compute_us: u32,
}

/// Of each expert the rows of the whole batch that it runs for.
type Merged = BTreeMap<u16, Vec<(u32, f32)>>;

impl Engine {
    pub(crate) fn new(
        shard: &Shard,
        config: &ServerConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Engine> {
        let model = Arc::clone(&shard.model);
        Ok(Engine {
            width: shard.width(),
            store: Arc::new(ExpertStore::open(model, config.expert_cache, Elsewhere::Cold)?),
            pool: Pool::new(config.threads),
            activations: Activations::new(shard.width()),
            scratch: FfnScratch::default(),
            sums: Vec::new(),
            metrics,
        })
    }

    /// Runs requests of one layer and one form of activations together. Each gets the bits that it
    /// would get alone: a row's experts are added up in ascending order, whatever else is there.
    pub(crate) fn run(&mut self, batch: &[&Work]) -> Vec<Result<Sums, Status>> {
        let started = Instant::now();
        load(&mut self.activations, batch);
        self.sums.clear();
        self.sums.resize(self.activations.rows() * self.width, 0.0);
        let unreadable = match self.add_experts(batch[0].layer, &merge(batch)) {
            Ok(unreadable) => unreadable,
            Err(status) => return batch.iter().map(|_| Err(status.clone())).collect(),
        };
        let took = started.elapsed();
        self.count(batch, unreadable.len(), took);
        let compute_us = took.as_micros().try_into().unwrap_or(u32::MAX);

        let mut rest = self.sums.as_slice();
        batch
            .iter()
            .map(|work| {
                let sums = rest.split_off(..work.rows * self.width).expect("the rows of the batch");
                let (encoding, bytes) = encode(sums, work.reply)?;
                let asked = work.groups.iter().map(|group| group.expert);
                let unreadable = asked.filter(|e| unreadable.contains(e)).map(u32::from).collect();
                Ok(Sums { encoding, bytes, unreadable, compute_us })
            })
            .collect()
    }

    fn count(&self, batch: &[&Work], unreadable: usize, took: Duration) {
        let (layer, metrics) = (batch[0].layer, &self.metrics);
        let rows: usize = batch.iter().map(|work| work.rows).sum();
        metrics.batches.inc();
        metrics.rows.inc_by(rows as u64);
        metrics.expert_rows.inc_by(batch.iter().map(|work| work.expert_rows() as u64).sum());
        metrics.compute.inc_by(took.as_secs_f64());
        metrics.unreadable.inc_by(unreadable as u64);
        let requests = || batch.iter().filter_map(|work| work.trace.as_deref()).collect::<Vec<_>>();
        let took_us = took.as_micros() as u64;
        tracing::debug!(layer, rows, took_us, requests = ?requests(), "batch");
    }

    /// Adds every expert's weighted outputs to `sums`; returns those that cannot be read.
    fn add_experts(&mut self, layer: usize, merged: &Merged) -> Result<Vec<u16>, Status> {
        let experts: Vec<u16> = merged.keys().copied().collect();
        let mut unreadable = Vec::new();
        for experts in experts.chunks(self.store.at_once(layer)) {
            let mut pinned = self.store.acquire(layer, experts).map_err(|error| {
                let why = &error as &dyn std::error::Error;
                tracing::error!(layer, error = why, "cannot have experts");
                Status::internal("cannot have the experts of this layer")
            })?;
            loop {
                let arrived = pinned.arrivals();
                if arrived.is_empty() {
                    break;
                }
                let groups: Vec<Group<'_>> = arrived
                    .iter()
                    .map(|(id, expert)| Group {
                        gate_proj: expert.gate_proj.mat(),
                        up_proj: expert.up_proj.mat(),
                        down_proj: expert.down_proj.mat(),
                        rows: &merged[id],
                    })
                    .collect();
                let (x, scratch) = (&mut self.activations, &mut self.scratch);
                run_experts(&self.pool, x, &groups, scratch, &mut self.sums);
            }
            unreadable.extend(pinned.refused().iter().map(|refused| refused.expert));
        }
        Ok(unreadable)
    }
}

/// Takes the rows of all requests, one below the other.
fn load(activations: &mut Activations, batch: &[&Work]) {
    let rows = batch.iter().map(|work| work.rows).sum();
    match joined(batch).as_ref() {
        Decoded::F32(values) => activations.set(values),
        Decoded::Q80 { scales, quants } => activations.set_q8_0(rows, scales, quants),
        Decoded::Q8K { scales, quants } => activations.set_q8_k(rows, scales, quants),
    }
}

/// The activations of all requests, which the queue made sure are of one form.
fn joined<'a>(batch: &[&'a Work]) -> Cow<'a, Decoded> {
    let mut joined = Cow::Borrowed(&batch[0].activations);
    for work in &batch[1..] {
        match (joined.to_mut(), &work.activations) {
            (Decoded::F32(all), Decoded::F32(values)) => all.extend_from_slice(values),
            (
                Decoded::Q80 { scales: all_scales, quants: all_quants },
                Decoded::Q80 { scales, quants },
            )
            | (
                Decoded::Q8K { scales: all_scales, quants: all_quants },
                Decoded::Q8K { scales, quants },
            ) => {
                all_scales.extend_from_slice(scales);
                all_quants.extend_from_slice(quants);
            }
            _ => unreachable!("a batch has one form of activations"),
        }
    }
    joined
}

/// Groups by expert over all requests, rows counted through the whole batch.
fn merge(batch: &[&Work]) -> Merged {
    let mut merged = Merged::new();
    let mut first = 0;
    for work in batch {
        for group in &work.groups {
            let rows = group.rows.iter().map(|&(row, weight)| (first + row, weight));
            merged.entry(group.expert).or_default().extend(rows);
        }
        first += work.rows as u32;
    }
    merged
}

/// Sums that are no finite f32 are not sent, in any encoding: the device would take the server for
/// broken. Those that an f16 cannot hold are sent as f32.
fn encode(sums: &[f64], reply: Encoding) -> Result<(Encoding, Bytes), Status> {
    if sums.iter().any(|&sum| !(sum as f32).is_finite()) {
        return Err(Status::data_loss("the sums are not finite numbers"));
    }
    if reply == Encoding::F48 {
        return Ok((Encoding::F48, encode_f48(sums)));
    }
    let sums: Vec<f32> = sums.iter().map(|&sum| sum as f32).collect();
    let halves = if reply == Encoding::F16 { encode_f16(&sums) } else { None };
    Ok(match halves {
        Some(halves) => (Encoding::F16, halves),
        None => (Encoding::F32, encode_f32(&sums)),
    })
}

#[cfg(test)]
mod tests;
