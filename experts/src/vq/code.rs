//! Rows of weights to codes, so that the errors of a row cancel on the inputs that it is for.
//!
//! With the inputs' second moments `H = L Lᵀ`, an error `e` of a row costs `e H eᵀ = |e L|²`. `L` is lower triangular,
//! so that going through the columns from the last to the first each code can make up for what the later ones got
//! wrong: GPTQ (Frantar et al., arXiv 2210.17323), in the form of LDLQ (Chee et al., "QuIP", arXiv 2307.13304), a
//! vector at a time (van Baalen et al., "GPTVQ", arXiv 2402.15319).

use super::linalg::{cholesky, damp};
use crate::ops::axpy;
use crate::pool::{Pool, SharedMut};
use crate::quant::isa::multiversion;
use crate::quant::vq::{DIMS, SCALE_BYTES, SIZE, STEPS, codebook, row_bytes};

/// What the moments' diagonal is damped by: a code must not trust directions that the samples hardly show.
const DAMPING: f32 = 0.01;
/// Rows that pass over the factor together: it is read from memory, a few rows' errors stay in the cache.
const ROWS: usize = 16;
/// By [`DIMS`]: a row's scale over its standard deviation. Making up for errors widens what is coded. The least is
/// flat: on a sample of the demo model's experts 0.1 more for inputs of long codes, or 0.1 less for outputs, gains 4 %
/// of the error at most.
const WIDENING: [f32; 8] = [1.05, 1.1, 1.1, 1.15, 1.17, 1.22, 1.25, 1.3];

/// Codes rows for inputs of given moments.
pub(super) struct Coder {
    n: usize,
    /// `L`, `[n, n]`.
    factor: Vec<f32>,
}

impl Coder {
    /// For inputs with these second moments, `[n, n]`.
    pub(super) fn new(pool: &Pool, mut moments: Vec<f32>, n: usize) -> Coder {
        damp(&mut moments, n, DAMPING);
        let factor = cholesky(pool, &moments, n).into_iter().map(|x| x as f32).collect();
        Coder { n, factor }
    }

    /// The rows of `w`, `[rows, n]`, `dim` weights a code, as [`GgmlType::Vq`](crate::GgmlType::Vq) stores them.
    pub(super) fn encode(&self, pool: &Pool, w: &[f32], dim: usize) -> Vec<u8> {
        let bytes = row_bytes(dim, self.n).expect("the model's rows were checked");
        let rows = w.len() / self.n;
        let mut out = vec![0; rows * bytes];
        let (book, inverses) = (Book::new(dim), self.inverses(dim));
        let shared = SharedMut::new(&mut out);
        pool.run(rows.div_ceil(ROWS), &|task| {
            let first = task * ROWS;
            let count = ROWS.min(rows - first);
            // SAFETY: each task has rows of its own.
            let out = unsafe { shared.slice(first * bytes, count * bytes) };
            self.encode_rows(&w[first * self.n..][..count * self.n], &book, &inverses, out);
        });
        out
    }

    fn encode_rows(&self, w: &[f32], book: &Book, inverses: &[f32], out: &mut [u8]) {
        let (n, dim) = (self.n, book.dim);
        let count = w.len() / n;
        let bytes = out.len() / count;
        let scales: Vec<f32> = w
            .chunks_exact(n)
            .zip(out.chunks_exact_mut(bytes))
            .map(|(w, out)| book.put_scale(w, out))
            .collect();
        // What the later codes' errors are on each column so far: `e L`.
        let mut carried = vec![0.0; count * n];
        let mut target = vec![0.0; dim];
        for code in (0..n.div_ceil(dim)).rev() {
            let columns = code * dim..(code * dim + dim).min(n);
            let inverse = &inverses[code * dim * dim..][..dim * dim];
            for r in 0..count {
                let w = &w[r * n..][columns.clone()];
                let (before, here) = carried[r * n..][..columns.end].split_at_mut(columns.start);
                target.clear();
                target.extend_from_slice(w);
                for (carried, inverse) in here.iter().zip(inverse.chunks_exact(dim)) {
                    axpy(*carried, &inverse[..w.len()], &mut target);
                }
                let best = book.nearest(&target, scales[r]);
                out[r * bytes + SCALE_BYTES + code] = best as u8;
                for (t, (w, q)) in w.iter().zip(book.vector(best)).enumerate() {
                    let row = &self.factor[(columns.start + t) * n..][..columns.start];
                    axpy(w - scales[r] * q, row, before);
                }
            }
        }
    }

    /// The inverse of each block of `dim` on the factor's diagonal, `[codes, dim, dim]`.
    fn inverses(&self, dim: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.n.div_ceil(dim) * dim * dim];
        for (code, inverse) in out.chunks_exact_mut(dim * dim).enumerate() {
            let start = code * dim;
            let l = |i: usize, j: usize| self.factor[(start + i) * self.n + start + j];
            for i in 0..dim.min(self.n - start) {
                inverse[i * dim + i] = 1.0 / l(i, i);
                for j in 0..i {
                    let sum: f32 = (j..i).map(|k| l(i, k) * inverse[k * dim + j]).sum();
                    inverse[i * dim + j] = -sum / l(i, i);
                }
            }
        }
        out
    }
}

/// A codebook in the forms that searching it wants.
struct Book {
    dim: usize,
    /// `[SIZE, dim]`
    vectors: Vec<f32>,
    /// `[dim, SIZE]`
    components: Vec<[f32; SIZE]>,
    widening: f32,
}

impl Book {
    fn new(dim: usize) -> Book {
        let vectors: Vec<f32> = codebook(dim).iter().map(|q| f32::from(*q) / STEPS).collect();
        let component = |i: usize| std::array::from_fn(|at| vectors[at * dim + i]);
        let components = (0..dim).map(component).collect();
        let at = DIMS.iter().position(|d| *d == dim).expect("a dimension with a codebook");
        Book { dim, vectors, components, widening: WIDENING[at] }
    }

    fn vector(&self, at: usize) -> &[f32] {
        &self.vectors[at * self.dim..][..self.dim]
    }

    /// Stores the scale of a row and returns it as the reader will see it.
    fn put_scale(&self, w: &[f32], out: &mut [u8]) -> f32 {
        let square = w.iter().map(|w| f64::from(*w) * f64::from(*w)).sum::<f64>() / w.len() as f64;
        let stored = half::f16::from_f32(square.sqrt() as f32 * self.widening / STEPS);
        out[..SCALE_BYTES].copy_from_slice(&stored.to_le_bytes());
        stored.to_f32() * STEPS
    }

    /// The vector whose first values, times `scale`, are nearest to `target`.
    fn nearest(&self, target: &[f32], scale: f32) -> usize {
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        nearest(&self.components[..target.len()], target, inverse)
    }
}

multiversion! {
    fn nearest(components: &[[f32; SIZE]], target: &[f32], inverse: f32) -> usize {
        // |x - c|² = |x|² - 2 (x - c / 2) · c, by every vector at once.
        let mut closeness = [0.0f32; SIZE];
        for (component, x) in components.iter().zip(target) {
            let x = x * inverse;
            for (closeness, c) in closeness.iter_mut().zip(component) {
                *closeness += (x - 0.5 * c) * c;
            }
        }
        let most = closeness.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        closeness.iter().position(|x| *x == most).unwrap_or(0)
    }
}
