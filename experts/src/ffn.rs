//! The feed-forward network of a layer's experts: `weight * down(silu(gate x) * up x)`, summed over experts.

use std::mem::MaybeUninit;

use crate::matmul::{self, RowsOf, multiply};
use crate::ops::silu_times;
use crate::pool::{Pool, SharedMut};
use crate::quant::isa::multiversion;
use crate::quant::{Kernels, MAX_TILE_ROWS};
use crate::{Activations, Mat};

/// One expert and the rows that it runs for.
#[derive(Clone, Copy, Debug)]
pub struct Group<'a> {
    /// `[n_ff, n_embd]`.
    pub gate_proj: Mat<'a>,
    /// `[n_ff, n_embd]`.
    pub up_proj: Mat<'a>,
    /// `[n_embd, n_ff]`.
    pub down_proj: Mat<'a>,
    /// Each activation row with the weight that its output gets.
    pub rows: &'a [(u32, f32)],
}

/// Buffers of [`run_experts`], kept between calls.
#[derive(Debug, Default)]
pub struct FfnScratch {
    /// Each group's first (group, row) pair, and the number of pairs at the end.
    starts: Vec<usize>,
    /// `[pairs, n_ff]`.
    gate: Vec<f32>,
    /// `silu(gate) * up`, `[pairs, n_ff]`.
    hidden: Activations,
}

/// Outputs that a task of the second phase computes, at least and at most: an expert's part of them is a stretch of memory
/// that begins without a prefetch.
const DOWN_ROWS: (usize, usize) = (64, 256);
/// Tasks of the second phase for each thread.
const DOWN_TASKS: usize = 4;

