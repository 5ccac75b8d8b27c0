use proptest::prelude::*;

use super::*;

/// The gate as its description reads, in f64, with sorts, one row. None where f32 could not tell
/// two scores apart.
fn reference(gate: &Gate, logits: &[f32]) -> Option<Vec<(u16, f64)>> {
    let scores = scores(gate, logits);
    let mut order: Vec<u16> = (0..scores.len() as u16).collect();
    order.sort_by(|&a, &b| scores[usize::from(b)].total_cmp(&scores[usize::from(a)]));
    let apart = |pair: &[u16]| scores[usize::from(pair[0])] - scores[usize::from(pair[1])] > 1e-6;
    if !order.windows(2).all(apart) {
        return None;
    }
    order.truncate(gate.top_k);
    let weights = reference_weights(gate, logits, &order);
    Some(order.into_iter().zip(weights).collect())
}

/// What the gate's rule makes of the `selected` experts of a row.
pub(crate) fn reference_weights(gate: &Gate, logits: &[f32], selected: &[u16]) -> Vec<f64> {
    let scores = scores(gate, logits);
    let mut weights: Vec<f64> = selected.iter().map(|&e| scores[usize::from(e)]).collect();
    if gate.scoring == Scoring::SoftmaxAfterTopK {
        weights = softmax(&weights);
    }
    if gate.normalise {
        let sum = weights.iter().sum::<f64>().max(6.1035e-5);
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    weights.into_iter().map(|w| w * f64::from(gate.scale)).collect()
}

fn scores(gate: &Gate, logits: &[f32]) -> Vec<f64> {
    let logits: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    match gate.scoring {
        Scoring::Softmax => softmax(&logits),
        Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Scoring::SoftmaxAfterTopK => logits,
    }
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
    x.iter().map(|x| (x - max).exp() / sum).collect()
}

/// Logits of distinct values a visible step apart, so that f32 and f64 order them alike.
fn logits(n: usize) -> impl Strategy<Value = Vec<f32>> {
    let steps: Vec<f32> = (0..n).map(|i| (i as f32 - n as f32 / 2.0) * 0.05).collect();
    Just(steps).prop_shuffle()
}

pub(crate) fn gates(n: usize) -> impl Strategy<Value = Gate> {
    let scoring = prop_oneof![
        Just(Scoring::Softmax),
        Just(Scoring::Sigmoid),
        Just(Scoring::SoftmaxAfterTopK)
    ];
    (scoring, 1..=n / 4, any::<bool>(), 0.5_f32..3.0).prop_map(
        move |(scoring, top_k, normalise, scale)| Gate {
            scoring,
            n_experts: n,
            top_k,
            normalise,
            scale,
        },
    )
}

fn plain(scoring: Scoring, n_experts: usize, top_k: usize, normalise: bool) -> Gate {
    Gate { scoring, n_experts, top_k, normalise, scale: 1.0 }
}

proptest! {
    #[test]
    fn follows_the_reference(gate in gates(32), rows in prop::collection::vec(logits(32), 1..4)) {
        let routing = gate.route(&rows.concat());
        prop_assert_eq!(routing.rows(), rows.len());
        for (r, row) in rows.iter().enumerate() {
            let Some(want) = reference(&gate, row) else { continue };
            prop_assert_eq!(
                routing.row(r).map(|(e, _)| e).collect::<Vec<_>>(),
                want.iter().map(|(e, _)| *e).collect::<Vec<_>>()
            );
            for ((_, got), (_, want)) in routing.row(r).zip(want) {
                prop_assert!((f64::from(got) - want).abs() <= 2e-6 * want.abs().max(1e-3));
            }
        }
    }

    #[test]
    fn weights_sum_to_the_scale_where_the_gate_normalises(gate in gates(32), row in logits(32)) {
        let routing = gate.route(&row);
        if gate.normalises() {
            prop_assert!((routing.mass(0) - f64::from(gate.scale)).abs() < 1e-5);
        } else if gate.scoring == Scoring::Softmax {
            prop_assert!(routing.mass(0) <= f64::from(gate.scale) * (1.0 + 1e-6));
        }
    }

    #[test]
    fn selection_is_distinct_and_rows_do_not_touch(
        gate in gates(32),
        rows in prop::collection::vec(logits(32), 2..5),
    ) {
        let together = gate.route(&rows.concat());
        for (r, row) in rows.iter().enumerate() {
            let mut experts: Vec<u16> = together.row(r).map(|(e, _)| e).collect();
            prop_assert!(together.row(r).eq(gate.route(row).row(0)));
            experts.sort_unstable();
            experts.dedup();
            prop_assert_eq!(experts.len(), gate.top_k);
        }
    }

    /// Renaming the experts renames the choice and nothing else.
    #[test]
    fn permutation_equivariant(
        gate in gates(32),
        row in logits(32),
        names in Just((0..32_usize).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        prop_assume!(reference(&gate, &row).is_some());
        let before = gate.route(&row);
        let permuted: Vec<f32> = names.iter().map(|&old| row[old]).collect();
        let after = gate.route(&permuted);
        for ((old, old_weight), (new, new_weight)) in before.row(0).zip(after.row(0)) {
            prop_assert_eq!(usize::from(old), names[usize::from(new)]);
            // The softmax adds up in another order.
            prop_assert!((old_weight - new_weight).abs() <= 1e-6 * old_weight);
        }
    }

    #[test]
    fn buffers_do_not_remember(gate in gates(32), other in gates(16), row in logits(32)) {
        let mut reused = other.route(&row);
        gate.route_with(&row, None, &mut reused);
        prop_assert_eq!(reused, gate.route(&row));
    }

    #[test]
    fn no_logit_panics_or_makes_a_weight_that_is_no_number(
        gate in gates(32),
        row in prop::collection::vec(
            prop_oneof![
                any::<f32>(),
                Just(f32::NAN),
                Just(f32::INFINITY),
                Just(f32::NEG_INFINITY),
            ],
            32,
        ),
    ) {
        let routing = gate.route(&row);
        let experts: std::collections::BTreeSet<u16> = routing.experts.iter().copied().collect();
        prop_assert_eq!(experts.len(), gate.top_k);
        prop_assert!(routing.weights.iter().all(|w| w.is_finite() && *w >= 0.0));
    }

    #[test]
    fn top_k_is_a_stable_sort_cut_short(
        scores in prop::collection::vec((0..6_i8).prop_map(f32::from), 1..40),
        k in any::<prop::sample::Index>(),
    ) {
        let k = k.index(scores.len()) + 1;
        let mut got = vec![0; k];
        top_k(&scores, &mut got);
        let mut want: Vec<u16> = (0..scores.len() as u16).collect();
        want.sort_by(|&a, &b| scores[usize::from(b)].total_cmp(&scores[usize::from(a)]));
        prop_assert_eq!(&got, &want[..k]);
    }
}

#[test]
fn equal_scores_go_to_the_lower_id() {
    let routing = plain(Scoring::Softmax, 6, 3, true).route(&[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]);
    assert_eq!(routing.experts, [1, 3, 0]);
}

#[test]
fn a_nan_costs_its_expert_only() {
    let gate = plain(Scoring::Softmax, 4, 2, true);
    let with = gate.route(&[0.5, f32::NAN, 0.25, -1.0]);
    let without = gate.route(&[0.5, f32::NEG_INFINITY, 0.25, -1.0]);
    assert_eq!(with, without);
    assert_eq!(with.experts, [0, 2]);
    let nothing = gate.route(&[f32::NAN; 4]);
    assert_eq!(nothing.weights, [0.0, 0.0]);
}

#[test]
fn vanishing_scores_are_not_blown_up() {
    let gate = plain(Scoring::Sigmoid, 2, 2, true);
    let weights = gate.route(&[-80.0, -80.0]).weights;
    assert!(weights.iter().all(|&w| w < 1e-20), "{weights:?}");
}

#[test]
fn an_empty_batch_is_empty() {
    assert_eq!(plain(Scoring::Softmax, 4, 2, true).route(&[]).rows(), 0);
    assert_eq!(Routing::default().rows(), 0);
}
