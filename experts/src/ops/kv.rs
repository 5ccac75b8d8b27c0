//! Keys or values of one layer, kept as attention reads them.

use std::str::FromStr;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::activations::q8_0;
use crate::quant::Kernels;
use crate::quant::isa::multiversion;

/// Positions that are read together.
pub(super) const BLOCK: usize = 64;
/// Values that share a scale in Q8_0.
const GROUP: usize = 32;
/// Bytes of a position's group in Q8_0: an f16 scale, and a byte a value.
const GROUP_BYTES: usize = 2 + GROUP;

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
    /// Whether heads of `head_dim` values can be kept so.
    pub fn fits(self, head_dim: usize) -> bool {
        self == KvType::F16 || head_dim.is_multiple_of(GROUP)
    }

    /// Bytes of a head's keys or values at `positions` positions, which come in blocks of 64.
    pub fn bytes(self, head_dim: usize, positions: usize) -> usize {
        self.block_bytes(head_dim) * positions.div_ceil(BLOCK)
    }

    fn block_bytes(self, head_dim: usize) -> usize {
        match self {
            KvType::F16 => BLOCK * head_dim * 2,
            KvType::Q8_0 => BLOCK * head_dim / GROUP * GROUP_BYTES,
        }
    }
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

/// Which way round a block of positions is kept, so that attention adds up along rows of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvSide {
    /// `[head_dim, BLOCK]`; in Q8_0 `[head_dim / 32]` of `BLOCK` scales and `[32, BLOCK]` values.
    Keys,
    /// `[BLOCK, head_dim]`; in Q8_0 `[BLOCK, head_dim / 32]` of a scale and 32 values.
    Values,
}

/// Keys or values, `[heads, capacity, head_dim]` in blocks of 64 positions.
#[derive(Debug)]
pub struct KvTensor {
    side: KvSide,
    ty: KvType,
    head_dim: usize,
    capacity: usize,
    bytes: Vec<u8>,
}

impl KvTensor {
    /// Zeros. The memory is only reserved; the system commits it as positions are written.
    ///
    /// # Panics
    /// Where the type does not fit `head_dim`: see [`KvType::fits`].
    pub fn new(
        side: KvSide,
        ty: KvType,
        heads: usize,
        capacity: usize,
        head_dim: usize,
    ) -> KvTensor {
        assert!(ty.fits(head_dim), "heads of {head_dim} values as {ty:?}");
        let bytes = vec![0; heads * ty.bytes(head_dim, capacity)];
        KvTensor { side, ty, head_dim, capacity, bytes }
    }

    /// Stores `heads`, `[heads, head_dim]`, at `position`.
    ///
    /// # Panics
    /// Where that is not the tensor's shape, or the position lies beyond it.
    pub fn set(&mut self, position: usize, heads: &[f32]) {
        let (dim, capacity) = (self.head_dim, self.capacity);
        assert!(position < capacity, "position {position} of {capacity}");
        let block = self.ty.block_bytes(dim);
        let planes = self.bytes.chunks_exact_mut(self.ty.bytes(dim, capacity));
        assert_eq!(heads.len(), planes.len() * dim, "values of a position");
        for (plane, head) in planes.zip(heads.chunks_exact(dim)) {
            let block = &mut plane[position / BLOCK * block..][..block];
            match self.ty {
                KvType::F16 => set_f16(self.side, block, position % BLOCK, head),
                KvType::Q8_0 => set_q8_0(self.side, block, position % BLOCK, head),
            }
        }
    }

    /// A copy of the first `len` positions, with the same room.
    pub fn copy_of(&self, len: usize) -> KvTensor {
        let plane = self.ty.bytes(self.head_dim, self.capacity);
        let used = self.ty.bytes(self.head_dim, len);
        let mut bytes = vec![0; self.bytes.len()];
        for (to, from) in bytes.chunks_exact_mut(plane).zip(self.bytes.chunks_exact(plane)) {
            to[..used].copy_from_slice(&from[..used]);
        }
        KvTensor { bytes, ..*self }
    }

