//! NEON: 16 quantised values an instruction, with the dot product and matrix instructions of newer processors.

mod blocks;
mod floats;
mod multiply;
mod panel;
mod super_blocks;

use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;

use super::isa::Isa;
use super::tiles::float_tiles;
use super::{ActRow, Kernels, Tile, TileFn, kv, vq};
use blocks::Blocks;
use floats::{BF16, F16, F32, float_dot, widen};
use multiply::{DotProd, I8mm, Multiply, Plain};
use panel::{Batch, Lanes, Quad};
use super_blocks::{K, Q6K, Super};

/// Any processor: 8-bit products, added up in pairs.
pub(super) static NEON: Kernels = kernels::<Plain, 1>("NEON", Isa::Neon);
/// With `sdot`.
pub(super) static DOT_PROD: Kernels = kernels::<DotProd, 2>("NEON dotprod", Isa::DotProd);
/// With `sdot` for one activation row and `smmla` for several.
pub(super) static I8MM: Kernels = kernels::<I8mm, 2>("NEON i8mm", Isa::I8mm);

const fn kernels<M: Multiply, const WIDE: usize>(name: &'static str, isa: Isa) -> Kernels {
    Kernels {
        name,
        isa,
        f32: f32_tile,
        f16: f16_tile,
        bf16: bf16_tile,
        q8_0: tile::<M, Blocks<false>, WIDE>,
        q4_0: tile::<M, Blocks<true>, WIDE>,
        q4_k: tile::<M, Super<K<false>>, WIDE>,
        q5_k: tile::<M, Super<K<true>>, WIDE>,
        q6_k: tile::<M, Super<Q6K>, WIDE>,
        vq: vq::tile::<Q8<M, WIDE>>,
        widen,
        halves: |lines, x, out| kv::halves(widen, lines, x, out),
        pairs: |pairs, out| kv::pairs(pairs, out),
    }
}

/// What unpacked codes are multiplied by.
struct Q8<M, const WIDE: usize>(PhantomData<M>);

impl<M: Multiply, const WIDE: usize> vq::Q8 for Q8<M, WIDE> {
    const TILE: TileFn = tile::<M, Blocks<false>, WIDE>;
}

/// A float weight row is widened once for this many activation rows.
const BATCH: usize = 4;

float_tiles!("neon");

/// How far ahead of its use a streamed weight is asked for: the hardware's own prefetch may stop at the end of a page.
const AHEAD: usize = 4096;

/// Blocks that are added to the sums at a time, a lane each; see [`crate::quant::sums`].
const LANES: usize = super::sums::LANES / 2;

/// A quantised weight type.
trait Weights {
    /// Bytes a block.
    const BYTES: usize;
    /// Blocks in 256 values.
    const BLOCKS: usize;
    /// Blocks have minima.
    const MINIMA: bool;

    /// One activation row: adds `COUNT` blocks from `first` to the sums, each in a lane of its own. Weights are
    /// unpacked in registers as they stream by.
    ///
    /// # Safety
    /// `w` has them, `x` their values, scales and sums, and the machine the instructions.
    unsafe fn add<M: Multiply, const COUNT: usize>(
        w: *const u8,
        x: &ActRow<'_>,
        first: usize,
        sums: float32x4_t,
    ) -> float32x4_t;

    /// Several activation rows: fills `quad` with `count` blocks of each of four weight rows, and asks for as many bytes
    /// from `ahead` on meanwhile, a few at a time: many requests at once would hold up the loads behind them.
    ///
    /// # Safety
    /// The blocks are at `w`, and the machine has the instructions.
    unsafe fn unpack<M: Multiply>(
        w: [*const u8; 4],
        count: usize,
        ahead: *const u8,
        quad: &mut Quad,
    );

    /// Adds the products of the quads' `count` blocks with the batch's, which are blocks `b` and on of their rows, to
    /// the sums of quads `first` and on.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn multiply<M: Multiply, const WIDE: usize>(
        quads: &[Quad; WIDE],
        batch: &Batch,
        b: usize,
        count: usize,
        first: usize,
        sums: &mut [Lanes; 4],
    );
}

/// # Safety
/// See `TileFn`.
#[target_feature(enable = "neon")]
unsafe fn tile<M: Multiply, W: Weights, const WIDE: usize>(tile: &Tile<'_>) {
    if let [x] = tile.x {
        for r in 0..tile.rows {
            // SAFETY: `TileFn`'s conditions.
            unsafe { tile.store(0, r, [dot::<M, W>(tile.row(r), x)]) };
        }
    } else {
        // SAFETY: `TileFn`'s conditions.
        unsafe { panel::tile::<M, W, WIDE>(tile) };
    }
}

