//! `outrigger replay`: what the expert cache would have done, from recorded traces and without the model.

mod policy;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum as _};
use outrigger::trace::{Batch, Shape, Trace};
use outrigger::{Budget, CacheStats};
use outrigger_experts::{Cache, LayerStats};

use super::view::{cache_json, line, note, put, table};
use policy::Policy;

/// Replay routing traces against cache sizes and policies.
#[derive(Debug, Args)]
pub(crate) struct Replay {
    /// Traces of one model, as --trace records them; each starts with an empty cache
    #[arg(required = true, value_name = "TRACE")]
    traces: Vec<PathBuf>,
    /// Memory for experts: a size (2GiB) or a share of all experts (40%)
    #[arg(long, value_name = "SIZE|PCT", value_delimiter = ',', default_value = "25%,50%")]
    cache: Vec<Budget>,
    /// Who leaves first
    #[arg(long, value_name = "POLICY", value_delimiter = ',', default_values_t = Policy::value_variants().to_vec())]
    policy: Vec<Policy>,
    /// One JSON object a cache size and policy
    #[arg(long)]
    json: bool,
}

/// What some experts of a lane are used for at once.
struct Use {
    /// Ascending, each once.
    experts: Vec<u16>,
    /// Routed weight of each of `experts`, mean over the rows.
    weights: Vec<f64>,
}

/// A budget and a policy, and what came of them.
struct Outcome {
    cache: Budget,
    policy: Policy,
    stats: CacheStats,
}

impl Replay {
    pub(crate) fn run(self) -> Result<()> {
        let traces = open(&self.traces)?;
        let mut outcomes = Vec::new();
        for &cache in &self.cache {
            for &policy in &self.policy {
                let mut stats = CacheStats::default();
                for trace in &traces {
                    add(&mut stats, replay(trace, cache, policy)?);
                }
                outcomes.push(Outcome { cache, policy, stats });
            }
        }
        match self.json {
            true => outcomes.iter().try_for_each(|outcome| Ok(line(json_view(outcome))?)),
            false => Ok(put(&text_view(&outcomes, &self.cache, &self.policy))?),
        }
    }
}

fn open(paths: &[PathBuf]) -> Result<Vec<Trace>> {
    let mut traces: Vec<Trace> = Vec::new();
    for path in paths {
        let trace = Trace::open(path)?;
        if trace.cut_off {
            note(format!("warning: {} ends within a batch, which is left out", path.display()));
        }
        ensure!(
            traces.first().is_none_or(|first| first.shape == trace.shape),
            "{} is of another model than {}",
            path.display(),
            paths.first().map_or(Path::new(""), PathBuf::as_path).display(),
        );
        traces.push(trace);
    }
    Ok(traces)
}

/// Takes a trace through the engine's own cache, by layer; in one lane for all layers where the policy wants that.
fn replay(trace: &Trace, budget: Budget, policy: Policy) -> Result<CacheStats> {
    let Shape { n_experts, k, ref expert_bytes } = trace.shape;
    let layers = expert_bytes.len();
    let total = expert_bytes.iter().sum::<u64>() * n_experts as u64;
    ensure!(
        layers * n_experts <= usize::from(u16::MAX),
        "{layers} layers of {n_experts} experts: expected at most 65535 in all"
    );
    let (sizes, n_experts, k) = match policy.is_shared() {
        true => (vec![total / (layers * n_experts) as u64], layers * n_experts, layers * k),
        false => (expert_bytes.clone(), n_experts, k),
    };
    let budget = budget.bytes(total)?;
    let at_once = Cache::new(budget, &sizes, n_experts, k);
    let lanes = lanes(trace, policy.is_shared(), |lane| at_once.at_once(lane));
    let eviction = |lane: usize| policy.eviction(&lanes[lane], n_experts, layers);
    let mut cache = Cache::with_eviction(budget, &sizes, n_experts, k, eviction);
    if budget >= total {
        cache.fill();
    }
    for (lane, uses) in lanes.iter().enumerate() {
        for Use { experts, .. } in uses {
            let decision = cache.acquire(lane, experts);
            for _ in &decision.admit {
                cache.count_read(lane);
            }
            cache.release(lane, experts);
        }
    }
    Ok(CacheStats { layers: cache.stats().collect() })
}

