//! One layer's experts: route, place, dispatch, run what is here meanwhile, combine, repair what is missing.

use std::time::Duration;

use outrigger_experts::{
    ActFormat, Activations, ExpertTensors, FfnScratch, Pool, StandIn, matmul, run_experts,
};
use outrigger_router::{
    Group, Partial, Placement, Prior, Residency, Routing, combine, favoured, group, place, repair,
};
use tokio::time::Instant;

use crate::config::{Elsewhere, OnMiss};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::fleet::{Landed, Outgoing, Roster};
use crate::pass::Pass;

/// Buffers that one session reuses from layer to layer.
#[derive(Default)]
pub(crate) struct MoeScratch {
    pub(crate) router_logits: Vec<f32>,
    routing: Routing,
    ffn: FfnScratch,
    /// The shared expert's output, `[rows, width]`.
    shared: Vec<f64>,
    /// What the routed experts add up to.
    sum: Partial,
    /// Routed weight of each row that approximations stood in for.
    stood_in: Vec<f64>,
}

impl MoeScratch {
    /// What the gate chose last.
    pub(crate) fn routing(&self) -> &Routing {
        &self.routing
    }
}

/// One layer's work on one batch of rows.
pub(crate) struct Moe<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) layer: usize,
    /// Position of the first row.
    pub(crate) token: usize,
    /// How long the pass may still wait for servers. What it computes meanwhile does not count.
    pub(crate) patience: &'a mut Duration,
    /// The normed rows.
    pub(crate) h: &'a mut Activations,
    pub(crate) scratch: &'a mut MoeScratch,
    pub(crate) pass: &'a mut Pass,
}

