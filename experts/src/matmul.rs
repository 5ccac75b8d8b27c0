//! Weight matrices times activation rows.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::pool::{Pool, SharedMut};
use crate::quant::{ActRow, Kernels, MAX_TILE_ROWS, Tile, TileFn};
use crate::{Activations, Mat};

/// Tasks a thread and region: enough that a slow thread's share is taken over by the others.
const TASKS_PER_THREAD: usize = 8;
/// Below this many bytes of weights a task costs more to hand out than it saves.
const MIN_TASK_BYTES: usize = 16 << 10;
/// Tasks end on multiples of this many outputs: whole cache lines, so that no two write the same one, and whole panels
/// of the kernels.
const PANEL: usize = 32;

/// `out[i, r] = w[r] · x[i]`; `out` is `[x.rows(), w.rows]`. `x` is quantised as `w.ty` wants, where it is not yet.
///
/// # Panics
/// Where a shape does not fit.
pub fn matmul(pool: &Pool, w: Mat<'_>, x: &mut Activations, out: &mut [f32]) {
    matmul_many(pool, &mut [(w, out)], x);
}

/// Several [`matmul`]s over the same input in one parallel region.
///
/// # Panics
/// As [`matmul`].
pub fn matmul_many(pool: &Pool, products: &mut [(Mat<'_>, &mut [f32])], x: &mut Activations) {
    let kernels = Kernels::best();
    let bytes = products.iter().map(|(w, _)| w.bytes.len()).sum::<usize>();
    let share = task_bytes(pool, bytes);
    let mut tasks = 0;
    for (w, out) in products.iter() {
        check(w, x);
        assert_eq!(out.len(), x.rows() * w.rows, "outputs of {} rows by {}", x.rows(), w.rows);
        x.quantize_with(pool, w.ty.act_format());
        tasks += w.rows.div_ceil(task_rows(w, share));
    }
    let (products, x) = (SharedMut::new(products), &*x);
    pool.run(tasks, &|mut task| {
        for p in 0.. {
            let product = products.at(p);
            // SAFETY: `p` is in range, since there are no more tasks than the products have. The output's pointer is
            // copied out as a raw one: no two tasks may hold the `&mut` at once.
            let (w, out) = unsafe {
                (&(*product).0, (&raw const (*product).1).cast::<*mut [f32]>().read().cast::<f32>())
            };
            let chunk = task_rows(w, share);
            let chunks = w.rows.div_ceil(chunk);
            if task < chunks {
                let rows = task * chunk..((task + 1) * chunk).min(w.rows);
                let target = out.wrapping_add(rows.start);
                // SAFETY: `out` is exclusively borrowed by the caller; this task alone writes columns `rows`.
                unsafe { multiply(kernels.tile(w.ty), w, rows, &all_rows(w, x), target, w.rows) };
                return;
            }
            task -= chunks;
        }
    });
}

/// [`matmul`] with given kernels on this thread, of what is quantised already.
pub(crate) fn single(kernels: &Kernels, w: Mat<'_>, x: &Activations, out: &mut [f32]) {
    check(&w, x);
    assert_eq!(out.len(), x.rows() * w.rows, "outputs of {} rows by {}", x.rows(), w.rows);
    // SAFETY: `out` has room for every row of `x` by every row of `w`.
    unsafe {
        multiply(kernels.tile(w.ty), &w, 0..w.rows, &all_rows(&w, x), out.as_mut_ptr(), w.rows)
    };
}

/// Activation rows for [`multiply`]: how many, and each of them.
pub(crate) struct RowsOf<F> {
    pub(crate) count: usize,
    pub(crate) row: F,
}

fn all_rows<'a>(w: &Mat<'_>, x: &'a Activations) -> RowsOf<impl Fn(usize) -> ActRow<'a>> {
    let format = w.ty.act_format();
    RowsOf { count: x.rows(), row: move |i: usize| x.row(format, i) }
}

/// `out[i * stride + r - rows.start] = w[r] · x(i)` for `r` in `rows`.
///
/// # Safety
/// `out` is valid for those writes, and nobody else touches them. The activation rows are of `w.cols` values in the
/// format of `w.ty`, and `kernel` is a kernel for it on this machine.
pub(crate) unsafe fn multiply<'a>(
    kernel: TileFn,
    w: &Mat<'_>,
    rows: Range<usize>,
    x: &RowsOf<impl Fn(usize) -> ActRow<'a>>,
    out: *mut f32,
    stride: usize,
) {
    let row_bytes = w.bytes.len() / w.rows;
    for first in (0..x.count).step_by(MAX_TILE_ROWS) {
        let count = MAX_TILE_ROWS.min(x.count - first);
        let mut room = [const { MaybeUninit::<ActRow<'_>>::uninit() }; MAX_TILE_ROWS];
        for (i, row) in room[..count].iter_mut().enumerate() {
            row.write((x.row)(first + i));
        }
        // SAFETY: the first `count` were just written.
        let tile_rows = unsafe { std::slice::from_raw_parts(room.as_ptr().cast(), count) };
        // SAFETY: by the caller; the tile is part of what it promised.
        unsafe {
            kernel(&Tile {
                w: &w.bytes[rows.start * row_bytes..rows.end * row_bytes],
                row_bytes,
                rows: rows.len(),
                x: tile_rows,
                out: out.add(first * stride),
                stride,
            });
        }
    }
}

/// Bytes of weights for one task of a region that reads `bytes`.
pub(crate) fn task_bytes(pool: &Pool, bytes: usize) -> usize {
    (bytes / (pool.threads() * TASKS_PER_THREAD)).max(MIN_TASK_BYTES)
}

/// Rows of `w` for one task.
pub(crate) fn task_rows(w: &Mat<'_>, task_bytes: usize) -> usize {
    (task_bytes * w.rows / w.bytes.len().max(1)).next_multiple_of(PANEL).max(PANEL)
}

/// Panics where `w` is not what it says or does not fit `x`.
pub(crate) fn check(w: &Mat<'_>, x: &Activations) {
    let bytes = w.ty.row_bytes(w.cols).and_then(|row| row.checked_mul(w.rows));
    assert_eq!(bytes, Some(w.bytes.len()), "bytes of {} by {} {} weights", w.rows, w.cols, w.ty);
    assert_eq!(w.cols, x.cols(), "inputs of a matrix and values of an activation row");
}