/// Adds to each named row of `out` (`[x.rows(), n_embd]`) the weighted outputs of its experts, in the groups' order:
/// the same bits whatever the number of threads and whatever other rows there are. Sums are doubles, so that their f32
/// roundings hardly ever depend on the order of adding: the experts of a row may be split over sites.
///
/// # Panics
/// Where shapes do not fit each other or a row is beyond `x`.
pub fn run_experts(
    pool: &Pool,
    x: &mut Activations,
    groups: &[Group<'_>],
    scratch: &mut FfnScratch,
    out: &mut [f64],
) {
    let Some(first) = groups.first() else { return };
    let (n_ff, n_embd) = (first.gate_proj.rows, first.down_proj.rows);
    assert_eq!(out.len(), x.rows() * n_embd, "outputs of {} rows by {n_embd}", x.rows());
    for group in groups {
        for w in [&group.gate_proj, &group.up_proj] {
            matmul::check(w, x);
            assert_eq!(w.rows, n_ff, "outputs of a projection into the experts' width");
            x.quantize_with(pool, w.ty.act_format());
        }
        assert_eq!(
            (group.down_proj.rows, group.down_proj.cols),
            (n_embd, n_ff),
            "shape of down_proj"
        );
        assert!(
            group.rows.iter().all(|(row, _)| (*row as usize) < x.rows()),
            "a row beyond the input"
        );
    }
    scratch.starts.clear();
    scratch.starts.push(0);
    for group in groups {
        scratch.starts.push(scratch.starts[scratch.starts.len() - 1] + group.rows.len());
    }
    let pairs = scratch.starts[groups.len()];
    scratch.gate.resize(pairs * n_ff, 0.0);
    let hidden = scratch.hidden.reshape(pairs, n_ff);

    gate_and_up(pool, x, groups, &scratch.starts, &mut scratch.gate, hidden);
    for group in groups {
        matmul::check(&group.down_proj, &scratch.hidden);
        scratch.hidden.quantize_with(pool, group.down_proj.ty.act_format());
    }
    down(pool, &scratch.hidden, groups, &scratch.starts, out);
}

/// `hidden[pair] = silu(gate_proj x) * (up_proj x)`, split over experts and their outputs.
fn gate_and_up(
    pool: &Pool,
    x: &Activations,
    groups: &[Group<'_>],
    starts: &[usize],
    gate: &mut [f32],
    hidden: &mut [f32],
) {
    let kernels = Kernels::best();
    let n_ff = groups[0].gate_proj.rows;
    let bytes = groups.iter().map(|g| g.gate_proj.bytes.len() + g.up_proj.bytes.len()).sum();
    // Both matrices' rows are one task.
    let chunk = matmul::task_rows(&groups[0].gate_proj, matmul::task_bytes(pool, bytes) / 2);
    let chunks = n_ff.div_ceil(chunk);
    let (gate, hidden) = (SharedMut::new(gate), SharedMut::new(hidden));
    pool.run(groups.len() * chunks, &|task| {
        let (g, group) = (task / chunks, &groups[task / chunks]);
        if group.rows.is_empty() {
            return;
        }
        let start = task % chunks * chunk;
        let outputs = start..(start + chunk).min(n_ff);
        for (w, to) in [(&group.gate_proj, &gate), (&group.up_proj, &hidden)] {
            let format = w.ty.act_format();
            let rows = RowsOf {
                count: group.rows.len(),
                row: |i: usize| x.row(format, group.rows[i].0 as usize),
            };
            let to = to.at(starts[g] * n_ff + start);
            // SAFETY: this task alone writes these outputs of this group's pairs, and both buffers hold all pairs.
            unsafe { multiply(kernels.tile(w.ty), w, outputs.clone(), &rows, to, n_ff) };
        }
        for pair in starts[g]..starts[g + 1] {
            let at = pair * n_ff + start;
            // SAFETY: as above.
            let (gate, hidden) =
                unsafe { (gate.slice(at, outputs.len()), hidden.slice(at, outputs.len())) };
            silu_times(gate, hidden);
        }
    });
}

multiversion! {
    /// `out += weight * y`
    fn add_weighted(weight: f32, y: &[f32], out: &mut [f64]) {
        for (out, y) in out.iter_mut().zip(y) {
            *out += f64::from(weight) * f64::from(*y);
        }
    }
}

/// `out[row] += weight * (down_proj hidden[pair])`, split over outputs: a task adds all groups up in order.
fn down(
    pool: &Pool,
    hidden: &Activations,
    groups: &[Group<'_>],
    starts: &[usize],
    out: &mut [f64],
) {
    let kernels = Kernels::best();
    let n_embd = groups[0].down_proj.rows;
    let out = SharedMut::new(out);
    let (least, most) = DOWN_ROWS;
    let share = (n_embd / (pool.threads() * DOWN_TASKS)).next_multiple_of(least).clamp(least, most);
    pool.run(n_embd.div_ceil(share), &|task| {
        let outputs = task * share..((task + 1) * share).min(n_embd);
        let mut room = [const { MaybeUninit::<f32>::uninit() }; MAX_TILE_ROWS * DOWN_ROWS.1];
        for (group, start) in groups.iter().zip(starts) {
            let format = group.down_proj.ty.act_format();
            for (batch, named) in group.rows.chunks(MAX_TILE_ROWS).enumerate() {
                let first = start + batch * MAX_TILE_ROWS;
                let rows =
                    RowsOf { count: named.len(), row: |i: usize| hidden.row(format, first + i) };
                let (kernel, w) = (kernels.tile(group.down_proj.ty), &group.down_proj);
                let sums = room.as_mut_ptr().cast();
                // SAFETY: there is room for a batch by so many outputs, and the kernel writes each.
                let sums = unsafe {
                    multiply(kernel, w, outputs.clone(), &rows, sums, outputs.len());
                    std::slice::from_raw_parts(sums, named.len() * outputs.len())
                };
                for ((row, weight), sums) in named.iter().zip(sums.chunks_exact(outputs.len())) {
                    // SAFETY: this task alone writes these outputs.
                    let out =
                        unsafe { out.slice(*row as usize * n_embd + outputs.start, outputs.len()) };
                    add_weighted(*weight, sums, out);
                }
            }
        }
    });
}