impl Moe<'_> {
    /// Adds to `x`, `[rows, width]`, the shared expert and the routed experts of `h`, as `scratch.router_logits`
    /// choose them.
    ///
    /// # Errors
    /// [`Error::Missing`] where the configuration says to fail rather than degrade.
    pub(crate) async fn run(mut self, x: &mut [f32]) -> Result<()> {
        self.route();
        if let Some(trace) = &self.engine.trace {
            trace.record(self.layer, &self.scratch.routing)?;
        }
        let engine = self.engine;
        let mut work = group(&self.scratch.routing);
        let mut missing = Vec::new();
        let mut failed = Vec::new();
        let mut first = true;
        // A second round only happens when a server or a file failed in the first.
        while !work.is_empty() {
            let placement = self.place(&work, &failed);
            work = Vec::new();
            if !placement.missing.is_empty() {
                let retry = self.on_missing(placement.missing, &mut missing, &mut failed).await?;
                work.extend(retry);
            }
            let patience = *self.patience;
            let outgoing = self.outgoing(placement.remote);
            let flight = engine.fleet.start(outgoing, patience).await;
            if std::mem::take(&mut first) {
                self.run_shared();
                self.run_favoured()?;
            }
            work.extend(self.run_local(&placement.local)?);
            let waiting = Instant::now();
            let landed = flight.land().await;
            *self.patience = patience.saturating_sub(waiting.elapsed());
            work.extend(self.merge(landed, &mut failed));
        }
        self.admit(&missing)?;
        self.repair(&missing)?;
        self.add_to(x);
        for row in 0..self.scratch.routing.rows() {
            let (arrived, routed) = (self.scratch.sum.mass[row], self.scratch.routing.mass(row));
            self.pass.add_mass(row, arrived, self.scratch.stood_in[row], routed);
        }
        Ok(())
    }

    fn route(&mut self) {
        let engine = self.engine;
        // Connected, the model's own choice is to be had.
        let strength = if engine.fleet.any_up() { 0.0 } else { engine.config.prior };
        let mut resident = Vec::new();
        if strength > 0.0 {
            let hot = |residency: &Residency| *residency == Residency::Hot;
            resident.extend(engine.residency(self.layer).iter().map(hot));
        }
        let scratch = &mut *self.scratch;
        let prior = (strength > 0.0).then_some(Prior { resident: &resident, strength });
        engine.gate.route_with(&scratch.router_logits, prior, &mut scratch.routing);
        let (rows, width) = (scratch.routing.rows(), self.h.cols());
        let shared = engine.model.layers[self.layer].shared.is_some();
        reset(&engine.pool, &mut scratch.sum.sums, rows, width);
        reset(&engine.pool, &mut scratch.shared, if shared { rows } else { 0 }, width);
        reset(&engine.pool, &mut scratch.sum.mass, rows, 1);
        reset(&engine.pool, &mut scratch.stood_in, rows, 1);
    }

    fn place(&self, work: &[Group], failed: &[u16]) -> Placement {
        let engine = self.engine;
        // An answer that nobody would wait for is not asked for.
        let roster = match self.patience.is_zero() {
            true => Roster::default(),
            false => engine.fleet.roster(failed),
        };
        let cold_load = engine.store.cold_load(self.layer);
        place(work, &engine.residency(self.layer), &roster.sites(self.layer), cold_load)
    }

    fn outgoing(&mut self, shares: Vec<(u16, Vec<Group>)>) -> Outgoing<'_> {
        let format = self.wire_format();
        if !shares.is_empty() {
            self.h.quantize_with(&self.engine.pool, format);
        }
        Outgoing { layer: self.layer, token: self.token, shares, x: self.h, format }
    }

    /// The form in which the experts of the layer read their input, so that the wire rounds nothing that the device
    /// would not have rounded; plain floats where the two matrices differ.
    fn wire_format(&self) -> ActFormat {
        self.engine.model.experts[self.layer].input_format()
    }

    /// The shared expert is one more expert, whose weight is the sigmoid of its own gate (Qwen2-MoE).
    fn run_shared(&mut self) {
        let Some(shared) = &self.engine.model.layers[self.layer].shared else { return };
        let mut logits = vec![0.0; self.h.rows()];
        matmul(&self.engine.pool, shared.gate_inp.mat(), self.h, &mut logits);
        let weights = logits.into_iter().map(|logit| 1.0 / (1.0 + (-logit).exp()));
        let rows: Vec<_> = (0..).zip(weights).collect();
        let group = outrigger_experts::Group {
            gate_proj: shared.gate_proj.mat(),
            up_proj: shared.up_proj.mat(),
            down_proj: shared.down_proj.mat(),
            rows: &rows,
        };
        let MoeScratch { ffn, shared, .. } = &mut *self.scratch;
        run_experts(&self.engine.pool, self.h, &[group], ffn, shared);
    }

    /// Runs what a prior put in place of the model's own choice. It does not count into coverage.
    fn run_favoured(&mut self) -> Result<()> {
        let favoured = favoured(&self.scratch.routing);
        if favoured.is_empty() {
            return Ok(());
        }
        let (ran, _) = self.run_here(&favoured)?;
        self.pass.tally.missing += calls(&favoured);
        self.pass.tally.substituted += calls(&ran);
        Ok(())
    }

    /// Runs groups on the device and counts them; gives back those whose weights could not be read.
    fn run_local(&mut self, groups: &[Group]) -> Result<Vec<Group>> {
        let (ran, unread) = self.run_here(groups)?;
        self.scratch.sum.cover(&ran);
        self.pass.tally.local += calls(&ran);
        Ok(unread)
    }

    /// Runs those of `groups` whose weights can be read; gives back them and the others. What is here runs while the
    /// rest is read, in ascending order of experts all the same: sums do not depend on what was in memory.
    fn run_here(&mut self, groups: &[Group]) -> Result<(Vec<Group>, Vec<Group>)> {
        let (engine, layer) = (self.engine, self.layer);
        let MoeScratch { ffn, sum, .. } = &mut *self.scratch;
        let mut unread = Vec::new();
        for groups in groups.chunks(engine.store.at_once(layer)) {
            let ids: Vec<u16> = groups.iter().map(|group| group.expert).collect();
            let mut pinned = engine.store.acquire(layer, &ids)?;
            loop {
                let arrived = pinned.arrivals();
                if arrived.is_empty() {
                    break;
                }
                let rows =
                    |id: u16| groups.iter().find(|group| group.expert == id).map(|g| &g.rows);
                let ready: Vec<_> = arrived
                    .iter()
                    .filter_map(|(id, tensors)| Some(runnable(tensors, rows(*id)?)))
                    .collect();
                run_experts(&engine.pool, self.h, &ready, ffn, &mut sum.sums);
            }
            unread.extend(pinned.refused().iter().map(|refused| refused.expert));
        }
        Ok(groups.iter().cloned().partition(|group| !unread.contains(&group.expert)))
    }

    /// Adds the servers' sums; gives back what they did not run, and notes who.
    fn merge(&mut self, flights: Vec<Landed>, failed: &mut Vec<u16>) -> Vec<Group> {
        let mut left = Vec::new();
        let mut partials = Vec::new();
        for landed in flights {
            self.pass.tally.bytes_up += landed.bytes_up;
            self.pass.tally.bytes_down += landed.bytes_down;
            let Ok(answer) = landed.answer else {
                failed.push(landed.server);
                left.extend(landed.share);
                continue;
            };
            let (not_run, ran): (Vec<_>, Vec<_>) =
                landed.share.into_iter().partition(|group| answer.not_run.contains(&group.expert));
            self.pass.tally.remote += calls(&ran);
            partials.push((landed.server, answer.spread(&ran, self.h.rows(), self.h.cols())));
            if !not_run.is_empty() {
                failed.push(landed.server);
                left.extend(not_run);
            }
        }
        combine(&mut self.scratch.sum, &mut partials);
        left
    }

    /// What nobody can run now is waited for, refused, or counted as missing; gives back what to try again.
    async fn on_missing(
        &mut self,
        groups: Vec<Group>,
        missing: &mut Vec<Group>,
        failed: &mut Vec<u16>,
    ) -> Result<Vec<Group>> {
        match self.engine.config.on_miss {
            OnMiss::Degrade => {
                missing.extend(groups);
                Ok(Vec::new())
            }
            OnMiss::Wait => {
                self.engine.fleet.wait_for_change().await;
                failed.clear();
                *self.patience = self.engine.config.patience(self.pass.rows());
                Ok(groups)
            }
            OnMiss::Fail => Err(Error::Missing {
                layer: self.layer,
                experts: groups.iter().map(|group| group.expert).collect(),
                reason: self.fault(),
            }),
        }
    }

    /// Why experts are missing.
    fn fault(&self) -> String {
        match self.patience.is_zero() {
            true => "the token has waited for servers as long as it may".to_owned(),
            false => self.engine.fleet.last_fault(),
        }
    }

    /// A device that holds no more than its cache learns its experts while it is connected, and only then.
    fn admit(&mut self, missing: &[Group]) -> Result<()> {
        let engine = self.engine;
        let absent = engine.config.elsewhere == Elsewhere::Absent;
        if absent && missing.is_empty() && engine.fleet.any_up() {
            let mut used = self.scratch.routing.experts.clone();
            used.sort_unstable();
            used.dedup();
            engine.store.admit(self.layer, &used)?;
        }
        Ok(())
    }

    /// Adds the approximations of experts that cannot run; gives back those that have none. What is stood in for
    /// survives, and does not count into coverage.
    fn run_standins(&mut self, missing: &[Group]) -> Vec<Group> {
        let engine = self.engine;
        let MoeScratch { ffn, sum, stood_in, .. } = &mut *self.scratch;
        let (mut copies, mut lost) = (Vec::new(), Vec::new());
        for group in missing {
            match engine.standin(self.layer, group.expert) {
                Some(StandIn::Copy(tensors)) => copies.push(runnable(tensors, &group.rows)),
                Some(StandIn::Mean(mean)) => add_mean(&mean.to_f32(), &group.rows, &mut sum.sums),
                None => {
                    lost.push(group.clone());
                    continue;
                }
            }
            for &(row, weight) in &group.rows {
                stood_in[row as usize] += f64::from(weight);
            }
        }
        run_experts(&engine.pool, self.h, &copies, ffn, &mut sum.sums);
        self.pass.tally.standin += calls(missing) - calls(&lost);
        lost
    }

    /// Adds the experts' sums to the residual stream.
    fn add_to(&self, x: &mut [f32]) {
        let (width, MoeScratch { sum, shared, .. }) = (self.h.cols(), &*self.scratch);
        self.engine.pool.for_rows(x, width, |row, x| {
            let at = row * width..(row + 1) * width;
            let routed = x.iter_mut().zip(&sum.sums[at.clone()]);
            match shared.get(at) {
                Some(shared) => routed.zip(shared).for_each(|((x, a), b)| *x += (a + b) as f32),
                None => routed.for_each(|(x, a)| *x += *a as f32),
            }
        });
    }

    /// Makes the best of the rows that miss experts. What runs instead does not count into coverage.
    fn repair(&mut self, missing: &[Group]) -> Result<()> {
        if missing.is_empty() {
            return Ok(());
        }
        self.pass.tally.missing += calls(missing);
        self.pass.fault = Some(self.fault());
        let experts = || missing.iter().map(|group| group.expert).collect::<Vec<_>>();
        tracing::debug!(token = self.token, layer = self.layer, experts = ?experts(), "missing");
        let engine = self.engine;
        let lost = self.run_standins(missing);
        let residency = engine.residency(self.layer);
        let here: Vec<bool> = residency.iter().map(|place| *place != Residency::Absent).collect();
        let policy = engine.config.policy;
        let repair = repair(policy, &engine.gate, &self.scratch.routing, &lost, &here);
        self.scratch.sum.rescale(&repair.scale);
        let (ran, _) = self.run_here(&repair.extra)?;
        self.pass.tally.substituted += calls(&ran);
        Ok(())
    }
}

/// `rows` rows of `len` zeros.
fn reset(pool: &Pool, values: &mut Vec<f64>, rows: usize, len: usize) {
    values.resize(rows * len, 0.0);
    pool.for_rows(values, len, |_, row| row.fill(0.0));
}

/// A matrix triple with its rows, as the FFN takes it.
fn runnable<'a>(
    tensors: &'a ExpertTensors,
    rows: &'a [(u32, f32)],
) -> outrigger_experts::Group<'a> {
    outrigger_experts::Group {
        gate_proj: tensors.gate_proj.mat(),
        up_proj: tensors.up_proj.mat(),
        down_proj: tensors.down_proj.mat(),
        rows,
    }
}

/// Expert calls in some groups: one a row.
fn calls(groups: &[Group]) -> u64 {
    groups.iter().map(|group| group.rows.len() as u64).sum()
}

/// Adds to the named rows of `sums` the same output, weighted.
fn add_mean(mean: &[f32], rows: &[(u32, f32)], sums: &mut [f64]) {
    for &(row, weight) in rows {
        let sums = &mut sums[row as usize * mean.len()..][..mean.len()];
        sums.iter_mut().zip(mean).for_each(|(sum, y)| *sum += f64::from(weight) * f64::from(*y));
    }
}
