//! The little linear algebra that fitting needs, on row-major matrices.

use std::ops::Range;

use crate::Pool;
use crate::pool::SharedMut;
use crate::quant::isa::multiversion;

/// Columns that a factor gains at a time, and rows of one task: what is read again and again stays in the cache.
const COLUMNS: usize = 32;
/// The fewest rows of a product that one task computes: each packs all of the other matrix for itself.
const TASK_ROWS: usize = 64;

/// `a bᵀ` of `a`, `[m, k]`, and `b`, `[n, k]`: `[m, n]`.
pub(super) fn times_transposed(pool: &Pool, a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    let (a, b) = (View { values: a, row: k, column: 1 }, View { values: b, row: 1, column: k });
    product(pool, &a, &b, [a.values.len() / k, k, b.values.len() / k])
}

/// `xᵀ y` of samples `x`, `[rows, m]`, and `y`, `[rows, n]`: `[m, n]`.
pub(super) fn moments(pool: &Pool, x: &[f32], m: usize, y: &[f32], n: usize) -> Vec<f32> {
    let (x, y) = (View { values: x, row: 1, column: m }, View { values: y, row: n, column: 1 });
    product(pool, &x, &y, [m, x.values.len() / m, n])
}

/// A matrix by its strides.
struct View<'a> {
    values: &'a [f32],
    row: usize,
    column: usize,
}

impl View<'_> {
    fn check(&self, rows: usize, columns: usize) {
        let past_end = rows.max(1) * columns.max(1) > self.values.len() && rows * columns > 0;
        assert!(!past_end, "{} values for {rows} by {columns}", self.values.len());
    }
}

/// `a b` of an `[m, k]` and a `[k, n]` matrix, both stored without gaps, by the rows or by the columns.
fn product(pool: &Pool, a: &View<'_>, b: &View<'_>, [m, k, n]: [usize; 3]) -> Vec<f32> {
    a.check(m, k);
    b.check(k, n);
    let mut out = vec![0.0; m * n];
    if k == 0 {
        return out;
    }
    let shared = SharedMut::new(&mut out);
    let share = m.div_ceil(2 * pool.threads()).max(TASK_ROWS);
    pool.run(m.div_ceil(share), &|task| {
        let first = task * share;
        let rows = share.min(m - first);
        // SAFETY: each task has rows of its own.
        let out = unsafe { shared.slice(first * n, rows * n) };
        let stride = |stride: usize| stride as isize;
        // SAFETY: without gaps, `rows` rows from `first` of `a` and all of `b` lie within the values, as was checked.
        unsafe {
            matrixmultiply::sgemm(
                rows,
                k,
                n,
                1.0,
                a.values.as_ptr().add(first * a.row),
                stride(a.row),
                stride(a.column),
                b.values.as_ptr(),
                stride(b.row),
                stride(b.column),
                0.0,
                out.as_mut_ptr(),
                stride(n),
                1,
            );
        }
    });
    out
}

/// Adds `share` of the mean of a square matrix's diagonal to it, or 1 where that is 0.
pub(super) fn damp(a: &mut [f32], n: usize, share: f32) {
    let mean = trace(a, n) / n as f32;
    let add = if mean > 0.0 { share * mean } else { 1.0 };
    (0..n).for_each(|i| a[i * n + i] += add);
}

/// The sum of a square matrix's diagonal.
pub(super) fn trace(a: &[f32], n: usize) -> f32 {
    (0..n).map(|i| a[i * n + i]).sum()
}

/// The lower `l` with `l lᵀ = a` for a symmetric positive definite `a`, `[n, n]`.
pub(super) fn cholesky(pool: &Pool, a: &[f32], n: usize) -> Vec<f64> {
    let mut l = vec![0.0; n * n];
    for first in (0..n).step_by(COLUMNS) {
        let columns = first..(first + COLUMNS).min(n);
        // The block's own rows one after another, then all rows below, which know only those.
        for i in columns.clone() {
            let (done, row) = l.split_at_mut(i * n);
            factor_row(&mut row[..n], &a[i * n..][..n], i, done, first..i + 1);
        }
        let (done, below) = l.split_at_mut(columns.end * n);
        let rows = below.len() / n;
        let shared = SharedMut::new(below);
        pool.run(rows.div_ceil(COLUMNS), &|task| {
            for r in task * COLUMNS..((task + 1) * COLUMNS).min(rows) {
                let i = columns.end + r;
                // SAFETY: each task has rows of its own.
                let row = unsafe { shared.slice(r * n, n) };
                factor_row(row, &a[i * n..][..n], i, done, columns.clone());
            }
        });
    }
    l
}