    /// The block from position `start` of `head` as f32, `[head_dim, BLOCK]` of keys or `[BLOCK, head_dim]` of values.
    pub(super) fn read(&self, head: usize, start: usize, out: &mut [f32]) {
        let block = self.ty.block_bytes(self.head_dim);
        let plane = head * self.ty.bytes(self.head_dim, self.capacity);
        let block = &self.bytes[plane + start / BLOCK * block..][..block];
        match (self.ty, self.side) {
            (KvType::F16, _) => Kernels::best().widen(block, out),
            (KvType::Q8_0, KvSide::Keys) => {
                let groups = block.chunks_exact(BLOCK * GROUP_BYTES);
                for (group, out) in groups.zip(out.chunks_exact_mut(GROUP * BLOCK)) {
                    let (scales, q) = group.split_at(2 * BLOCK);
                    let mut d = [0.0; BLOCK];
                    Kernels::best().widen(scales, &mut d);
                    scale_columns(&d, q, out);
                }
            }
            (KvType::Q8_0, KvSide::Values) => scale_groups(block, out),
        }
    }
}

/// Where a block keeps value `i` of position `p`, counted in values.
fn at(side: KvSide, p: usize, i: usize, dim: usize) -> usize {
    match side {
        KvSide::Keys => i * BLOCK + p,
        KvSide::Values => p * dim + i,
    }
}

fn set_f16(side: KvSide, block: &mut [u8], p: usize, head: &[f32]) {
    let halves = block.as_chunks_mut::<2>().0;
    for (part, x) in head.chunks(GROUP).enumerate() {
        let mut rounded = [f16::ZERO; GROUP];
        rounded[..x.len()].convert_from_f32_slice(x);
        for (i, half) in rounded[..x.len()].iter().enumerate() {
            halves[at(side, p, part * GROUP + i, head.len())] = half.to_le_bytes();
        }
    }
}

fn set_q8_0(side: KvSide, block: &mut [u8], p: usize, head: &[f32]) {
    for (g, x) in head.chunks_exact(GROUP).enumerate() {
        let (mut d, mut q, mut sums) = ([0.0], [0; GROUP], [0; 2]);
        q8_0(x, &mut d, &mut q, &mut sums);
        let d = f16::from_f32(d[0]).to_le_bytes();
        match side {
            KvSide::Keys => {
                let group = &mut block[g * BLOCK * GROUP_BYTES..][..BLOCK * GROUP_BYTES];
                group[2 * p..][..2].copy_from_slice(&d);
                for (q, row) in q.iter().zip(group[2 * BLOCK..].chunks_exact_mut(BLOCK)) {
                    row[p] = q.cast_unsigned();
                }
            }
            KvSide::Values => {
                let group = p * head.len() / GROUP + g;
                let group = &mut block[group * GROUP_BYTES..][..GROUP_BYTES];
                group[..2].copy_from_slice(&d);
                for (to, q) in group[2..].iter_mut().zip(q) {
                    *to = q.cast_unsigned();
                }
            }
        }
    }
}

multiversion! {
    /// `out[i, p] = d[p] * q[i, p]`
    fn scale_columns(d: &[f32; BLOCK], q: &[u8], out: &mut [f32]) {
        let (q, out) = (q.as_chunks::<BLOCK>().0, out.as_chunks_mut::<BLOCK>().0);
        for (q, out) in q.iter().zip(out) {
            for ((out, d), q) in out.iter_mut().zip(d).zip(q) {
                *out = d * f32::from(q.cast_signed());
            }
        }
    }

    /// Groups of a scale and its values.
    fn scale_groups(groups: &[u8], out: &mut [f32]) {
        let groups = groups.as_chunks::<GROUP_BYTES>().0;
        for (group, out) in groups.iter().zip(out.as_chunks_mut::<GROUP>().0) {
            let d = f16::from_le_bytes([group[0], group[1]]).to_f32();
            for (out, q) in out.iter_mut().zip(&group[2..]) {
                *out = d * f32::from(q.cast_signed());
            }
        }
    }
}
