//! Which representation each expert gets: the least distortion for the bytes.

use outrigger_experts::GgmlType;
use serde::{Deserialize, Serialize};

/// What an expert becomes in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// Matrices, each so many weights a code, or exact where there is no number: gate and up projection, and the down
    /// projection.
    Copy {
        /// Of the two matrices that read the input.
        inputs: Option<u8>,
        /// Of the one that writes the output.
        output: Option<u8>,
    },
    /// The mean output.
    Mean,
}

impl Choice {
    /// Whether nothing is approximated.
    pub fn is_exact(self) -> bool {
        self == Choice::Copy { inputs: None, output: None }
    }
}

/// What an expert's approximations cost in distortion: squared error of its weighted outputs on the calibration text,
/// as a share of what the residual stream behind the layer adds up to, squared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Curve {
    /// With `inputs` of so many weights a code and nothing else approximated.
    pub(super) inputs: [(u8, f64); 2],
    /// With `output` of so many weights a code and nothing else approximated.
    pub(super) output: [(u8, f64); 2],
    /// With the mean output.
    pub(super) mean: f64,
    /// Its share of the layer's routed weight.
    pub(super) mass: f64,
}

impl Curve {
    /// The distortion of a choice: errors of different matrices hardly know of each other, so they add up.
    pub(super) fn distortion(&self, choice: Choice) -> f64 {
        let at = |points, dim: Option<u8>| dim.map_or(0.0, |dim| interpolate(points, dim));
        match choice {
            Choice::Copy { inputs, output } => at(self.inputs, inputs) + at(self.output, output),
            Choice::Mean => self.mean,
        }
    }
}

/// Between and beyond two measured codes: a power of the codebooks' own distortion. On a sample of the demo model's
/// experts that is within a third of the median of what is measured at every other code. Single experts are at 0.7 to
/// 1.6 of it, and coded inputs of two weights a code, where little is left to lose, at up to 2.8.
fn interpolate([(a, at_a), (b, at_b)]: [(u8, f64); 2], dim: u8) -> f64 {
    let log = |dim| GgmlType::Vq(dim).gaussian_distortion().ln();
    let (at_a, at_b) = (at_a.max(f64::MIN_POSITIVE), at_b.max(f64::MIN_POSITIVE));
    let slope = (at_b / at_a).ln() / (log(b) - log(a));
    at_a * (slope.max(0.0) * (log(dim) - log(a))).exp()
}

/// The bytes of every choice, of one layer's experts.
pub(super) struct Costs(Vec<(Choice, u64)>);

impl Costs {
    /// For matrices of `n_embd` by `n_ff` that are of these types in the full file.
    pub(super) fn new(types: [GgmlType; 3], n_embd: usize, n_ff: usize) -> Costs {
        let bytes = |ty: GgmlType, cols: usize, rows: usize| {
            (ty.row_bytes(cols).unwrap_or(0) * rows) as u64
        };
        let coded = |dim: Option<u8>, exact| dim.map_or(exact, GgmlType::Vq);
        let dims = || std::iter::once(None).chain(dims().map(Some));
        let mut costs = vec![(Choice::Mean, bytes(GgmlType::F16, n_embd, 1))];
        for (inputs, output) in dims().flat_map(|i| dims().map(move |o| (i, o))) {
            let [gate, up] = [types[0], types[1]].map(|ty| bytes(coded(inputs, ty), n_embd, n_ff));
            let down = bytes(coded(output, types[2]), n_ff, n_embd);
            costs.push((Choice::Copy { inputs, output }, gate + up + down));
        }
        Costs(costs)
    }

    /// The bytes of a choice.
    pub(super) fn of(&self, choice: Choice) -> u64 {
        self.0.iter().find(|(c, _)| *c == choice).map_or(0, |(_, bytes)| *bytes)
    }

    /// The choice of least `distortion + price * bytes`.
    fn best(&self, curve: &Curve, price: f64) -> (Choice, u64) {
        let cost =
            |&(choice, bytes): &(Choice, u64)| curve.distortion(choice) + price * bytes as f64;
        // Of equals the one with more bytes: what the text never used costs nothing in any form, if bytes do not either.
        let least = |a: &&(Choice, u64), b: &&(Choice, u64)| {
            cost(a).total_cmp(&cost(b)).then(b.1.cmp(&a.1))
        };
        *self.0.iter().min_by(least).expect("there is always the mean")
    }
}

/// Weights a code of every coded type, the most bits first.
pub(super) fn dims() -> impl Iterator<Item = u8> {
    GgmlType::vqs().filter_map(|ty| match ty {
        GgmlType::Vq(dim) => Some(dim),
        _ => None,
    })
}

