//! Keys or values of one layer, kept as attention reads them.

mod multiply;

use std::str::FromStr;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::activations::q8_0;
use crate::pool::{Pool, SharedMut};
use crate::quant::kv::{LANES, Line};

pub(super) use multiply::{QUERIES, Queries, QueryRoom};

/// Positions that are read together.
pub(super) const BLOCK: usize = 64;
/// The most values a head.
pub(super) const MAX_HEAD_DIM: usize = 512;
/// Values of a head that share a scale in Q8_0: as many as a line has lanes.
const GROUP: usize = LANES;
/// Of the keys of [`LANES`] positions: a line of scales, and a line for each pair of values.
const KEY_LINES: usize = 1 + GROUP / 2;
/// Of a block's values: two lines of scales, and a line for each pair of positions.
const VALUE_LINES: usize = BLOCK / LANES + BLOCK / 2;

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// Two bytes a value.
    #[default]
    F16,
    /// 34 bytes for 32 values: half the memory, and half the bytes that a long context adds to each token.
    Q8_0,
}

impl KvType {
    /// Bytes of a head's keys or values at `positions` positions, which come in blocks of 64; values in groups of 32.
    pub fn bytes(self, head_dim: usize, positions: usize) -> usize {
        self.block_lines(head_dim) * size_of::<Line>() * positions.div_ceil(BLOCK)
    }

    fn block_lines(self, head_dim: usize) -> usize {
        match self {
            KvType::F16 => groups(head_dim) * BLOCK,
            KvType::Q8_0 => groups(head_dim) * VALUE_LINES,
        }
    }
}

fn groups(head_dim: usize) -> usize {
    head_dim.div_ceil(GROUP)
}

impl FromStr for KvType {
    type Err = String;

    fn from_str(text: &str) -> Result<KvType, String> {
        match text {
            "f16" => Ok(KvType::F16),
            "q8_0" => Ok(KvType::Q8_0),
            _ => Err(format!("found `{text}`, expected f16 or q8_0")),
        }
    }
}

/// Which way round a block of positions is kept, in lines of 32 lanes, so that attention adds up along lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvSide {
    /// A lane is a position: `[2, head_dim, 32]`; in Q8_0 `[2, head_dim / 32]` of 32 scales and `[16, 32]` pairs.
    Keys,
    /// A lane is a value: `[head_dim / 32, 64, 32]`; in Q8_0 `[head_dim / 32]` of 64 scales and `[32, 32]` pairs of positions.
    Values,
}

/// Keys or values, `[heads, capacity, head_dim]` in blocks of 64 positions.
#[derive(Debug)]
pub struct KvTensor {
    side: KvSide,
    ty: KvType,
    head_dim: usize,
    capacity: usize,
    /// Lines from the first aligned one on.
    bytes: Vec<u8>,
}

impl KvTensor {
    /// Zeros. The memory is only reserved; the system commits it as positions are written.
    pub fn new(
        side: KvSide,
        ty: KvType,
        heads: usize,
        capacity: usize,
        head_dim: usize,
    ) -> KvTensor {
        let bytes = vec![0; heads * ty.bytes(head_dim, capacity) + size_of::<Line>()];
        KvTensor { side, ty, head_dim, capacity, bytes }
    }

    /// A copy of the first `len` positions, with the same room.
    pub fn copy_of(&self, len: usize) -> KvTensor {
        let (plane, used) =
            (self.plane(), self.ty.block_lines(self.head_dim) * len.div_ceil(BLOCK));
        let mut copy = KvTensor { bytes: vec![0; self.bytes.len()], ..*self };
        let planes = copy.lines_mut().chunks_exact_mut(plane);
        for (to, from) in planes.zip(self.lines().chunks_exact(plane)) {
            to[..used].copy_from_slice(&from[..used]);
        }
        copy
    }

    /// Panics where it has not the heads of an attention's `side`, or a position lies beyond it.
    pub(super) fn check(&self, side: KvSide, shape: (usize, usize), positions: &[usize]) {
        let found = (self.side, (self.len_lines() / self.plane(), self.head_dim));
        assert_eq!(found, (side, shape), "side, heads and values a head");
        for position in positions {
            assert!(*position < self.capacity, "position {position} of {}", self.capacity);
        }
    }

    /// Lines a head.
    fn plane(&self) -> usize {
        self.ty.block_lines(self.head_dim) * self.capacity.div_ceil(BLOCK)
    }

    fn lines(&self) -> &[Line] {
        &self.bytes[first_line(&self.bytes)..].as_chunks().0[..self.len_lines()]
    }

    fn lines_mut(&mut self) -> &mut [Line] {
        let (first, len) = (first_line(&self.bytes), self.len_lines());
        &mut self.bytes[first..].as_chunks_mut().0[..len]
    }