/// Fills `columns` of row `i` of a factor, whose columns before them are there, as are the rows that they name.
fn factor_row(row: &mut [f64], a: &[f32], i: usize, done: &[f64], columns: Range<usize>) {
    let n = row.len();
    for j in columns {
        let above = if i == j { &row[..j] } else { &done[j * n..][..j] };
        let rest = f64::from(a[j]) - dot(&row[..j], above);
        row[j] = if i == j { rest.max(f64::MIN_POSITIVE).sqrt() } else { rest / done[j * n + j] };
    }
}

/// Solves `x l lᵀ = b` for each row of `b`, in place.
pub(super) fn solve(pool: &Pool, l: &[f64], b: &mut [f64], n: usize) {
    let rows = b.len() / n;
    let shared = SharedMut::new(b);
    pool.run(rows.div_ceil(COLUMNS), &|task| {
        for r in task * COLUMNS..((task + 1) * COLUMNS).min(rows) {
            // SAFETY: each task has rows of its own.
            solve_row(l, unsafe { shared.slice(r * n, n) });
        }
    });
}

fn solve_row(l: &[f64], b: &mut [f64]) {
    let n = b.len();
    for i in 0..n {
        b[i] = (b[i] - dot(&l[i * n..][..i], &b[..i])) / l[i * n + i];
    }
    for i in (0..n).rev() {
        b[i] /= l[i * n + i];
        let x = b[i];
        subtract(x, &l[i * n..][..i], &mut b[..i]);
    }
}

multiversion! {
    /// `b -= x * l`
    fn subtract(x: f64, l: &[f64], b: &mut [f64]) {
        b.iter_mut().zip(l).for_each(|(b, l)| *b -= x * l);
    }
}

multiversion! {
    fn dot(a: &[f64], b: &[f64]) -> f64 {
        let (a, a_rest) = a.as_chunks::<8>();
        let (b, b_rest) = b.as_chunks::<8>();
        let mut sums = [0.0; 8];
        for (a, b) in a.iter().zip(b) {
            for i in 0..8 {
                sums[i] += a[i] * b[i];
            }
        }
        let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
        sums.iter().sum::<f64>() + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of a matrix that is nothing special.
    fn noise(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 % 1009) as f32 / 504.5 - 1.0).powi(3)).collect()
    }

    #[test]
    fn moments_are_sums_of_products() {
        let (x, y) = (noise(5 * 32), noise(5 * 64));
        let got = moments(&Pool::new(1), &x, 32, &y, 64);
        for i in 0..32 {
            for j in 0..64 {
                let want: f32 = (0..5).map(|r| x[r * 32 + i] * y[r * 64 + j]).sum();
                assert!((got[i * 64 + j] - want).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn a_factor_multiplies_back_and_solves() {
        let n = 100;
        let x = noise(3 * n * n);
        let mut a = moments(&Pool::new(1), &x, n, &x, n);
        damp(&mut a, n, 0.01);
        let l = cholesky(&Pool::new(2), &a, n);
        for i in 0..n {
            for j in 0..n {
                let back: f64 = (0..n).map(|k| l[i * n + k] * l[j * n + k]).sum();
                assert!((back - f64::from(a[i * n + j])).abs() < 1e-3, "{i} {j}");
            }
        }
        let want: Vec<f64> = (0..n).map(|i| i as f64 - 3.0).collect();
        let mut b: Vec<f64> =
            (0..n).map(|j| (0..n).map(|i| want[i] * f64::from(a[i * n + j])).sum()).collect();
        solve(&Pool::new(2), &l, &mut b, n);
        b.iter().zip(&want).for_each(|(b, want)| assert!((b - want).abs() < 1e-3, "{b} {want}"));
    }
}
