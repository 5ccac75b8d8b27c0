//! Fitting approximations of an expert to the inputs that it sees: what stands in for it where it cannot run.
//!
//! An expert's three matrices are vector-quantised ([`GgmlType::Vq`]): the two that read the input with one type, the one
//! that writes the output with another, since its errors weigh more. The last resort is the mean output.

mod code;
mod linalg;

use crate::{GgmlType, Mat, Pool, dequantize, ops};
use code::Coder;
use linalg::{cholesky, damp, moments, solve, times_transposed, trace};

/// How much the layer's inputs as a whole count beside those of an expert's own rows: an expert sees few.
const LAYER_SHARE: f32 = 0.1;
/// How much the output matrix is held to what it was, as a share of the mean square of what it reads.
const RIDGE: f32 = 0.1;

/// The second moments of a layer's inputs, of trace 1, `[n, n]`.
pub struct LayerMoments(Vec<f32>);

impl LayerMoments {
    /// Of `x`, `[rows, n]`.
    pub fn new(pool: &Pool, x: &[f32], n: usize) -> LayerMoments {
        let mut moments = moments(pool, x, n, x, n);
        normalise(&mut moments, n);
        LayerMoments(moments)
    }
}

/// One expert with the inputs that it sees, ready to be approximated.
pub struct Fit<'a> {
    pool: &'a Pool,
    n_embd: usize,
    n_ff: usize,
    /// `[n_ff, n_embd]`
    gate: Vec<f32>,
    up: Vec<f32>,
    /// `[n_embd, n_ff]`
    down: Vec<f32>,
    /// `[rows, n_embd]`
    x: &'a [f32],
    /// `[rows]`, the routed weights.
    weights: &'a [f32],
    coder: Coder,
    /// What `down` reads for each row, times its weight, `[rows, n_ff]`.
    hidden: Vec<f32>,
    /// The weighted outputs, `[rows, n_embd]`.
    output: Vec<f32>,
}

/// The two matrices that read the input, coded.
pub struct Inputs {
    /// Rows of [`GgmlType::Vq`].
    pub gate_proj: Vec<u8>,
    /// Rows of [`GgmlType::Vq`].
    pub up_proj: Vec<u8>,
    /// What `down_proj` then reads, as in [`Fit`].
    hidden: Vec<f32>,
}

/// The matrix that writes the output, coded for what it reads.
pub struct Output {
    /// Rows of [`GgmlType::Vq`].
    pub down_proj: Vec<u8>,
    /// What is wrong with the weighted outputs: squared, summed over rows and values.
    pub error: f64,
}

impl<'a> Fit<'a> {
    /// For an expert's gate, up and down projections and the rows that are routed to it: `x`, `[rows, n_embd]`, and
    /// their weights, `[rows]`.
    pub fn new(
        pool: &'a Pool,
        [gate, up, down]: [Mat<'_>; 3],
        layer: &LayerMoments,
        x: &'a [f32],
        weights: &'a [f32],
    ) -> Fit<'a> {
        let (n_embd, n_ff) = (gate.cols, gate.rows);
        let weighted: Vec<f32> = scale_rows(x, weights, n_embd);
        let mut own = moments(pool, &weighted, n_embd, &weighted, n_embd);
        normalise(&mut own, n_embd);
        own.iter_mut().zip(&layer.0).for_each(|(own, layer)| *own += LAYER_SHARE * layer);
        let mut fit = Fit {
            pool,
            n_embd,
            n_ff,
            gate: values(gate),
            up: values(up),
            down: values(down),
            x,
            weights,
            coder: Coder::new(pool, own, n_embd),
            hidden: Vec::new(),
            output: Vec::new(),
        };
        fit.hidden = fit.hide(&fit.gate, &fit.up);
        fit.output = fit.write_out(&fit.hidden, &fit.down);
        fit
    }

    /// What the weighted outputs add up to, squared: the error of leaving the expert out.
    pub fn energy(&self) -> f64 {
        square(self.output.iter().copied())
    }

    /// The output that is nearest to all of them, `[n_embd]`, and its error as in [`Output`].
    pub fn mean(&self) -> (Vec<f32>, f64) {
        let total: f64 = square(self.weights.iter().copied()).max(f64::MIN_POSITIVE);
        let mut sums = vec![0.0f64; self.n_embd];
        for (row, weight) in self.output.chunks_exact(self.n_embd).zip(self.weights) {
            let weight = f64::from(*weight);
            sums.iter_mut().zip(row).for_each(|(sum, y)| *sum += weight * f64::from(*y));
        }
        let mean: Vec<f32> = sums.iter().map(|sum| (sum / total) as f32).collect();
        let rows = self.output.chunks_exact(self.n_embd).zip(self.weights);
        let error =
            rows.map(|(row, w)| square(row.iter().zip(&mean).map(|(y, m)| y - w * m))).sum();
        (mean, error)
    }