    fn len_lines(&self) -> usize {
        self.bytes.len() / size_of::<Line>() - 1
    }

    /// The block of 64 positions from `start` on.
    fn block(&self, head: usize, start: usize) -> &[Line] {
        let lines = self.ty.block_lines(self.head_dim);
        &self.lines()[head * self.plane() + start / BLOCK * lines..][..lines]
    }
}

/// Stores what goes into each of some tensors of one shape, `[rows, heads, head_dim]`, at `positions`, `[rows]`. A head is
/// one task; with one row, its thread is likely to be the one that attends to it.
///
/// # Panics
/// Where a tensor is not of that shape, or a position lies beyond it.
pub fn store<const N: usize>(
    pool: &Pool,
    positions: &[usize],
    tensors: [(&mut KvTensor, &[f32]); N],
) {
    let Some((first, _)) = tensors.first() else { return };
    let (heads, head_dim) = (first.len_lines() / first.plane(), first.head_dim);
    let tensors = tensors.map(|(tensor, rows)| {
        let (side, ty, plane) = (tensor.side, tensor.ty, tensor.plane());
        tensor.check(side, (heads, head_dim), positions);
        assert_eq!(rows.len(), positions.len() * heads * head_dim, "values of the positions");
        (side, ty, plane, SharedMut::new(tensor.lines_mut()), rows)
    });
    pool.run(heads, &|head| {
        for (side, ty, plane, lines, rows) in &tensors {
            // SAFETY: each head's plane is one task's.
            let plane = unsafe { lines.slice(head * plane, *plane) };
            for (position, row) in positions.iter().zip(rows.chunks_exact(heads * head_dim)) {
                let lines = ty.block_lines(head_dim);
                let block = &mut plane[position / BLOCK * lines..][..lines];
                let values = &row[head * head_dim..][..head_dim];
                match ty {
                    KvType::F16 => set_f16(*side, block, position % BLOCK, values),
                    KvType::Q8_0 => set_q8_0(*side, block, position % BLOCK, values),
                }
            }
        }
    });
}

/// Where the first aligned line begins, so that no line straddles two of the processor's.
fn first_line(bytes: &[u8]) -> usize {
    bytes.as_ptr().addr().wrapping_neg() % size_of::<Line>()
}

/// Where a block keeps value `i` of position `p` in f16: line and lane.
fn at(side: KvSide, p: usize, i: usize, width: usize) -> (usize, usize) {
    match side {
        KvSide::Keys => (p / LANES * width + i, p % LANES),
        KvSide::Values => (i / LANES * BLOCK + p, i % LANES),
    }
}

fn set_f16(side: KvSide, block: &mut [Line], p: usize, head: &[f32]) {
    let width = groups(head.len()) * GROUP;
    for (part, x) in head.chunks(GROUP).enumerate() {
        let mut rounded = [f16::ZERO; GROUP];
        rounded[..x.len()].convert_from_f32_slice(x);
        for (i, half) in rounded[..x.len()].iter().enumerate() {
            let (line, lane) = at(side, p, part * GROUP + i, width);
            set_half(&mut block[line], lane, *half);
        }
    }
}

fn set_half(line: &mut Line, lane: usize, half: f16) {
    line.as_chunks_mut::<2>().0[lane] = half.to_le_bytes();
}

fn set_q8_0(side: KvSide, block: &mut [Line], p: usize, head: &[f32]) {
    let groups = groups(head.len());
    for (g, x) in head.chunks(GROUP).enumerate() {
        let mut values = [0.0; GROUP];
        values[..x.len()].copy_from_slice(x);
        let (mut d, mut q, mut sums) = ([0.0], [0; GROUP], [0; 2]);
        q8_0(&values, &mut d, &mut q, &mut sums);
        let d = f16::from_f32(d[0]);
        match side {
            KvSide::Keys => {
                let lines = &mut block[(p / LANES * groups + g) * KEY_LINES..][..KEY_LINES];
                set_half(&mut lines[0], p % LANES, d);
                for (line, pair) in lines[1..].iter_mut().zip(q.as_chunks::<2>().0) {
                    line.as_chunks_mut::<2>().0[p % LANES] = pair.map(i8::cast_unsigned);
                }
            }
            KvSide::Values => {
                let lines = &mut block[g * VALUE_LINES..][..VALUE_LINES];
                set_half(&mut lines[p / LANES], p % LANES, d);
                let line = &mut lines[BLOCK / LANES + p / 2];
                for (pair, q) in line.as_chunks_mut::<2>().0.iter_mut().zip(q) {
                    pair[p % 2] = q.cast_unsigned();
                }
            }
        }
    }
}
