//! Degradation: what a row is made of when some of its experts cannot run.
//!
//! The model's own gate decides what is allowed. Where it normalises, weights are shares, and the
//! survivors may take over what is missing. Where it does not, a weight says how much an expert
//! adds whatever the others do, and rescaling ruins the row: on OLMoE it took perplexity from 14
//! to 884 (JustVugg/colibri#865).

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::gate::{MIN_WEIGHT_SUM, top_k};
use crate::placement::group_calls;
use crate::{Gate, Group, Routing};

/// What to do about experts that cannot run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Their part is simply not there.
    LeaveOut,
    /// The survivors take over their weight, where the gate normalises.
    Renormalise,
    /// The best of what can run takes their place: the gate decides again among those.
    #[default]
    Reroute,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Policy; 3] = [Policy::LeaveOut, Policy::Renormalise, Policy::Reroute];
}

/// What [`repair`] makes of the rows that miss something.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Repair {
    /// `[rows]`: the factor on the sum of the surviving experts; 1 where nothing is missing.
    pub scale: Vec<f32>,
    /// What to run instead, weights final: `scale` does not apply to them.
    pub extra: Vec<Group>,
}

/// Repairs the rows that `missing` names, by `policy`.
///
/// `available` says by expert what could run right now; experts past its end could not. Survivors
/// are a row's routed experts that `missing` does not name. For those rows, [`Policy::Reroute`]
/// gives what the gate would have chosen had every other expert been masked before its top-k.
pub fn repair(
    policy: Policy,
    gate: &Gate,
    routing: &Routing,
    missing: &[Group],
    available: &[bool],
) -> Repair {
    let mut scale = vec![1.0; routing.rows()];
    let idle = match policy {
        Policy::LeaveOut => true,
        Policy::Renormalise => !gate.normalises(),
        Policy::Reroute => false,
    };
    if idle || missing.is_empty() {
        return Repair { scale, extra: Vec::new() };
    }

    let mut extra = Vec::new();
    for (row, lost) in lost_by_row(missing, routing.rows()) {
        let routed: Vec<u16> = routing.row(row).map(|(expert, _)| expert).collect();
        let survivors: Vec<u16> = routed.iter().copied().filter(|e| !lost.contains(e)).collect();
        if survivors.len() == routed.len() {
            continue;
        }
        let scores = routing.row_scores(row);
        let chosen = match policy {
            Policy::Reroute => {
                let candidate =
                    |e: usize| available.get(e) == Some(&true) && !survivors.contains(&(e as u16));
                best(scores, candidate, routing.k - survivors.len())
            }
            _ => Vec::new(),
        };

        // The gate's rule divides every weight of a selection by the same number, so survivors
        // change by one common factor: the old divisor over the new one.
        let selection = [survivors.as_slice(), &chosen].concat();
        let unit = Gate::unit(scores, &selection);
        let before = gate.divisor(scores, unit, &routed);
        let after = gate.divisor(scores, unit, &selection);
        if after > 0.0 {
            if !survivors.is_empty() {
                // A softmax of far lesser survivors could ask for infinity. The clamp of the other
                // gates allows this much.
                let most = routing.k as f64 / MIN_WEIGHT_SUM;
                scale[row] = (before / after).min(most) as f32;
            }
            let factor = f64::from(gate.scale) / after;
            extra.extend(chosen.iter().map(|&expert| {
                (expert, row as u32, (gate.raw(scores, unit, expert) * factor) as f32)
            }));
        }
    }
    Repair { scale, extra: group_calls(routing.n_experts, extra) }
}

/// The experts that each row lost.
fn lost_by_row(missing: &[Group], rows: usize) -> BTreeMap<usize, Vec<u16>> {
    let mut lost: BTreeMap<usize, Vec<u16>> = BTreeMap::new();
    for group in missing {
        for &(row, _) in group.rows.iter().filter(|(row, _)| (*row as usize) < rows) {
            lost.entry(row as usize).or_default().push(group.expert);
        }
    }
    lost
}

/// The `room` candidates with the greatest scores: what a masked top-k adds to the survivors.
///
/// Every survivor is in the masked top-k, so only the rest of it is to be found: fewer than `k`
/// experts come before a survivor in the order of scores (and ids), or it would not have been
/// selected, and masking takes experts out of that order but puts none in. One whose score is minus
/// infinity would run for a weight of 0.
fn best(scores: &[f32], candidate: impl Fn(usize) -> bool, room: usize) -> Vec<u16> {
    let able = |&e: &usize| candidate(e) && scores[e] > f32::NEG_INFINITY;
    let ids: Vec<u16> = (0..scores.len()).filter(able).map(|e| e as u16).collect();
    let their_scores: Vec<f32> = ids.iter().map(|&e| scores[usize::from(e)]).collect();
    let mut chosen = vec![0; room.min(ids.len())];
    top_k(&their_scores, &mut chosen);
    chosen.into_iter().map(|at| ids[usize::from(at)]).collect()
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Policy::LeaveOut => "leave-out",
            Policy::Renormalise => "renormalise",
            Policy::Reroute => "reroute",
        })
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Policy::ALL.into_iter().find(|policy| policy.to_string() == name);
        found.ok_or_else(|| {
            format!("policy is {name:?}, expected leave-out, renormalise or reroute")
        })
    }
}

#[cfg(test)]
mod tests;
