//! From values to places, and the round values that an axis names.

/// How values are spread over an axis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Scale {
    /// Evenly.
    #[default]
    Linear,
    /// By their logarithms; only values above 0 have a place.
    Log,
}

impl Scale {
    /// Where `value` is between `low` (0) and `high` (1).
    pub(super) fn place(self, value: f64, (low, high): (f64, f64)) -> f64 {
        match self {
            Scale::Linear => (value - low) / (high - low),
            Scale::Log => (value / low).ln() / (high / low).ln(),
        }
    }

    /// Round values within a range: about `wanted` of them.
    pub(super) fn ticks(self, range: (f64, f64), wanted: usize) -> Vec<f64> {
        match self {
            Scale::Linear => linear_ticks(range, wanted),
            Scale::Log => log_ticks(range, wanted),
        }
    }

    /// The smallest range of round ends that holds `values`; one that is given at an end stays.
    pub(super) fn range(
        self,
        values: impl Iterator<Item = f64>,
        low: Option<f64>,
        high: Option<f64>,
    ) -> (f64, f64) {
        let usable = |value: &f64| value.is_finite() && (self == Scale::Linear || *value > 0.0);
        let around = |(l, h): (f64, f64), value: f64| (l.min(value), h.max(value));
        let (least, most) = values
            .chain(low)
            .chain(high)
            .filter(usable)
            .fold((f64::INFINITY, f64::NEG_INFINITY), around);
        let (least, most) = if least <= most { (least, most) } else { (0.0, 1.0) };
        match self {
            Scale::Linear => {
                let step = step(most - least, 4);
                let top = high.unwrap_or((most / step).ceil() * step);
                let bottom = low.unwrap_or((least / step).floor() * step);
                if bottom < top { (bottom, top) } else { (bottom, bottom + 1.0) }
            }
            Scale::Log => {
                let (least, most) = if least > 0.0 { (least, most) } else { (1.0, 10.0) };
                let (bottom, top) = (low.unwrap_or(least * 0.9), high.unwrap_or(most * 1.1));
                if bottom < top { (bottom, top) } else { (bottom, bottom * 10.0) }
            }
        }
    }
}

/// 1, 2 or 5 times a power of ten, so that a span has about `wanted` steps.
fn step(span: f64, wanted: usize) -> f64 {
    let rough = if span > 0.0 { span / wanted.max(1) as f64 } else { 0.25 };
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= rough * 0.999);
    factor.unwrap_or(10.0) * power
}

fn linear_ticks((low, high): (f64, f64), wanted: usize) -> Vec<f64> {
    let step = step(high - low, wanted);
    let first = (low / step - 1e-9).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|n| n as f64 * step).collect()
}

fn log_ticks((low, high): (f64, f64), wanted: usize) -> Vec<f64> {
    let exponents = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let within = |factors: &[f64]| -> Vec<f64> {
        let decade = |e: i32| factors.iter().map(move |factor| factor * 10f64.powi(e));
        exponents
            .clone()
            .flat_map(decade)
            .filter(|v| (low * 0.999..=high * 1.001).contains(v))
            .collect()
    };
    let fine: [&[f64]; 3] = [&[1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0], &[1.0, 2.0, 5.0], &[1.0]];
    let fits = |ticks: &Vec<f64>| ticks.len() <= wanted + 2;
    fine.into_iter().map(within).find(fits).unwrap_or_else(|| within(&[1.0]))
}

/// A tick as people write it.
pub(super) fn label(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if size == 0.0 => "0".to_owned(),
        _ if (1e-3..1e5).contains(&size) => {
            // Sums of steps are not quite round.
            let text = format!("{value:.6}");
            text.trim_end_matches('0').trim_end_matches('.').replace('-', "\u{2212}")
        }
        _ => format!("{value:e}").replace('-', "\u{2212}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within_the_range() {
        assert_eq!(Scale::Linear.ticks((0.0, 60.0), 6), [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]);
        let labels: Vec<_> = Scale::Linear.ticks((-0.3, 0.32), 4).into_iter().map(label).collect();
        assert_eq!(labels, ["\u{2212}0.2", "0", "0.2"]);
        assert_eq!(Scale::Log.ticks((0.9, 130.0), 6), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        assert_eq!(Scale::Log.ticks((0.9, 1e9), 6).len(), 10);
    }

    #[test]
    fn a_range_holds_its_values_and_is_never_empty() {
        let range = |scale: Scale, values: &[f64]| scale.range(values.iter().copied(), None, None);
        assert_eq!(range(Scale::Linear, &[1.0, 97.0]), (0.0, 100.0));
        for scale in [Scale::Linear, Scale::Log] {
            for values in [&[][..], &[0.0], &[3.0, 3.0], &[f64::NAN, -1.0]] {
                let (low, high) = range(scale, values);
                assert!(low < high, "{scale:?} {values:?}: {low} {high}");
                assert!(values.iter().all(|v| *v < low || *v <= high || v.is_nan()));
                assert!(scale.ticks((low, high), 5).len() < 20);
            }
        }
        assert_eq!(Scale::Linear.range([7.0].into_iter(), Some(0.0), Some(1.0)), (0.0, 1.0));
    }

    #[test]
    fn places_are_between_the_ends() {
        assert_eq!(Scale::Linear.place(5.0, (0.0, 20.0)), 0.25);
        assert!((Scale::Log.place(10.0, (1.0, 100.0)) - 0.5).abs() < 1e-12);
    }
}
