use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::gate::tests::gates;
use crate::{Scoring, group};

const N: usize = 16;

/// A routed batch with some experts lost and some able to stand in.
#[derive(Debug, Clone)]
struct Case {
    gate: Gate,
    logits: Vec<f32>,
    lost: Vec<bool>,
    available: Vec<bool>,
}

impl Case {
    fn routing(&self) -> Routing {
        self.gate.route(&self.logits)
    }

    /// What was routed to lost experts, but for the last row, which misses nothing.
    fn missing(&self, routing: &Routing) -> Vec<Group> {
        let last = routing.rows() as u32 - 1;
        let mut missing = group(routing);
        missing.retain(|group| self.lost[usize::from(group.expert)]);
        missing.iter_mut().for_each(|group| group.rows.retain(|&(row, _)| row != last));
        missing.retain(|group| !group.rows.is_empty());
        missing
    }

    fn repair(&self, policy: Policy) -> (Routing, Repair) {
        let routing = self.routing();
        let missing = self.missing(&routing);
        let repair = repair(policy, &self.gate, &routing, &missing, &self.available);
        (routing, repair)
    }

    fn survivors(&self, routing: &Routing, row: usize) -> Vec<(u16, f32)> {
        let last = row + 1 == routing.rows();
        routing.row(row).filter(|(e, _)| last || !self.lost[usize::from(*e)]).collect()
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let row = Just((0..N).map(|i| i as f32 * 0.2 - 1.5).collect::<Vec<_>>()).prop_shuffle();
    let rows = prop::collection::vec(row, 2..5);
    let flags = || prop::collection::vec(any::<bool>(), N);
    (gates(N), rows, flags(), flags()).prop_map(|(gate, rows, lost, available)| {
        // What can run is not lost.
        let available = available.iter().zip(&lost).map(|(a, l)| *a && !*l).collect();
        Case { gate, logits: rows.concat(), lost, available }
    })
}

fn extras_of(repair: &Repair, row: usize) -> Vec<(u16, f32)> {
    let calls = repair.extra.iter().flat_map(|group| group.rows.iter().map(|c| (group.expert, *c)));
    calls.filter(|(_, (r, _))| *r as usize == row).map(|(e, (_, weight))| (e, weight)).collect()
}

/// The gate run again with every expert masked that neither survived nor is available, as its
/// description reads, in f64.
fn masked_gate(case: &Case, routing: &Routing, row: usize) -> Vec<(u16, f64)> {
    let gate = &case.gate;
    let scores: Vec<f64> = routing.row_scores(row).iter().map(|&s| f64::from(s)).collect();
    let survived: BTreeSet<u16> =
        case.survivors(routing, row).into_iter().map(|(e, _)| e).collect();
    let mut order: Vec<u16> =
        (0..N as u16).filter(|e| survived.contains(e) || case.available[usize::from(*e)]).collect();
    order.sort_by(|&a, &b| scores[usize::from(b)].total_cmp(&scores[usize::from(a)]));
    order.truncate(gate.top_k);

    let mut weights: Vec<f64> = order.iter().map(|&e| scores[usize::from(e)]).collect();
    if gate.scoring == Scoring::SoftmaxAfterTopK {
        weights.iter_mut().for_each(|w| *w = w.exp());
    }
    if gate.normalise || gate.scoring == Scoring::SoftmaxAfterTopK {
        let sum = weights.iter().sum::<f64>().max(6.1035e-5);
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    let scaled = weights.into_iter().map(|w| w * f64::from(gate.scale));
    order.into_iter().zip(scaled).collect()
}

proptest! {
    /// Survivors times the common factor, and the extras, are the masked gate's whole answer.
    #[test]
    fn reroute_is_the_gate_with_the_rest_masked(case in cases()) {
        let (routing, repair) = case.repair(Policy::Reroute);
        for row in 0..routing.rows() - 1 {
            if case.survivors(&routing, row).len() == case.gate.top_k {
                continue;
            }
            let scale = f64::from(repair.scale[row]);
            let kept = case.survivors(&routing, row).into_iter();
            let kept = kept.map(|(e, weight)| (e, f64::from(weight) * scale));
            let extra = extras_of(&repair, row).into_iter().map(|(e, w)| (e, f64::from(w)));
            let mut got: Vec<(u16, f64)> = kept.chain(extra).collect();
            let mut want = masked_gate(&case, &routing, row);
            got.sort_by_key(|(e, _)| *e);
            want.sort_by_key(|(e, _)| *e);
            prop_assert_eq!(
                got.iter().map(|(e, _)| *e).collect::<Vec<_>>(),
                want.iter().map(|(e, _)| *e).collect::<Vec<_>>()
            );
            for ((_, got), (_, want)) in got.iter().zip(&want) {
                prop_assert!((got - want).abs() <= 1e-5 * want.abs().max(1e-3), "{got} {want}");
            }
        }
    }

    #[test]
    fn renormalise_gives_survivors_the_routed_mass(case in cases()) {
        let (routing, repair) = case.repair(Policy::Renormalise);
        prop_assert!(repair.extra.is_empty());
        for row in 0..routing.rows() {
            let kept: f64 =
                case.survivors(&routing, row).iter().map(|(_, w)| f64::from(*w)).sum();
            let scale = f64::from(repair.scale[row]);
            if kept == 0.0 || !case.gate.normalises() {
                prop_assert_eq!(scale, 1.0);
            } else {
                prop_assert!((kept * scale - routing.mass(row)).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn a_gate_that_does_not_normalise_is_never_rescaled(mut case in cases()) {
        case.gate.normalise = false;
        if case.gate.scoring == Scoring::SoftmaxAfterTopK {
            case.gate.scoring = Scoring::Softmax;
        }
        for policy in [Policy::LeaveOut, Policy::Renormalise, Policy::Reroute] {
            let (routing, repair) = case.repair(policy);
            prop_assert!(repair.scale.iter().all(|&s| s == 1.0));
            for row in 0..routing.rows() {
                for (e, weight) in extras_of(&repair, row) {
                    let own = routing.row_scores(row)[usize::from(e)] * case.gate.scale;
                    prop_assert!((weight - own).abs() <= 1e-6 * own);
                }
            }
        }
    }

    #[test]
    fn whole_rows_are_not_touched(case in cases()) {
        for policy in [Policy::LeaveOut, Policy::Renormalise, Policy::Reroute] {
            let (routing, repair) = case.repair(policy);
            for row in 0..routing.rows() {
                if case.survivors(&routing, row).len() == case.gate.top_k {
                    prop_assert_eq!(repair.scale[row], 1.0);
                    prop_assert_eq!(extras_of(&repair, row), vec![]);
                }
            }
        }
    }

    #[test]
    fn extras_can_run_and_are_in_order(case in cases()) {
        let (_, repair) = case.repair(Policy::Reroute);
        prop_assert!(repair.extra.is_sorted_by_key(|group| group.expert));
        for group in &repair.extra {
            prop_assert!(case.available[usize::from(group.expert)]);
            prop_assert!(group.rows.is_sorted_by_key(|(row, _)| *row));
        }
        let mut nothing = case.clone();
        nothing.available = Vec::new();
        prop_assert!(nothing.repair(Policy::Reroute).1.extra.is_empty());
    }

    #[test]
    fn leaving_out_changes_nothing(case in cases()) {
        let (routing, repair) = case.repair(Policy::LeaveOut);
        prop_assert_eq!(repair, Repair { scale: vec![1.0; routing.rows()], extra: vec![] });
    }

    #[test]
    fn no_number_goes_wild(
        gate in gates(N),
        logits in prop::collection::vec(prop_oneof![any::<f32>(), -200.0_f32..200.0], N),
        lost in prop::collection::vec(any::<bool>(), N),
        available in prop::collection::vec(any::<bool>(), N),
    ) {
        let routing = gate.route(&logits);
        let mut missing = group(&routing);
        missing.retain(|group| lost[usize::from(group.expert)]);
        for policy in [Policy::Renormalise, Policy::Reroute] {
            let got = repair(policy, &gate, &routing, &missing, &available);
            prop_assert!(got.scale.iter().all(|s| s.is_finite()));
            let mut weights = got.extra.iter().flat_map(|g| &g.rows).map(|(_, w)| *w);
            prop_assert!(weights.all(|w| w.is_finite() && w >= 0.0));
        }
    }
}

/// Mixtral's gate, by hand: logits ln 4, ln 3, ln 2, ln 1 select 4/7 and 3/7.
#[test]
fn by_hand() {
    let gate =
        Gate { scoring: Scoring::Softmax, n_experts: 4, top_k: 2, normalise: true, scale: 1.0 };
    let routing = gate.route(&[4.0_f32.ln(), 3.0_f32.ln(), 2.0_f32.ln(), 0.0]);
    let missing = [Group { expert: 0, rows: vec![(0, 4.0 / 7.0)] }];
    let near = |got: f32, want: f32| assert!((got - want).abs() < 1e-6, "{got} {want}");

    let renormalised = repair(Policy::Renormalise, &gate, &routing, &missing, &[]);
    near(renormalised.scale[0], 7.0 / 3.0);
    // 3/7 becomes 3/5, and expert 2 comes in with 2/5.
    let rerouted = repair(Policy::Reroute, &gate, &routing, &missing, &[false, false, true, true]);
    near(rerouted.scale[0], 7.0 / 5.0);
    assert_eq!(rerouted.extra.len(), 1);
    assert_eq!((rerouted.extra[0].expert, rerouted.extra[0].rows[0].0), (2, 0));
    near(rerouted.extra[0].rows[0].1, 2.0 / 5.0);
}

#[test]
fn rows_that_are_not_there_are_passed_over() {
    let gate =
        Gate { scoring: Scoring::Softmax, n_experts: 2, top_k: 1, normalise: true, scale: 1.0 };
    let routing = gate.route(&[1.0, 0.0]);
    let missing = [Group { expert: 0, rows: vec![(5, 1.0)] }];
    let got = repair(Policy::Reroute, &gate, &routing, &missing, &[true, true]);
    assert_eq!(got, Repair { scale: vec![1.0], extra: vec![] });
}

#[test]
fn names_go_there_and_back() {
    for policy in Policy::ALL {
        assert_eq!(policy.to_string().parse(), Ok(policy));
    }
    let error = "leave_out".parse::<Policy>().expect_err("no such policy");
    assert!(error.contains("\"leave_out\""), "{error}");
}