/// What each layer, or all of them as one, is asked for, in order: no more than `at_once` of a lane at a time.
fn lanes(trace: &Trace, shared: bool, at_once: impl Fn(usize) -> usize) -> Vec<Vec<Use>> {
    let layers = trace.shape.expert_bytes.len();
    let mut lanes: Vec<Vec<Use>> = Vec::new();
    lanes.resize_with(if shared { 1 } else { layers }, Vec::new);
    for batch in &trace.batches {
        let (lane, first) =
            if shared { (0, batch.layer * trace.shape.n_experts) } else { (batch.layer, 0) };
        lanes[lane].extend(uses(batch, &trace.shape, first as u16, at_once(lane)));
    }
    lanes
}

/// A batch's experts as the engine asks the cache for them: ids ascending, `at_once` at a time, `first` added to each.
fn uses(batch: &Batch, shape: &Shape, first: u16, at_once: usize) -> Vec<Use> {
    let mut sums = vec![None; shape.n_experts];
    for (&expert, &weight) in batch.experts.iter().zip(&batch.weights) {
        *sums[usize::from(expert)].get_or_insert(0.0) += f64::from(weight);
    }
    let rows = (batch.experts.len() / shape.k) as f64;
    let used = (first..).zip(sums).filter_map(|(expert, sum)| Some((expert, sum? / rows)));
    let (experts, weights): (Vec<_>, Vec<_>) = used.unzip();
    let parts = experts.chunks(at_once).zip(weights.chunks(at_once));
    parts
        .map(|(experts, weights)| Use { experts: experts.into(), weights: weights.into() })
        .collect()
}

fn add(total: &mut CacheStats, trace: CacheStats) {
    total.layers.resize_with(trace.layers.len(), LayerStats::default);
    for (total, layer) in total.layers.iter_mut().zip(trace.layers) {
        *total += layer;
    }
}

fn json_view(Outcome { cache, policy, stats }: &Outcome) -> serde_json::Value {
    let mut view = cache_json(&stats.total());
    view["cache"] = cache.to_string().into();
    view["policy"] = policy.to_string().into();
    // One lane for all layers says nothing of each.
    if !policy.is_shared() {
        view["layers"] = stats.layers.iter().map(cache_json).collect();
    }
    view
}

/// A row a policy; for each cache size the uses that missed, and how much of the way from LRU to Belady that closes.
fn text_view(outcomes: &[Outcome], caches: &[Budget], policies: &[Policy]) -> String {
    let mut header = vec!["policy".to_owned()];
    for cache in caches {
        header.extend([format!("misses at {cache}"), "closes".to_owned()]);
    }
    let mut rows = vec![header];
    for &policy in policies {
        let mut row = vec![policy.to_string()];
        for &cache in caches {
            let misses = |policy| misses(outcomes, cache, policy);
            let closes = || {
                let (lru, best) = (misses(Policy::Lru)?, misses(Policy::Belady)?);
                (lru > best).then_some((lru - misses(policy)?) / (lru - best))
            };
            let percent = |share: f64| format!("{:.1} %", 100.0 * share);
            row.push(misses(policy).map_or_else(String::new, percent));
            row.push(closes().map_or_else(String::new, percent));
        }
        rows.push(row);
    }
    table(&rows)
}

/// The share of uses that missed.
fn misses(outcomes: &[Outcome], cache: Budget, policy: Policy) -> Option<f64> {
    let of = |outcome: &&Outcome| outcome.cache == cache && outcome.policy == policy;
    let total = outcomes.iter().find(of)?.stats.total();
    Some(total.misses as f64 / (total.hits + total.misses).max(1) as f64)
}
