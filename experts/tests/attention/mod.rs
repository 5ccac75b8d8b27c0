//! Attention against plain arithmetic, with or without threads.

use half::f16;
use outrigger_experts::Pool;
use outrigger_experts::ops::{self, Attention};

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

/// One head of one row in f64.
fn naive(q: &[f32], k: &[f16], v: &[f16], scale: f64) -> Vec<f64> {
    let n = q.len();
    let score =
        |k: &[f16]| k.iter().zip(q).map(|(k, q)| k.to_f64() * f64::from(*q)).sum::<f64>() * scale;
    let scores: Vec<f64> = k.chunks(n).map(score).collect();
    let most = scores.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - most).exp()).sum();
    let mean = |d: usize| {
        let terms = scores.iter().zip(v.chunks(n)).map(|(s, v)| (s - most).exp() * v[d].to_f64());
        terms.sum::<f64>() / sum
    };
    (0..n).map(mean).collect()
}

/// Attention of several rows on `pool`, and of each alone, against the formula.
pub(crate) fn check(pool: &Pool) {
    // Heads for themselves, shared by 2, and by more than pass together; odd and even widths.
    for (n_heads, n_kv_heads, head_dim) in [(2, 2, 64), (4, 2, 128), (11, 1, 20)] {
        let capacity = 200;
        let halves = |seed| {
            let mut out = vec![f16::ZERO; n_kv_heads * capacity * head_dim];
            ops::to_f16(&noise(out.len(), seed), &mut out);
            out
        };
        let (k, v) = (halves(8), halves(9));
        // Within a block, at its edges, over several; out of order.
        let positions = [0, 63, 64, 199, 5, 130];
        let width = n_heads * head_dim;
        let q: Vec<f32> = noise(positions.len() * width, 10).iter().map(|q| q * 4.0).collect();
        let shape = Attention { n_heads, n_kv_heads, head_dim, capacity, scale: 0.7 };
        let mut out = vec![f32::NAN; q.len()];
        ops::attend(pool, &shape, &q, &k, &v, &positions, &mut out);
        for (r, position) in positions.iter().enumerate() {
            for h in 0..n_heads {
                let start = h / (n_heads / n_kv_heads) * capacity * head_dim;
                let seen = start..start + (position + 1) * head_dim;
                let at = r * width + h * head_dim;
                let want = naive(&q[at..][..head_dim], &k[seen.clone()], &v[seen], 0.7);
                for (ours, want) in out[at..].iter().zip(want) {
                    assert!(
                        (f64::from(*ours) - want).abs() < 1e-5,
                        "row {r} head {h}: {ours} {want}"
                    );
                }
            }
        }
        for r in 0..positions.len() {
            let mut alone = vec![0.0; width];
            let q = &q[r * width..][..width];
            ops::attend(&Pool::new(1), &shape, q, &k, &v, &positions[r..=r], &mut alone);
            assert_eq!(alone, out[r * width..][..width], "row {r} alone");
        }
    }
}
