//! Kernels over quantised weights: a plain reference for each type, and fast paths chosen once at start.
//!
//! A row's result has the same bits however many rows are multiplied with it, and with quantised weights it has the
//! same bits on every instruction set (`sums`). Float weights add up in another order on each.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod dequantize;
pub(crate) mod isa;
pub(crate) mod kv;
#[cfg(target_arch = "aarch64")]
mod neon;
mod quantize;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod source;
mod sums;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tiles;
pub(crate) mod vq;

use std::mem::MaybeUninit;

use crate::{Activations, GgmlType, Mat};
use isa::Isa;
use kv::{HalvesFn, LANES, Line, Pairs, PairsFn};

pub use dequantize::dequantize;
pub use quantize::quantize;

/// How a weight type wants the activations that it is multiplied with.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ActFormat {
    /// As they are.
    F32,
    /// Blocks of 32 with an f16 scale.
    Q8_0,
    /// Blocks of 256 with an f32 scale.
    Q8_K,
}

impl GgmlType {
    /// The activation format that this weight type's kernels read.
    pub fn act_format(self) -> ActFormat {
        match self {
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => ActFormat::F32,
            GgmlType::Q8_0 | GgmlType::Q4_0 | GgmlType::Vq(_) => ActFormat::Q8_0,
            GgmlType::Q4_K | GgmlType::Q5_K | GgmlType::Q6_K => ActFormat::Q8_K,
        }
    }
}

/// The instruction set whose kernels run on this machine.
pub fn cpu_features() -> &'static str {
    Kernels::best().name
}

/// One activation row in the forms that kernels read; a form that is not held is empty.
#[derive(Clone, Copy, Default)]
pub(crate) struct ActRow<'a> {
    /// `[cols]`.
    pub(crate) values: &'a [f32],
    /// One scale a block.
    pub(crate) d: &'a [f32],
    /// `[cols]`.
    pub(crate) q: &'a [i8],
    /// Sums of `q` over 16 values each.
    pub(crate) sums: &'a [i16],
}

/// Activation rows that a kernel takes at most: weights are unpacked once for all of them.
pub(crate) const MAX_TILE_ROWS: usize = 128;

/// Weight rows times activation rows: `out[i * stride + r] = w[r] · x[i]`.
pub(crate) struct Tile<'a> {
    /// `rows` weight rows, one after another.
    pub(crate) w: &'a [u8],
    pub(crate) row_bytes: usize,
    pub(crate) rows: usize,
    /// Up to [`MAX_TILE_ROWS`].
    pub(crate) x: &'a [ActRow<'a>],
    pub(crate) out: *mut f32,
    pub(crate) stride: usize,
}

impl Tile<'_> {
    /// Weight row `r`.
    #[inline]
    fn row(&self, r: usize) -> &[u8] {
        &self.w[r * self.row_bytes..][..self.row_bytes]
    }

    /// Stores the products of weight row `r` with activation rows `i..i + N`.
    ///
    /// # Safety
    /// `out` must be valid for them; see [`TileFn`].
    #[inline]
    unsafe fn store<const N: usize>(&self, i: usize, r: usize, y: [f32; N]) {
        for (n, y) in y.into_iter().enumerate() {
            // SAFETY: by the caller.
            unsafe { self.out.add((i + n) * self.stride + r).write(y) };
        }
    }
}

/// `value` in all of `room`: of an array on the stack, only the part that is needed.
#[inline]
pub(crate) fn filled<T: Copy>(room: &mut [MaybeUninit<T>], value: T) -> &mut [T] {
    for place in room.iter_mut() {
        place.write(value);
    }
    // SAFETY: all of them were just written.
    unsafe { &mut *(std::ptr::from_mut(room) as *mut [T]) }
}

