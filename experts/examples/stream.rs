//! How fast each kernel streams weights, beside how fast the memory can be read.
//!
//! `cargo run --release -p outrigger-experts --example stream -- [MEBIBYTES] [THREADS] [TYPE] [COLUMNS]`

use std::hint::black_box;
use std::time::Instant;

use outrigger_experts::{Activations, GgmlType, Mat, Pool, cpu_features, matmul, quantize};

/// Repeats; the best counts, since other work on the machine only ever slows one down.
const REPEATS: usize = 7;

fn main() {
    let mut args = std::env::args().skip(1);
    let mebibytes: usize = args.next().and_then(|a| a.parse().ok()).unwrap_or(512);
    let most: usize = args.next().and_then(|a| a.parse().ok()).unwrap_or(2);
    let only = args.next();
    let cols = args.next().and_then(|a| a.parse().ok()).unwrap_or(2048);
    let mut bytes = vec![0u8; mebibytes << 20];

    println!(
        "kernels: {}; {mebibytes} MiB, rows of {cols}; GB/s, best of {REPEATS}",
        cpu_features()
    );
    print!("{:8}", "");
    for threads in 1..=most {
        print!("{:>11}", format!("{threads} thr"));
    }
    println!("{:>16}", "64 rows, GFLOP/s");
    fill(&mut bytes, GgmlType::F32, cols);
    report("read", 1..=most, |pool| read(pool, &bytes));
    println!();
    for ty in GgmlType::all().filter(|ty| only.as_ref().is_none_or(|o| o == ty.name())) {
        let used = fill(&mut bytes, ty, cols);
        let row_bytes = ty.row_bytes(cols).expect("whole blocks");
        let w = Mat { ty, rows: used / row_bytes, cols, bytes: &bytes[..used] };
        report(ty.name(), 1..=most, |pool| product(pool, w, 1).0);
        // Enough rows to leave the caches, few enough to wait for.
        let rows = w.rows.min((64 << 20) / row_bytes);
        let w = Mat { rows, bytes: &bytes[..rows * row_bytes], ..w };
        for threads in 1..=most {
            print!("{:8.1}", product(&Pool::new(threads), w, 64).1);
        }
        println!();
    }
}

fn report(name: &str, threads: std::ops::RangeInclusive<usize>, gb_s: impl Fn(&Pool) -> f64) {
    print!("{name:8}");
    for threads in threads {
        print!("{:11.1}", gb_s(&Pool::new(threads)));
    }
}

/// GB/s and GFLOP/s of `w` times `rows` activation rows.
fn product(pool: &Pool, w: Mat<'_>, rows: usize) -> (f64, f64) {
    let mut x = Activations::new(w.cols);
    x.set(&noise(rows * w.cols));
    x.quantize(w.ty.act_format());
    let mut out = vec![0.0; rows * w.rows];
    let seconds = best(|| matmul(pool, w, black_box(&x), black_box(&mut out)));
    let flops = 2.0 * (rows * w.rows * w.cols) as f64;
    (w.bytes.len() as f64 / seconds / 1e9, flops / seconds / 1e9)
}

fn read(pool: &Pool, bytes: &[u8]) -> f64 {
    let (words, _) = bytes.as_chunks::<64>();
    let chunk = words.len().div_ceil(pool.threads() * 8);
    let seconds = best(|| {
        pool.run(words.len().div_ceil(chunk), &|task| {
            let words = &words[task * chunk..((task + 1) * chunk).min(words.len())];
            let mut sums = [0u8; 64];
            for line in words {
                for (sum, byte) in sums.iter_mut().zip(line) {
                    *sum ^= byte;
                }
            }
            black_box(sums);
        });
    });
    bytes.len() as f64 / seconds / 1e9
}

fn best(mut run: impl FnMut()) -> f64 {
    let times = (0..REPEATS).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

/// Fills with rows of the type, all from one stretch of noise; returns the bytes used.
fn fill(bytes: &mut [u8], ty: GgmlType, cols: usize) -> usize {
    let mut rows = Vec::new();
    quantize(ty, &noise(16 * cols), &mut rows);
    let used = bytes.len() / rows.len() * rows.len();
    bytes[..used].chunks_exact_mut(rows.len()).for_each(|chunk| chunk.copy_from_slice(&rows));
    used
}

fn noise(n: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}
