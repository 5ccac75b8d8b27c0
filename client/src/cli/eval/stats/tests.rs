use super::*;

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-6, "{found}, expected {expected}");
}

/// Between 0 and 1: mean 1/2, variance 1/12.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    rng.next_u64() as f64 / 2.0_f64.powi(64)
}

/// Random rows, each `run` times in a row.
fn rows(count: usize, run: usize, seed: u64) -> Vec<[f64; 1]> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut value = 0.0;
    let row = |i| {
        if i % run == 0 {
            value = uniform(&mut rng);
        }
        [value]
    };
    (0..count).map(row).collect()
}

fn width(texts: &[Vec<[f64; 1]>]) -> f64 {
    let [Estimate { value, low, high }] = estimate(texts);
    assert!(low <= value && value <= high, "{low} {value} {high}");
    high - low
}

#[test]
fn equal_rows_leave_no_doubt() {
    for count in [1, 2, 31, 33, 1000] {
        let same = [0.0, 1.0, 0.7];
        let found = estimate(&[vec![same; count], vec![same; 3]]);
        for (found, same) in found.into_iter().zip(same) {
            for part in [found.value, found.low, found.high] {
                assert!((part - same).abs() < 1e-12, "{part}, expected {same}");
            }
        }
        // What a model at no distance from itself shows is exact.
        assert_eq!(found[0].map(f64::exp), Estimate { value: 1.0, low: 1.0, high: 1.0 });
        assert_eq!(found[1], Estimate { value: 1.0, low: 1.0, high: 1.0 });
    }
}

#[test]
fn the_interval_of_independent_rows_is_that_of_the_normal_distribution() {
    let count = 20_000;
    let expected = 2.0 * 1.96 * (1.0 / 12.0 / f64::from(count)).sqrt();
    let found = width(&[rows(count as usize, 1, 5)]);
    assert!((found / expected - 1.0).abs() < 0.15, "{found}, expected {expected}");
}

/// Runs of 16 equal rows say as much as a sixteenth of the rows: intervals are four times as wide. Resampling row by
/// row would not see it.
#[test]
fn rows_that_err_together_widen_the_interval() {
    let ratio = width(&[rows(20_000, 16, 5)]) / width(&[rows(20_000, 1, 5)]);
    assert!((2.8..=4.2).contains(&ratio), "{ratio}");
}

#[test]
fn most_intervals_hold_the_truth() {
    let holds = |seed: &u64| {
        let [Estimate { low, high, .. }] = estimate(&[rows(256, 1, *seed)]);
        (low..=high).contains(&0.5)
    };
    let held = (0..100).filter(holds).count();
    assert!((85..=99).contains(&held), "{held} of 100");
}

#[test]
fn texts_count_the_same_however_long() {
    let (short, long) = (rows(100, 1, 1), rows(900, 1, 2));
    let mean = |rows: &[[f64; 1]]| rows.iter().map(|row| row[0]).sum::<f64>() / rows.len() as f64;
    let expected = (mean(&short) + mean(&long)) / 2.0;
    close(estimate(&[short, long])[0].value, expected);
}

#[test]
fn a_short_text_is_in_doubt_too() {
    assert!(width(&[rows(20, 1, 9)]) > 0.05);
}
