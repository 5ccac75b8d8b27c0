//! Attention over cached keys and values against the formula in f64.

mod common;

use common::noise;
use outrigger_experts::ops::{self, Attention, AttentionScratch, KvSide, KvTensor, KvType};
use outrigger_experts::{GgmlType, Pool, dequantize, quantize};

/// One head of one row in f64.
fn naive(q: &[f32], k: &[f32], v: &[f32], scale: f64) -> Vec<f64> {
    let n = q.len();
    let product = |(k, q): (&f32, &f32)| f64::from(*k) * f64::from(*q);
    let score = |k: &[f32]| k.iter().zip(q).map(product).sum::<f64>() * scale;
    let scores: Vec<f64> = k.chunks(n).map(score).collect();
    let most = scores.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - most).exp()).sum();
    let mean = |d: usize| {
        let terms = scores.iter().zip(v.chunks(n)).map(|(s, v)| (s - most).exp() * f64::from(v[d]));
        terms.sum::<f64>() / sum
    };
    (0..n).map(mean).collect()
}

/// Rows of `width` values as `ty` keeps them, each filled up to whole blocks for it.
fn kept(ty: GgmlType, values: &[f32], width: usize) -> Vec<f32> {
    let keep = |row: &[f32]| {
        let mut padded = row.to_vec();
        padded.resize(width.next_multiple_of(32), 0.0);
        let mut bytes = Vec::new();
        quantize(ty, &padded, &mut bytes);
        dequantize(ty, &bytes, &mut padded);
        padded.truncate(width);
        padded
    };
    values.chunks(width).flat_map(keep).collect()
}

#[test]
fn attention_is_causal_softmax_over_the_cache() {
    let pool = Pool::new(2);
    // Heads for themselves, shared by 2, by 4, and by more than pass together; odd and even widths.
    for (n_heads, n_kv_heads, head_dim) in
        [(2, 2, 64), (4, 2, 128), (8, 2, 96), (11, 1, 20), (18, 2, 80)]
    {
        let shape = Attention { n_heads, n_kv_heads, head_dim, scale: 0.7 };
        // Within a block, at its edges, over several; out of order.
        let positions = [0, 63, 64, 199, 5, 130, 131, 132, 133, 134];
        for ty in [KvType::F16, KvType::Q8_0] {
            check(&pool, &shape, ty, &positions);
        }
    }
}

/// Far enough back that its parts are tasks of their own, with some queries and threads.
#[test]
fn a_long_look_back_is_the_same_in_parts() {
    let pool = Pool::new(2);
    for (n_heads, n_kv_heads, head_dim) in [(8, 1, 40), (2, 2, 64), (9, 1, 32)] {
        let shape = Attention { n_heads, n_kv_heads, head_dim, scale: 0.5 };
        for ty in [KvType::F16, KvType::Q8_0] {
            check(&pool, &shape, ty, &[0, 63, 64, 1023, 1024, 2047, 4095, 4096, 4200]);
        }
    }
}

/// Several rows, and each alone, with keys and values kept as `ty`; the first rows see 1, 64 and 65 positions.
fn check(pool: &Pool, shape: &Attention, ty: KvType, positions: &[usize]) {
    let Attention { n_heads, n_kv_heads, head_dim, scale } = *shape;
    let capacity = positions.iter().max().unwrap() + 1;
    let plain = if ty == KvType::F16 { GgmlType::F16 } else { GgmlType::Q8_0 };
    let cache = |side, seed| {
        let values = noise(n_kv_heads * capacity * head_dim, seed);
        let mut cache = KvTensor::new(side, ty, n_kv_heads, capacity, head_dim);
        // Some positions one by one, as decoding stores them, the others together, as a prompt.
        let positions: Vec<usize> = (0..capacity).collect();
        let (each, together) = positions.split_at(capacity / 3);
        for positions in each.chunks(1).chain([together]) {
            let heads = positions.iter().flat_map(|p| (0..n_kv_heads).map(|head| (head, *p)));
            let head = |(head, p)| &values[(head * capacity + p) * head_dim..][..head_dim];
            let rows = heads.map(head).collect::<Vec<_>>().concat();
            ops::store(pool, positions, [(&mut cache, &rows)]);
        }
        (cache, kept(plain, &values, head_dim))
    };
    let ((k, naive_k), (v, naive_v)) = (cache(KvSide::Keys, 8), cache(KvSide::Values, 9));
    let width = n_heads * head_dim;
    let q: Vec<f32> = noise(positions.len() * width, 10).iter().map(|q| q * 4.0).collect();
    let attend = |pool: &Pool, q: &[f32], positions: &[usize]| {
        let mut out = vec![f32::NAN; q.len()];
        ops::attend(
            pool,
            shape,
            q,
            (&k, &v),
            positions,
            &mut AttentionScratch::default(),
            &mut out,
        );
        out
    };
    // With Q8_0, queries of up to 4 are rounded to 15 bits and a sign, which moves a score by up to
    // scale * head_dim * 4 / 65534, and on the average of so many terms by far less: a 256th of what Q8_0 itself costs.
    let tolerance = if ty == KvType::F16 { 1e-5 } else { 5e-4 };
    let out = attend(pool, &q, positions);
    for (r, position) in positions.iter().enumerate() {
        for h in 0..n_heads {
            let start = h / (n_heads / n_kv_heads) * capacity * head_dim;
            let seen = start..start + (position + 1) * head_dim;
            let at = r * width + h * head_dim;
            let (k, v) = (&naive_k[seen.clone()], &naive_v[seen]);
            let want = naive(&q[at..][..head_dim], k, v, f64::from(scale));
            for (ours, want) in out[at..].iter().zip(want) {
                let error = (f64::from(*ours) - want).abs();
                assert!(error < tolerance, "{shape:?} {ty:?} row {r} head {h}: {ours} {want}");
            }
        }
    }
    for (r, position) in positions.iter().enumerate() {
        for threads in [1, 8] {
            let alone = attend(&Pool::new(threads), &q[r * width..][..width], &[*position]);
            assert_eq!(alone, out[r * width..][..width], "{shape:?} {ty:?} row {r} alone");
        }
    }
    // A copy sees what it was made of, and no more.
    let (k, v) = (k.copy_of(64), v.copy_of(64));
    let mut seen = vec![f32::NAN; 3 * width];
    ops::attend(
        pool,
        shape,
        &q[..3 * width],
        (&k, &v),
        &positions[..3],
        &mut AttentionScratch::default(),
        &mut seen,
    );
    assert_eq!(seen[..2 * width], out[..2 * width], "{shape:?} {ty:?} copied");
    assert_ne!(seen[2 * width..], out[2 * width..3 * width], "position 64 was not copied");
}
