//! One text offline at several budgets, for each policy: quality against what is resident.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::report::{Row, mean};
use super::run::Life;
use super::scenario::{Compute, Event, Input, Link, Scenario};
use super::units::{Share, Time};
use super::{Error, Result};
use crate::config::{Budget, Policy};

/// What to vary. From text: `cache=10%,25%,50%`.
#[derive(Clone, Debug, PartialEq)]
pub struct Sweep {
    /// Shares of all experts that the cache holds.
    pub cache: Vec<Share>,
}

/// What one budget and policy came to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// How the device went on without an expert.
    #[serde(serialize_with = "in_words")]
    pub policy: Policy,
    /// Share of all experts that its cache held.
    pub cache: f64,
    /// Tokens that were scored.
    pub tokens: usize,
    /// Perplexity over the full model's.
    pub ppl_ratio: f64,
    /// Mean KL divergence from the full model, nats.
    pub kl: f64,
    /// Mean expected acceptance.
    pub acceptance: f64,
    /// Mean coverage.
    pub coverage: f64,
}

fn in_words<S: Serializer>(policy: &Policy, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(policy)
}

impl FromStr for Sweep {
    type Err = Error;

    fn from_str(text: &str) -> Result<Sweep> {
        let shares = |list: &str| list.split(',').map(str::parse).collect::<Result<_, _>>().ok();
        let cache = text.strip_prefix("cache=").and_then(shares);
        cache.map(|cache| Sweep { cache }).ok_or_else(|| Error::Sweep { found: text.to_owned() })
    }
}

impl Sweep {
    /// How many points it has.
    pub fn points(&self) -> usize {
        self.cache.len() * Policy::ALL.len()
    }
}

/// Runs the scenario's text, as far as the context holds it, at every budget for every policy: the first half connected,
/// which warms the cache, the second half offline, which is scored. `seen` is shown every point as it comes.
///
/// # Errors
/// A scenario without a text or with a pack, or a model that cannot be used.
pub fn sweep(
    scenario: &Scenario,
    sweep: &Sweep,
    mut seen: impl FnMut(&Point),
) -> Result<Vec<Point>> {
    if matches!(scenario.input, Input::Prompt(_)) {
        return Err(Error::NoText);
    }
    if scenario.device.pack.is_some() {
        return Err(Error::NoCache);
    }
    let mut points = Vec::with_capacity(sweep.points());
    for policy in Policy::ALL {
        for &cache in &sweep.cache {
            let rows = cut_half_way(&calm(scenario, cache, policy))?;
            let (nll, nll_full) = (mean(&rows, |row| row.nll), mean(&rows, |row| row.nll_full));
            let point = Point {
                policy,
                cache: cache.0,
                tokens: rows.len(),
                ppl_ratio: (nll - nll_full).exp(),
                kl: mean(&rows, |row| row.distance.kl),
                acceptance: mean(&rows, |row| row.distance.acceptance),
                coverage: mean(&rows, |row| row.coverage.into()),
            };
            seen(&point);
            points.push(point);
        }
    }
    Ok(points)
}

/// The scenario's device and text, at another budget and policy, over a link to which nothing happens. Nothing takes time,
/// and the text is read to its end.
fn calm(scenario: &Scenario, cache: Share, policy: Policy) -> Scenario {
    let mut calm = scenario.clone();
    calm.device.expert_cache = Some(Budget::Fraction(cache.0));
    calm.device.policy = policy;
    calm.device.compute = Compute::default();
    calm.length = Time(Duration::MAX);
    calm.links = BTreeMap::from([("calm".to_owned(), Link::default())]);
    let at = Time::default();
    calm.timeline = vec![Event { at, link: Some("calm".to_owned()), server: None }];
    calm
}

/// The rows of the second, offline half of a scenario's text.
fn cut_half_way(scenario: &Scenario) -> Result<Vec<Row>> {
    scenario.network().run(|dial| async move {
        let mut life = Life::begin(scenario, dial).await?;
        let half = life.text_len() / 2;
        let mut rows = Vec::new();
        while life.goes_on(rows.len()) {
            if rows.len() == half {
                life.cut_for_good();
            }
            let row = life.next(rows.len()).await?;
            rows.push(row);
        }
        Ok(rows.split_off(half))
    })?
}
