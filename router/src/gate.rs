//! The gate: router logits to the experts of a row and their weights.
//!
//! The order of operations is llama.cpp's (`src/llama-graph.cpp`, `build_moe_ffn`): score, take the
//! top k, softmax over the selected (where that is the model's rule), normalise, scale.

use crate::Prior;

/// The smallest sum that weights are divided by: the smallest normal f16, as in `build_moe_ffn`.
pub(crate) const MIN_WEIGHT_SUM: f64 = 6.103_515_625e-5;

/// The router's arithmetic for one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Gate {
    /// How logits become scores.
    pub scoring: Scoring,
    /// Experts a layer.
    pub n_experts: usize,
    /// Experts that run for each row.
    pub top_k: usize,
    /// Whether the selected weights are divided by their sum (`norm_topk_prob`).
    pub normalise: bool,
    /// Factor on every weight, after normalising.
    pub scale: f32,
}

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Each expert by itself.
    Sigmoid,
    /// Logits select; a softmax over the selected ones weighs.
    SoftmaxAfterTopK,
}

/// What the gate chose for each row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Routing {
    /// Experts a row.
    pub k: usize,
    /// Experts a layer.
    pub n_experts: usize,
    /// `[rows, k]`, best first; a prior's experts are in the places of those that they overtook.
    pub experts: Vec<u16>,
    /// `[rows, k]`, the weights of `experts`.
    pub weights: Vec<f32>,
    /// `[rows, k]`, whether the model itself chose each of `experts`: false for a prior's.
    pub own: Vec<bool>,
    /// `[rows]`, what the model's own choice weighs, on the scale of `weights`.
    pub mass: Vec<f64>,
    /// `[rows, n_experts]`, what selection compares and the weights derive from.
    pub scores: Vec<f32>,
}

impl Gate {
    /// Chooses the experts of every row of `logits`, `[rows, n_experts]`.
    ///
    /// Equal scores go to the lower expert id. A NaN logit counts as minus infinity, so that one
    /// bad number costs an expert and not the process; a row without any finite logit gets `k`
    /// experts of weight 0.
    ///
    /// # Panics
    /// If `logits` is not whole rows, or more experts are to run than there are.
    pub fn route(&self, logits: &[f32]) -> Routing {
        let mut routing = Routing::default();
        self.route_with(logits, None, &mut routing);
        routing
    }

    /// [`route`](Gate::route) into buffers that are used again, with a prior if there is one.
    ///
    /// A strength that is not above 0 is no prior.
    ///
    /// # Panics
    /// As [`route`](Gate::route).
    pub fn route_with(&self, logits: &[f32], prior: Option<Prior<'_>>, out: &mut Routing) {
        let (n, k) = (self.n_experts, self.top_k);
        assert_eq!(logits.len() % n, 0, "logits are whole rows of {n}");
        out.clear(n, k, logits.len() / n);
        let prior = prior.filter(|prior| prior.strength > 0.0);
        let mut own = vec![0; k];
        for (row, logits) in logits.chunks_exact(n).enumerate() {
            let scores = &mut out.scores[row * n..(row + 1) * n];
            let experts = &mut out.experts[row * k..(row + 1) * k];
            for (score, &logit) in scores.iter_mut().zip(logits) {
                *score = finite_or_lowest(logit);
            }
            self.score(scores);
            top_k(scores, experts);
            own.copy_from_slice(experts);
            if let Some(prior) = prior {
                prior.favour(logits, experts);
            }
            let weight = self.weigh(scores, experts);
            out.weights.extend(experts.iter().map(|&e| weight(e)));
            out.own.extend(experts.iter().zip(&own).map(|(expert, own)| expert == own));
            out.mass.push(own.iter().map(|&e| f64::from(weight(e))).sum());
        }
    }

    /// Whether the weights of a row sum to the same whatever was selected. Only then is it right
    /// to let survivors take over the weight of what is missing. A softmax over the selected is a
    /// normalised softmax by another name.
    pub(crate) fn normalises(&self) -> bool {
        self.normalise || self.scoring == Scoring::SoftmaxAfterTopK
    }

    /// What `weigh` divides by when it has selected `experts`; `unit` is from [`Gate::unit`].
    pub(crate) fn divisor(&self, scores: &[f32], unit: f64, experts: &[u16]) -> f64 {
        let sum = || experts.iter().map(|&e| self.raw(scores, unit, e)).sum::<f64>();
        match self.scoring {
            // At least one of a softmax's terms is not small: its sum needs no clamp.
            Scoring::SoftmaxAfterTopK => sum(),
            _ if self.normalise => sum().max(MIN_WEIGHT_SUM),
            _ => 1.0,
        }
    }