    /// Codes the matrices that read the input, so many weights a code.
    pub fn inputs(&self, dim: u8) -> Inputs {
        let coded = |w| self.coder.encode(self.pool, w, dim.into());
        let (gate_proj, up_proj) = (coded(&self.gate), coded(&self.up));
        let decoded = |bytes: &[u8]| decode(dim, bytes, self.n_embd);
        let hidden = self.hide(&decoded(&gate_proj), &decoded(&up_proj));
        Inputs { gate_proj, up_proj, hidden }
    }

    /// The error that coded inputs leave if nothing else is coded.
    pub fn inputs_error(&self, inputs: &Inputs) -> f64 {
        let (down, _) = self.refit(&inputs.hidden);
        self.error(&inputs.hidden, &down)
    }

    /// Codes the matrix that writes the output, so many weights a code, for what it reads: of coded inputs, or of the
    /// exact ones. Without a number it stays as it is, and no bytes come back.
    pub fn output(&self, inputs: Option<&Inputs>, dim: Option<u8>) -> Output {
        let hidden = inputs.map_or(&self.hidden, |inputs| &inputs.hidden);
        let Some(dim) = dim else {
            return Output { down_proj: Vec::new(), error: self.error(hidden, &self.down) };
        };
        let (down, read) = self.refit(hidden);
        let down_proj = Coder::new(self.pool, read, self.n_ff).encode(self.pool, &down, dim.into());
        let error = self.error(hidden, &decode(dim, &down_proj, self.n_ff));
        Output { down_proj, error }
    }

    /// The `down` that makes the most of approximate hidden values, and their second moments: ridge regression of the
    /// exact outputs on them, towards the `down` that was.
    fn refit(&self, hidden: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let n = self.n_ff;
        let read = moments(self.pool, hidden, n, hidden, n);
        // Yᵀ A - W AᵀA with Y = A₀ Wᵀ is W (A₀ᵀA - AᵀA).
        let mut gap = moments(self.pool, hidden, n, &self.hidden, n);
        gap.iter_mut().zip(&read).for_each(|(gap, read)| *gap -= read);
        let wanted = times_transposed(self.pool, &self.down, &gap, n);
        let mut damped = read.clone();
        damp(&mut damped, n, RIDGE);
        let factor = cholesky(self.pool, &damped, n);
        let mut change: Vec<f64> = wanted.iter().map(|x| f64::from(*x)).collect();
        solve(self.pool, &factor, &mut change, n);
        let down =
            self.down.iter().zip(change).map(|(down, change)| down + change as f32).collect();
        (down, read)
    }

    /// `weight * silu(gate x) * up x` for every row.
    fn hide(&self, gate: &[f32], up: &[f32]) -> Vec<f32> {
        let gate = times_transposed(self.pool, self.x, gate, self.n_embd);
        let mut hidden = times_transposed(self.pool, self.x, up, self.n_embd);
        ops::silu_times(&gate, &mut hidden);
        scale_rows(&hidden, self.weights, self.n_ff)
    }

    fn write_out(&self, hidden: &[f32], down: &[f32]) -> Vec<f32> {
        times_transposed(self.pool, hidden, down, self.n_ff)
    }

    fn error(&self, hidden: &[f32], down: &[f32]) -> f64 {
        let output = self.write_out(hidden, down);
        square(output.iter().zip(&self.output).map(|(a, b)| a - b))
    }
}

fn values(w: Mat<'_>) -> Vec<f32> {
    let mut out = vec![0.0; w.rows * w.cols];
    let rows = w.bytes.chunks_exact(w.bytes.len() / w.rows).zip(out.chunks_exact_mut(w.cols));
    rows.for_each(|(row, out)| dequantize(w.ty, row, out));
    out
}

/// The values of coded rows of `cols`.
fn decode(dim: u8, bytes: &[u8], cols: usize) -> Vec<f32> {
    let ty = GgmlType::Vq(dim);
    let rows = bytes.len() / ty.row_bytes(cols).expect("they were coded");
    values(Mat { ty, rows, cols, bytes })
}

fn scale_rows(x: &[f32], weights: &[f32], cols: usize) -> Vec<f32> {
    let rows = x.chunks_exact(cols).zip(weights);
    rows.flat_map(|(row, weight)| row.iter().map(move |x| x * weight)).collect()
}

/// Makes the trace 1, unless it is 0.
fn normalise(moments: &mut [f32], n: usize) {
    let trace = trace(moments, n);
    if trace > 0.0 {
        moments.iter_mut().for_each(|x| *x /= trace);
    }
}

fn square(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|x| f64::from(x) * f64::from(x)).sum()
}
