//! The trunk's arithmetic against the formulas in f64.

mod common;

use common::noise;
use outrigger_experts::ops;

#[track_caller]
fn assert_near(ours: &[f32], want: impl Iterator<Item = f64>, tolerance: f64) {
    let want: Vec<f64> = want.collect();
    assert_eq!(ours.len(), want.len());
    for (i, (ours, want)) in ours.iter().zip(want).enumerate() {
        let error = (f64::from(*ours) - want).abs();
        assert!(error <= tolerance * want.abs().max(1e-3), "value {i}: {ours}, not {want}");
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

#[test]
fn rms_norm_divides_by_the_root_mean_square() {
    for n in [1, 30, 64, 2048] {
        let (x, weight) = (noise(n, 1), noise(n, 2));
        let mut out = vec![0.0; n];
        ops::rms_norm(&x, &weight, 1e-5, &mut out);
        let mean = wide(&x).iter().map(|x| x * x).sum::<f64>() / n as f64;
        let scale = 1.0 / (mean + 1e-5).sqrt();
        assert_near(&out, wide(&x).iter().zip(wide(&weight)).map(|(x, w)| x * scale * w), 1e-6);
        let mut in_place = x;
        ops::rms_norm_in_place(&mut in_place, &weight, 1e-5);
        assert_eq!(in_place, out);
    }
}

#[test]
fn silu_is_right_from_end_to_end() {
    let x: Vec<f32> = (-400..400).map(|i| i as f32 * 0.25).collect();
    let silu = |x: &f32| f64::from(*x) / (1.0 + (-f64::from(*x)).exp());
    let mut products = noise(800, 3);
    let want: Vec<f64> = x.iter().zip(&products).map(|(x, up)| silu(x) * f64::from(*up)).collect();
    ops::silu_times(&x, &mut products);
    assert_near(&products, want.into_iter(), 1e-6);
    let mut bad = [1.0];
    ops::silu_times(&[f32::NAN], &mut bad);
    assert!(bad[0].is_nan());
}

#[test]
fn sums_of_vectors() {
    for n in [1, 15, 16, 100, 2048] {
        let (a, b) = (noise(n, 5), noise(n, 6));
        let mut y = b.clone();
        ops::axpy(0.5, &a, &mut y);
        ops::add(&a, &mut y);
        assert_near(&y, wide(&a).iter().zip(wide(&b)).map(|(a, b)| 1.5 * a + b), 1e-4);
    }
}

#[test]
fn rope_turns_each_pair_by_its_angle() {
    let (head_dim, dim, position) = (24, 16, 37);
    let frequencies = ops::rope_frequencies(dim, 10_000.0, 2.0);
    let (mut cos, mut sin) = (vec![0.0; dim / 2], vec![0.0; dim / 2]);
    ops::rope_angles(position, &frequencies, &mut cos, &mut sin);
    type Rope = fn(&mut [f32], usize, &[f32], &[f32]);
    type Pair = fn(usize) -> (usize, usize);
    let styles: [(Rope, Pair); 2] =
        [(ops::rope_norm, |i| (2 * i, 2 * i + 1)), (ops::rope_neox, |i| (i, i + 8))];
    for (rope, pair) in styles {
        let x = noise(3 * head_dim, 7);
        let mut ours = x.clone();
        rope(&mut ours, head_dim, &cos, &sin);
        let mut want = wide(&x);
        for (head, x) in want.chunks_mut(head_dim).zip(x.chunks(head_dim)) {
            for i in 0..dim / 2 {
                let angle = position as f64 / 2.0 / 10_000f64.powf(2.0 * i as f64 / dim as f64);
                let (a, b) = (f64::from(x[pair(i).0]), f64::from(x[pair(i).1]));
                head[pair(i).0] = a * angle.cos() - b * angle.sin();
                head[pair(i).1] = a * angle.sin() + b * angle.cos();
            }
        }
        assert_near(&ours, want.into_iter(), 1e-3);
    }
}
