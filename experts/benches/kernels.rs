//! How fast each kernel streams weights, beside how fast the memory can be read, and what several rows make of them:
//! with one thread and with all on the best instruction set, and with one on each that this machine has.
//!
//! `cargo bench -p outrigger-experts -- 'one row/Q4_K'`, `'64 rows/Q4_K/AVX2$'`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use outrigger_experts::{
    Activations, GgmlType, Kernels, Mat, Pool, matmul, quantize, read_bandwidth,
};
use std::hint::black_box;
use std::time::Duration;

/// Much more than the caches hold.
const BYTES: usize = 256 << 20;
/// Weights a row.
const COLS: usize = 2048;
/// Activation rows: decoding, a small batch, prefill.
const ROWS: [usize; 3] = [1, 8, 64];

fn kernels(criterion: &mut Criterion) {
    let threads = [1, std::thread::available_parallelism().map_or(1, usize::from)];
    let bytes = vec![1u8; BYTES];
    for threads in threads {
        let read = read_bandwidth(&Pool::new(threads), &bytes);
        println!("memory: {:.1} GB/s read by {threads} threads", read / 1e9);
    }
    drop(bytes);
    for ty in GgmlType::all() {
        let mut bytes = Vec::new();
        quantize(ty, &noise(16 * COLS), &mut bytes);
        let rows = BYTES / bytes.len() * 16;
        let bytes = bytes.repeat(rows / 16);
        let all = Mat { ty, rows, cols: COLS, bytes: &bytes };
        // Some hundred rows, as an expert has.
        let some = Mat { rows: 1024, bytes: &bytes[..bytes.len() / rows * 1024], ..all };
        for n in ROWS {
            let w = if n == 1 { all } else { some };
            for threads in threads {
                let pool = Pool::new(threads);
                product(criterion, w, n, &format!("{threads} threads"), |x, out| {
                    matmul(&pool, w, x, out);
                });
            }
            // The first is the plain reference.
            for kernels in Kernels::available().skip(1) {
                product(criterion, w, n, kernels.name(), |x, out| kernels.matmul(w, x, out));
            }
        }
    }
}

/// Of one row, bytes of weights a second; of several, multiplications and additions.
fn product(
    criterion: &mut Criterion,
    w: Mat<'_>,
    n: usize,
    how: &str,
    matmul: impl Fn(&mut Activations, &mut [f32]),
) {
    let (name, throughput) = match n {
        1 => ("one row".to_owned(), Throughput::Bytes(w.bytes.len() as u64)),
        _ => (format!("{n} rows"), Throughput::Elements((2 * n * w.rows * w.cols) as u64)),
    };
    let mut group = criterion.benchmark_group(name);
    group.throughput(throughput);
    group.sample_size(10).warm_up_time(Duration::from_millis(200));
    group.measurement_time(Duration::from_millis(800));
    let mut x = Activations::new(w.cols);
    x.set(&noise(n * w.cols));
    x.quantize(w.ty.act_format());
    let mut out = vec![0.0; n * w.rows];
    group.bench_function(BenchmarkId::new(w.ty.name(), how), |bencher| {
        bencher.iter(|| matmul(black_box(&mut x), black_box(&mut out)));
    });
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

criterion_group!(benches, kernels);
criterion_main!(benches);