/// Fills a tile's output.
///
/// # Safety
/// The machine has the kernel's instructions; `w` holds `rows * row_bytes` bytes, whole blocks; each activation row
/// holds its weight type's format for as many values; `out` is valid for writes at `i * stride + r` for every
/// activation row `i` and weight row `r`, and nobody else touches those.
pub(crate) type TileFn = unsafe fn(&Tile<'_>);

/// Halves, two bytes each, to f32, a multiple of 16.
///
/// # Safety
/// The machine has the kernel's instructions; `halves` holds two bytes for each of `out`.
pub(crate) type WidenFn = unsafe fn(halves: &[u8], out: &mut [f32]);

/// The kernels of one instruction set.
pub struct Kernels {
    name: &'static str,
    isa: Isa,
    f32: TileFn,
    f16: TileFn,
    bf16: TileFn,
    q8_0: TileFn,
    q4_0: TileFn,
    q4_k: TileFn,
    q5_k: TileFn,
    q6_k: TileFn,
    /// By weights a code.
    vq: fn(u8) -> TileFn,
    widen: WidenFn,
    halves: HalvesFn,
    pairs: PairsFn,
}

impl Kernels {
    /// The fastest that this machine runs.
    pub fn best() -> &'static Kernels {
        Kernels::of(Isa::best())
    }

    /// All that this machine runs, the plain reference first.
    pub fn available() -> impl Iterator<Item = &'static Kernels> {
        Isa::ALL.into_iter().filter(|isa| isa.is_here()).map(Kernels::of)
    }

    fn of(isa: Isa) -> &'static Kernels {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => &avx512::AMX_KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2Vnni => &avx2::VNNI_KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2::KERNELS,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => &neon::NEON,
            #[cfg(target_arch = "aarch64")]
            Isa::DotProd => &neon::DOT_PROD,
            #[cfg(target_arch = "aarch64")]
            Isa::I8mm => &neon::I8MM,
            _ => &scalar::KERNELS,
        }
    }

    /// The instruction set's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// `out[i, r] = w[r] · x[i]` on this thread, of an `x` that holds the form which `w.ty` wants; see [`crate::matmul`],
    /// which is for use.
    pub fn matmul(&self, w: Mat<'_>, x: &Activations, out: &mut [f32]) {
        crate::matmul::single(self, w, x, out);
    }

    pub(crate) fn tile(&self, ty: GgmlType) -> TileFn {
        debug_assert!(self.isa.is_here());
        match ty {
            GgmlType::F32 => self.f32,
            GgmlType::F16 => self.f16,
            GgmlType::BF16 => self.bf16,
            GgmlType::Q8_0 => self.q8_0,
            GgmlType::Q4_0 => self.q4_0,
            GgmlType::Q4_K => self.q4_k,
            GgmlType::Q5_K => self.q5_k,
            GgmlType::Q6_K => self.q6_k,
            GgmlType::Vq(dim) => (self.vq)(dim),
        }
    }

    /// Halves, two bytes each, to f32, a multiple of 16.
    pub(crate) fn widen(&self, halves: &[u8], out: &mut [f32]) {
        assert_eq!((halves.len(), out.len() % 16), (2 * out.len(), 0), "bytes of halves");
        // SAFETY: these are this machine's kernels, and the lengths agree.
        unsafe { (self.widen)(halves, out) };
    }

    /// `out[i, l] += sum over s of lines[s, l] * x[i, s]`: see [`HalvesFn`].
    pub(crate) fn halves(&self, lines: &[Line], x: &[f32], out: &mut [[f32; LANES]]) {
        assert_rows(lines.len(), x.len(), out.len());
        // SAFETY: these are this machine's kernels, and the lengths agree.
        unsafe { (self.halves)(lines, x, out) };
    }

    /// `out[i, l] += (sum over s and h of lines[s, l, h] * x[i, s, h]) * (d[i] * scales[l])`: see [`PairsFn`].
    pub(crate) fn pairs(&self, pairs: &Pairs<'_>, out: &mut [[f32; LANES]]) {
        assert_rows(pairs.lines.len(), pairs.x.len(), out.len());
        assert!(out.len() <= pairs.d.len(), "{} scales of {} rows", pairs.d.len(), out.len());
        // SAFETY: these are this machine's kernels, and the lengths agree.
        unsafe { (self.pairs)(pairs, out) };
    }
}

fn assert_rows(steps: usize, values: usize, rows: usize) {
    assert!(values.is_multiple_of(rows) && steps <= values / rows, "{values} in {rows} rows");
}