    /// An expert's weight before division and scaling.
    pub(crate) fn raw(&self, scores: &[f32], unit: f64, expert: u16) -> f64 {
        let score = f64::from(scores[usize::from(expert)]);
        match self.scoring {
            Scoring::SoftmaxAfterTopK if score == f64::NEG_INFINITY => 0.0,
            Scoring::SoftmaxAfterTopK => (score - unit).exp(),
            _ => score,
        }
    }

    /// The score whose exponential is 1 in [`Gate::raw`]: the largest, so that none overflows.
    pub(crate) fn unit(scores: &[f32], experts: &[u16]) -> f64 {
        let largest = |m: f32, &e: &u16| m.max(scores[usize::from(e)]);
        f64::from(experts.iter().fold(f32::NEG_INFINITY, largest))
    }

    /// Logits to scores, in place.
    fn score(&self, row: &mut [f32]) {
        match self.scoring {
            Scoring::Softmax => softmax(row),
            Scoring::Sigmoid => row.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
            Scoring::SoftmaxAfterTopK => {}
        }
    }

    /// The weight of any expert where `selected` are: the divisor is theirs.
    fn weigh(&self, scores: &[f32], selected: &[u16]) -> impl Fn(u16) -> f32 {
        let unit = Gate::unit(scores, selected);
        let divisor = self.divisor(scores, unit, selected);
        let factor = if divisor > 0.0 { f64::from(self.scale) / divisor } else { 0.0 };
        move |expert| (self.raw(scores, unit, expert) * factor) as f32
    }
}

impl Routing {
    /// Rows that were routed.
    pub fn rows(&self) -> usize {
        self.experts.len().checked_div(self.k).unwrap_or(0)
    }

    /// Makes room for `rows` rows: experts and scores to be written over, the others to be appended.
    fn clear(&mut self, n_experts: usize, k: usize, rows: usize) {
        (self.k, self.n_experts) = (k, n_experts);
        self.experts.resize(rows * k, 0);
        self.scores.resize(rows * n_experts, 0.0);
        self.weights.clear();
        self.own.clear();
        self.mass.clear();
    }

    /// The experts of row `r` with their weights, best first.
    pub fn row(&self, r: usize) -> impl Iterator<Item = (u16, f32)> + '_ {
        let range = r * self.k..(r + 1) * self.k;
        self.experts[range.clone()].iter().copied().zip(self.weights[range].iter().copied())
    }

    /// The calls of row `r` that are the model's own choice, or those that are a prior's.
    pub(crate) fn calls(&self, r: usize, own: bool) -> impl Iterator<Item = (u16, f32)> + '_ {
        let whose = &self.own[r * self.k..];
        self.row(r).zip(whose).filter(move |(_, whose)| **whose == own).map(|(call, _)| call)
    }

    /// The routed weight of row `r`: what [`coverage`](crate::coverage) is measured against. A
    /// prior does not lower it: what it overtook is missing.
    pub fn mass(&self, r: usize) -> f64 {
        self.mass[r]
    }

    /// The scores of row `r`, `[n_experts]`.
    pub fn row_scores(&self, r: usize) -> &[f32] {
        &self.scores[r * self.n_experts..(r + 1) * self.n_experts]
    }
}

/// Writes the ids of the `out.len()` greatest scores, greatest first, equal ones by lower id.
///
/// One pass with insertion: for the few out of many that gates select, all but the first
/// candidates cost one comparison.
pub(crate) fn top_k(scores: &[f32], out: &mut [u16]) {
    let mut found = 0;
    for (id, &score) in scores.iter().enumerate() {
        if found == out.len() {
            match out.last() {
                Some(&last) if score > scores[usize::from(last)] => {}
                _ => continue,
            }
        } else {
            found += 1;
        }
        let mut at = found - 1;
        while at > 0 && score > scores[usize::from(out[at - 1])] {
            out[at] = out[at - 1];
            at -= 1;
        }
        out[at] = id as u16;
    }
    assert_eq!(found, out.len(), "no more experts are selected than there are");
}

/// All zero where nothing is above minus infinity.
fn softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return row.fill(0.0);
    }
    let mut sum = 0.0_f64;
    for x in row.iter_mut() {
        *x = (*x - max).exp();
        sum += f64::from(*x);
    }
    let factor = (1.0 / sum) as f32;
    row.iter_mut().for_each(|x| *x *= factor);
}

fn finite_or_lowest(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
}

#[cfg(test)]
pub(crate) mod tests;