/// `w · x`.
///
/// # Safety
/// `x` holds as many values in the type's format as `w` has, and the machine has the instructions.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn dot<M: Multiply, W: Weights>(w: &[u8], x: &ActRow<'_>) -> f32 {
    let blocks = w.len() / W::BYTES;
    let rest = blocks / LANES * LANES;
    // The lower lanes and the upper ones take turns. Which of them are which in the end makes no difference.
    let mut sums = [vdupq_n_f32(0.0); 2];
    // SAFETY: by the caller, for the blocks that there are.
    unsafe {
        for first in (0..rest).step_by(LANES) {
            let at = w.as_ptr().add(first * W::BYTES);
            sums = [sums[1], W::add::<M, LANES>(at, x, first, sums[0])];
        }
        let at = w.as_ptr().add(rest * W::BYTES);
        sums[0] = match blocks - rest {
            0 => sums[0],
            1 => W::add::<M, 1>(at, x, rest, sums[0]),
            2 => W::add::<M, 2>(at, x, rest, sums[0]),
            _ => W::add::<M, 3>(at, x, rest, sums[0]),
        };
    }
    total(vaddq_f32(sums[0], sums[1]))
}

/// `sums + integers * scales`.
#[inline]
#[target_feature(enable = "neon")]
fn term(sums: float32x4_t, integers: int32x4_t, scales: float32x4_t) -> float32x4_t {
    vfmaq_f32(sums, vcvtq_f32_s32(integers), scales)
}

/// The sum over a vector, by halves.
#[inline]
#[target_feature(enable = "neon")]
fn total(v: float32x4_t) -> f32 {
    let halves = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    vpadds_f32(halves)
}

/// The sum over each vector, in order.
#[inline]
#[target_feature(enable = "neon")]
fn across([a, b, c, d]: [int32x4_t; 4]) -> int32x4_t {
    vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d))
}

/// Vector `i` of the result holds lane `i` of each of the four.
#[inline]
#[target_feature(enable = "neon")]
fn transposed([a, b, c, d]: [int32x4_t; 4]) -> [int32x4_t; 4] {
    let wide = |v| vreinterpretq_s64_s32(v);
    let (ab_even, ab_odd) = (wide(vtrn1q_s32(a, b)), wide(vtrn2q_s32(a, b)));
    let (cd_even, cd_odd) = (wide(vtrn1q_s32(c, d)), wide(vtrn2q_s32(c, d)));
    [
        vreinterpretq_s32_s64(vzip1q_s64(ab_even, cd_even)),
        vreinterpretq_s32_s64(vzip1q_s64(ab_odd, cd_odd)),
        vreinterpretq_s32_s64(vzip2q_s64(ab_even, cd_even)),
        vreinterpretq_s32_s64(vzip2q_s64(ab_odd, cd_odd)),
    ]
}

/// The f16 at `w` and at the same place of the following blocks of `W`, `COUNT` in all, then zeros.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn scales<W: Weights, const COUNT: usize>(w: *const u8) -> float32x4_t {
    const NONE: &[u8; 2] = &[0; 2];
    let mut at = [NONE.as_ptr(); LANES];
    for (i, at) in at.iter_mut().take(COUNT).enumerate() {
        *at = w.wrapping_add(i * W::BYTES);
    }
    // SAFETY: by the caller.
    unsafe { halves(at) }
}

/// The scales of the activations' blocks `first..first + COUNT`, then zeros.
#[inline]
#[target_feature(enable = "neon")]
fn act_scales<const COUNT: usize>(x: &ActRow<'_>, first: usize) -> float32x4_t {
    let mut four = [0.0; LANES];
    four[..COUNT].copy_from_slice(&x.d[first..first + COUNT]);
    // SAFETY: four values are there.
    unsafe { vld1q_f32(four.as_ptr()) }
}

/// One f16 at each address. Straight into a vector: one that is loaded after scalar stores waits for them.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn halves(at: [*const u8; 4]) -> float32x4_t {
    let mut bits = vdup_n_u16(0);
    // SAFETY: by the caller.
    unsafe {
        bits = vld1_lane_u16::<0>(at[0].cast(), bits);
        bits = vld1_lane_u16::<1>(at[1].cast(), bits);
        bits = vld1_lane_u16::<2>(at[2].cast(), bits);
        bits = vld1_lane_u16::<3>(at[3].cast(), bits);
    }
    widened(bits)
}

/// f16 to f32. By name, since older compilers have no intrinsic for it.
#[inline]
#[target_feature(enable = "neon")]
fn widened(halves: uint16x4_t) -> float32x4_t {
    let floats;
    // SAFETY: any processor with NEON has it.
    unsafe {
        asm!(
            "fcvtl {floats:v}.4s, {halves:v}.4h",
            floats = out(vreg) floats,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    floats
}

/// Asks for `len` bytes that come soon.
#[inline]
#[target_feature(enable = "neon")]
fn prefetch(w: *const u8, len: usize) {
    for line in (0..len).step_by(64) {
        let line = w.wrapping_add(line).addr();
        // SAFETY: a prefetch of an address that is not mapped does nothing.
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) line, options(nomem, nostack, preserves_flags));
        }
    }
}

/// # Safety
/// 16 bytes are there.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(from: *const u8) -> uint8x16_t {
    // SAFETY: by the caller.
    unsafe { vld1q_u8(from) }
}