/// Chooses for every layer and expert within `budget` bytes, as a Lagrangian sweep does: every byte of every expert
/// buys as much (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988). Where not even
/// the mean outputs fit, it is those.
pub(super) fn allocate(curves: &[Vec<Curve>], costs: &[Costs], budget: u64) -> Vec<Vec<Choice>> {
    let at = |price: f64| -> (Vec<Vec<Choice>>, u64) {
        let mut total = 0;
        let layers = curves.iter().zip(costs).map(|(layer, costs)| {
            let best = layer.iter().map(|curve| {
                let (choice, bytes) = costs.best(curve, price);
                total += bytes;
                choice
            });
            best.collect()
        });
        (layers.collect(), total)
    };
    let free = at(0.0);
    if free.1 <= budget {
        return free.0;
    }
    // The price of a byte over all magnitudes: too low is over budget, too high within it.
    let (mut low, mut high) = (-100.0f64, 20.0f64);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if at(middle.exp()).1 > budget { low = middle } else { high = middle }
    }
    at(high.exp()).0
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: usize = 12;

    fn curves() -> Vec<Vec<Curve>> {
        let curve = |i: usize| {
            let scale = 1.0 / (1 + i * i) as f64;
            Curve {
                inputs: [(3, 0.002 * scale), (12, 0.06 * scale)],
                output: [(3, 0.015 * scale), (12, 0.3 * scale)],
                mean: 0.9 * scale,
                mass: 0.1,
            }
        };
        vec![(0..COUNT).map(curve).collect(), (3..COUNT + 3).map(curve).collect()]
    }

    fn costs() -> Vec<Costs> {
        (0..2).map(|_| Costs::new([GgmlType::Q8_0; 3], 256, 128)).collect()
    }

    fn totals(choices: &[Vec<Choice>], curves: &[Vec<Curve>], costs: &[Costs]) -> (f64, u64) {
        let mut totals = (0.0, 0);
        for ((choices, curves), costs) in choices.iter().zip(curves).zip(costs) {
            for (choice, curve) in choices.iter().zip(curves) {
                totals.0 += curve.distortion(*choice);
                totals.1 += costs.of(*choice);
            }
        }
        totals
    }

    #[test]
    fn a_budget_is_kept_and_mostly_used() {
        let (curves, costs) = (curves(), costs());
        let full: u64 = 2 * COUNT as u64 * 3 * 256 * 128 / 32 * 34;
        for percent in [5, 8, 10, 20, 35, 50, 75, 99] {
            let budget = full * percent / 100;
            let (_, bytes) = totals(&allocate(&curves, &costs, budget), &curves, &costs);
            assert!(bytes <= budget, "{percent} %: {bytes} of {budget}");
            assert!(bytes as f64 > 0.85 * budget as f64, "{percent} %: {bytes} of {budget}");
        }
        assert!(allocate(&curves, &costs, full).iter().flatten().all(|choice| choice.is_exact()));
        assert!(
            allocate(&curves, &costs, 0).iter().flatten().all(|choice| *choice == Choice::Mean)
        );
    }

    #[test]
    fn what_the_text_never_used_is_exact_where_everything_can_be() {
        let (mut curves, costs) = (curves(), costs());
        curves[1][4] = Curve {
            inputs: [(3, 0.0), (12, 0.0)],
            output: [(3, 0.0), (12, 0.0)],
            mean: 0.0,
            mass: 0.0,
        };
        let choices = allocate(&curves, &costs, u64::MAX);
        assert!(choices.iter().flatten().all(|choice| choice.is_exact()));
    }

    /// No single change that costs no more bytes than are left may lessen the distortion by much.
    #[test]
    fn more_bytes_are_never_worse_and_those_that_matter_get_them() {
        let (curves, costs) = (curves(), costs());
        let mut last = f64::INFINITY;
        for budget in (100_000..2_500_000).step_by(100_000) {
            let choices = allocate(&curves, &costs, budget);
            let (distortion, _) = totals(&choices, &curves, &costs);
            assert!(distortion <= last, "{distortion} with {budget}, {last} before");
            last = distortion;
            let bytes: Vec<u64> = choices[0].iter().map(|choice| costs[0].of(*choice)).collect();
            assert!(bytes.iter().rev().is_sorted(), "{bytes:?}");
        }
    }

    /// Against every combination of a small case.
    #[test]
    fn the_sweep_is_optimal_for_the_bytes_that_it_uses() {
        let curves = vec![curves()[0][..2].to_vec()];
        let costs = vec![Costs::new([GgmlType::Q8_0; 3], 256, 128)];
        for budget in [12_000, 40_000, 80_000, 120_000] {
            let got = totals(&allocate(&curves, &costs, budget), &curves, &costs);
            for a in &costs[0].0 {
                for b in &costs[0].0 {
                    let other = totals(&[vec![a.0, b.0]], &curves, &costs);
                    assert!(other.1 > got.1 || other.0 >= got.0 * (1.0 - 1e-12), "{budget}");
                }
            }
        }
    }

    #[test]
    fn what_was_measured_is_met_and_the_rest_lies_between() {
        let curve = &curves()[0][0];
        for (dim, error) in [(3, 0.002), (12, 0.06)] {
            let got = curve.distortion(Choice::Copy { inputs: Some(dim), output: None });
            assert!((got - error).abs() < 1e-12);
        }
        let errors: Vec<f64> = dims()
            .map(|dim| curve.distortion(Choice::Copy { inputs: None, output: Some(dim) }))
            .collect();
        assert!(errors.is_sorted() && errors[0] > 0.0, "{errors:?}");
    }
}
