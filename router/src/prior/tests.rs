use proptest::prelude::*;

use super::*;
use crate::gate::tests::{gates, reference_weights};
use crate::{Gate, Scoring, coverage, group};

const N: usize = 32;

fn logits() -> impl Strategy<Value = Vec<f32>> {
    let steps: Vec<f32> = (0..N).map(|i| (i as f32 - 16.0) * 0.05).collect();
    Just(steps).prop_shuffle()
}

fn residents() -> impl Strategy<Value = Vec<bool>> {
    // Fewer than experts, too: those past the end are not here.
    prop::collection::vec(any::<bool>(), 0..=N)
}

/// Strengths at which no head start is a whole number of the steps between logits.
fn strengths() -> impl Strategy<Value = f32> {
    (0_u32..60).prop_map(|x| (x as f32 + 0.5) / 31.0)
}

fn route(gate: &Gate, logits: &[f32], resident: &[bool], strength: f32) -> Routing {
    let mut routing = Routing::default();
    gate.route_with(logits, Some(Prior { resident, strength }), &mut routing);
    routing
}

/// The selection as the paper describes it: add to residents' logits, sort, cut; the first protected.
fn reference(logits: &[f32], resident: &[bool], strength: f32, k: usize) -> Vec<u16> {
    let most = logits.iter().copied().fold(f32::MIN, f32::max);
    let least = logits.iter().copied().fold(f32::MAX, f32::min);
    let mut order: Vec<(f32, u16)> = Vec::new();
    for (expert, &logit) in logits.iter().enumerate() {
        let bonus = match resident.get(expert) {
            Some(true) => strength * (most - least),
            _ => 0.0,
        };
        order.push((if logit == most { f32::MAX } else { logit + bonus }, expert as u16));
    }
    order.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut selected: Vec<u16> = order[..k].iter().map(|(_, expert)| *expert).collect();
    selected.sort_unstable();
    selected
}

proptest! {
    #[test]
    fn selects_what_the_reference_selects(
        gate in gates(N), logits in logits(), resident in residents(), strength in strengths(),
    ) {
        let mut got = route(&gate, &logits, &resident, strength).experts;
        got.sort_unstable();
        prop_assert_eq!(got, reference(&logits, &resident, strength, gate.top_k));
    }

    #[test]
    fn the_first_choice_stays_and_only_residents_come(
        gate in gates(N), logits in logits(), resident in residents(), strength in strengths(),
    ) {
        let (plain, got) = (gate.route(&logits), route(&gate, &logits, &resident, strength));
        prop_assert_eq!(got.experts[0], plain.experts[0]);
        for (slot, expert) in got.experts.iter().enumerate() {
            prop_assert_eq!(got.own[slot], plain.experts.contains(expert));
            let here = resident.get(usize::from(*expert)) == Some(&true);
            prop_assert!(got.own[slot] || here, "expert {} came and is not here", expert);
        }
        let gone = plain.experts.iter().filter(|e| !got.experts.contains(e));
        for expert in gone {
            prop_assert!(resident.get(usize::from(*expert)) != Some(&true), "{} was here", expert);
        }
    }

    #[test]
    fn no_strength_is_no_prior(
        gate in gates(N), rows in prop::collection::vec(logits(), 0..4), resident in residents(),
    ) {
        let logits = rows.concat();
        for strength in [0.0, -1.0, f32::NAN] {
            prop_assert_eq!(route(&gate, &logits, &resident, strength), gate.route(&logits));
        }
    }

    #[test]
    fn a_great_strength_takes_every_resident_before_any_other(
        gate in gates(N), logits in logits(), resident in residents(),
    ) {
        let got = route(&gate, &logits, &resident, 10.0);
        let here = |e: &u16| resident.get(usize::from(*e)) == Some(&true);
        let others = (0..N as u16).filter(|e| here(e) && *e != got.experts[0]).count();
        let taken = got.experts[1..].iter().filter(|e| here(e)).count();
        prop_assert_eq!(taken, others.min(gate.top_k - 1));
    }

    #[test]
    fn weights_follow_the_gates_rule(
        gate in gates(N), logits in logits(), resident in residents(), strength in strengths(),
    ) {
        let got = route(&gate, &logits, &resident, strength);
        for (got, want) in got.weights.iter().zip(reference_weights(&gate, &logits, &got.experts)) {
            prop_assert!((f64::from(*got) - want).abs() < 1e-6);
        }
    }

    /// What is computed under a prior covers what the model chose by as much as it is a part of it.
    #[test]
    fn coverage_counts_the_models_own_choice_alone(
        gate in gates(N), logits in logits(), resident in residents(), strength in strengths(),
    ) {
        let (plain, got) = (gate.route(&logits), route(&gate, &logits, &resident, strength));
        let arrived: f64 = group(&got).iter().map(|group| f64::from(group.rows[0].1)).sum();
        let kept = plain.row(0).filter(|(e, _)| got.experts.contains(e));
        let want = kept.map(|(_, weight)| f64::from(weight)).sum::<f64>() / plain.mass(0);
        let coverage = coverage(arrived, got.mass(0));
        prop_assert!((f64::from(coverage) - want).abs() < 1e-5, "{} not {}", coverage, want);
        prop_assert_eq!(coverage == 1.0, favoured(&got).is_empty());

        let calls = [group(&got), favoured(&got)].concat();
        let mut experts: Vec<u16> = calls.iter().map(|group| group.expert).collect();
        let mut want = got.experts.clone();
        experts.sort_unstable();
        want.sort_unstable();
        prop_assert_eq!(experts, want, "every call is in one of the two");
    }

    #[test]
    fn no_logit_panics(
        gate in gates(N),
        logits in prop::collection::vec(prop::num::f32::ANY, N),
        strength in prop::num::f32::ANY,
        resident in residents(),
    ) {
        let got = route(&gate, &logits, &resident, strength);
        prop_assert_eq!(got.experts[0], gate.route(&logits).experts[0]);
        prop_assert!(got.weights.iter().all(|weight| weight.is_finite()));
    }
}

#[test]
fn the_head_start_is_a_fraction_of_the_range() {
    let gate =
        Gate { scoring: Scoring::Softmax, n_experts: 4, top_k: 2, normalise: true, scale: 1.0 };
    // Expert 2 is 3 behind expert 1, of a range of 10.
    let (logits, resident) = ([10.0, 5.0, 2.0, 0.0], [false, false, true, false]);
    assert_eq!(route(&gate, &logits, &resident, 0.29).experts, [0, 1]);
    let routing = route(&gate, &logits, &resident, 0.31);
    assert_eq!((routing.experts, routing.own), (vec![0, 2], vec![true, false]));
}
