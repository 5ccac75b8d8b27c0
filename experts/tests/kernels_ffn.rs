//! Matrix products over the pool and the experts' FFN against naive f64.

mod common;

use common::noise;
use outrigger_experts::{
    Activations, FfnScratch, GgmlType, Group, Kernels, Mat, Pool, dequantize, matmul_many,
    quantize, run_experts,
};

const N_EMBD: usize = 512;
const N_FF: usize = 256;

/// A weight matrix that owns its bytes.
struct Weights {
    ty: GgmlType,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl Weights {
    fn new(ty: GgmlType, rows: usize, cols: usize, seed: u32) -> Weights {
        let mut bytes = Vec::new();
        let values: Vec<f32> = noise(rows * cols, seed).iter().map(|v| v * 0.1).collect();
        quantize(ty, &values, &mut bytes);
        Weights { ty, rows, cols, bytes }
    }

    fn mat(&self) -> Mat<'_> {
        Mat { ty: self.ty, rows: self.rows, cols: self.cols, bytes: &self.bytes }
    }

    /// `w x` in f64.
    fn times(&self, x: &[f64]) -> Vec<f64> {
        let mut values = vec![0.0; self.rows * self.cols];
        dequantize(self.ty, &self.bytes, &mut values);
        let row = |w: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
        values.chunks(self.cols).map(row).collect()
    }
}

struct Expert {
    gate: Weights,
    up: Weights,
    down: Weights,
}

impl Expert {
    fn new(ty: GgmlType, down: GgmlType, seed: u32) -> Expert {
        Expert {
            gate: Weights::new(ty, N_FF, N_EMBD, seed),
            up: Weights::new(ty, N_FF, N_EMBD, seed + 1),
            down: Weights::new(down, N_EMBD, N_FF, seed + 2),
        }
    }

    fn group<'a>(&'a self, rows: &'a [(u32, f32)]) -> Group<'a> {
        let (gate_proj, up_proj, down_proj) = (self.gate.mat(), self.up.mat(), self.down.mat());
        Group { gate_proj, up_proj, down_proj, rows }
    }

    fn naive(&self, x: &[f64]) -> Vec<f64> {
        let gate = self.gate.times(x);
        let hidden = gate.iter().zip(self.up.times(x)).map(|(g, u)| g / (1.0 + (-g).exp()) * u);
        self.down.times(&hidden.collect::<Vec<_>>())
    }
}

/// Rows of three experts: shared, alone, unsorted; row 2 nowhere; one expert with more rows than a batch.
fn routing(rows: u32) -> [Vec<(u32, f32)>; 3] {
    [
        vec![(0, 0.5), (3, 0.25)],
        vec![(3, 0.75), (1, -1.5)],
        (0..rows).filter(|r| *r != 2).map(|r| (r, 0.1 + r as f32 * 0.01)).collect(),
    ]
}

fn run(pool: &Pool, experts: &[Expert], routing: &[Vec<(u32, f32)>], x: &[f32]) -> Vec<f64> {
    let mut acts = Activations::new(N_EMBD);
    acts.set(x);
    let groups: Vec<Group<'_>> = experts.iter().zip(routing).map(|(e, r)| e.group(r)).collect();
    let mut out = vec![1.0; x.len()];
    run_experts(pool, &mut acts, &groups, &mut FfnScratch::default(), &mut out);
    out
}

#[test]
fn experts_add_up_as_in_f64() {
    use GgmlType::*;
    let rows = 21;
    let x = noise(rows * N_EMBD, 5);
    // The types' own formats, and the mixtures that "Q4_K_M" files have. Quantised activations cost about 1 %.
    for (ty, down, bound) in [
        (F32, F32, 1e-5),
        (F16, F16, 1e-5),
        (BF16, F32, 1e-5),
        (Q8_0, Q8_0, 0.02),
        (Q4_0, Q8_0, 0.02),
        (Q4_K, Q6_K, 0.02),
        (Q5_K, Q5_K, 0.02),
        (Q6_K, Q4_K, 0.02),
    ] {
        let experts = [1, 11, 21].map(|seed| Expert::new(ty, down, seed));
        let routing = routing(rows as u32);
        let mut want = vec![1.0f64; rows * N_EMBD];
        for (expert, named) in experts.iter().zip(&routing) {
            for (row, weight) in named {
                let at = *row as usize * N_EMBD;
                let x: Vec<f64> = x[at..][..N_EMBD].iter().map(|v| f64::from(*v)).collect();
                for (want, y) in want[at..].iter_mut().zip(expert.naive(&x)) {
                    *want += f64::from(*weight) * y;
                }
            }
        }
        let out = run(&Pool::new(2), &experts, &routing, &x);
        let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
        let error = norm(&mut out.iter().zip(&want).map(|(o, w)| o - w));
        let size = norm(&mut want.iter().map(|w| w - 1.0));
        assert!(error <= bound * size, "{ty} and {down}: {} of the result", error / size);
        assert!(out[2 * N_EMBD..3 * N_EMBD].iter().all(|v| *v == 1.0), "row 2 has no expert");
    }
}

#[test]
fn threads_and_other_rows_change_no_bit() {
    let x = noise(21 * N_EMBD, 6);
    let experts = [1, 11, 21].map(|s| Expert::new(GgmlType::Q4_K, GgmlType::Q6_K, s));
    let all = routing(21);
    let whole = run(&Pool::new(1), &experts, &all, &x);
    assert_eq!(run(&Pool::new(3), &experts, &all, &x), whole);
    for row in 0..21usize {
        let alone = all.each_ref().map(|named| {
            let own = named.iter().filter(|(r, _)| *r as usize == row);
            own.map(|(_, weight)| (0, *weight)).collect::<Vec<_>>()
        });
        let part = row * N_EMBD..(row + 1) * N_EMBD;
        assert_eq!(
            run(&Pool::new(2), &experts, &alone, &x[part.clone()]),
            whole[part],
            "row {row}"
        );
    }
}

#[test]
fn several_matrices_in_one_region_equal_each_alone() {
    let shapes = [(GgmlType::Q4_K, 300), (GgmlType::Q6_K, 1), (GgmlType::Q4_K, 64)];
    let weights = shapes.map(|(ty, rows)| Weights::new(ty, rows, N_EMBD, rows as u32));
    let mut x = Activations::new(N_EMBD);
    x.set(&noise(40 * N_EMBD, 8));
    let mut outs = shapes.map(|(_, rows)| vec![f32::NAN; 40 * rows]);
    let mut products: Vec<(Mat<'_>, &mut [f32])> =
        weights.iter().zip(&mut outs).map(|(w, out)| (w.mat(), &mut out[..])).collect();
    matmul_many(&Pool::new(3), &mut products, &mut x);
    for (w, out) in weights.iter().zip(&outs) {
        let mut alone = vec![0.0; out.len()];
        Kernels::best().matmul(w.mat(), &x, &mut alone);
        assert_eq!(out, &alone);
    }
}

#[test]
fn no_group_and_no_row_leave_the_output() {
    let x = noise(N_EMBD, 4);
    assert_eq!(run(&Pool::new(2), &[], &[], &x), vec![1.0; N_EMBD]);
    let expert = [Expert::new(GgmlType::Q8_0, GgmlType::Q8_0, 3)];
    assert_eq!(run(&Pool::new(2), &expert, &[vec![]], &x), vec![1.0; N_EMBD]);
}
