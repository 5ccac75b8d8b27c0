//! How fast each kernel streams weights, beside how fast the memory can be read, and what several rows make of them.
//!
//! `cargo bench -p outrigger-experts -- 'one row/Q4_K'`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use outrigger_experts::{Activations, GgmlType, Mat, Pool, matmul, quantize, read_bandwidth};
use std::hint::black_box;
use std::time::Duration;

/// Much more than the caches hold.
const BYTES: usize = 256 << 20;
/// Weights a row.
const COLS: usize = 2048;
/// Activation rows of prefill.
const ROWS: usize = 64;

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
        for threads in threads {
            let pool = Pool::new(threads);
            let w = Mat { ty, rows, cols: COLS, bytes: &bytes };
            one_row(criterion, &pool, w);
            // Some hundred rows, as an expert has.
            let rows = 1024;
            let bytes = &bytes[..bytes.len() / w.rows * rows];
            several_rows(criterion, &pool, Mat { rows, bytes, ..w });
        }
    }
}

/// Bytes of weights a second.
fn one_row(criterion: &mut Criterion, pool: &Pool, w: Mat<'_>) {
    let mut group = criterion.benchmark_group("one row");
    group.throughput(Throughput::Bytes(w.bytes.len() as u64));
    product(&mut group, pool, w, 1);
}

/// Multiplications and additions a second.
fn several_rows(criterion: &mut Criterion, pool: &Pool, w: Mat<'_>) {
    let mut group = criterion.benchmark_group(format!("{ROWS} rows"));
    group.throughput(Throughput::Elements((2 * ROWS * w.rows * w.cols) as u64));
    product(&mut group, pool, w, ROWS);
}

fn product(
    group: &mut criterion::BenchmarkGroup<'_, criterion::measurement::WallTime>,
    pool: &Pool,
    w: Mat<'_>,
    rows: usize,
) {
    group.sample_size(10).warm_up_time(Duration::from_millis(200));
    group.measurement_time(Duration::from_millis(800));
    let mut x = Activations::new(w.cols);
    x.set(&noise(rows * w.cols));
    x.quantize(w.ty.act_format());
    let mut out = vec![0.0; rows * w.rows];
    group.bench_function(BenchmarkId::new(w.ty.name(), pool.threads()), |bencher| {
        bencher.iter(|| matmul(pool, w, black_box(&x), black_box(&mut out)));
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
