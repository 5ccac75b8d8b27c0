//! Activation rows, as f32 and in the 8-bit blocks that quantised weights are multiplied with.

use std::ops::{Deref, DerefMut};

use half::f16;

use crate::pool::{Pool, SharedMut};
use crate::quant::isa::multiversion;
use crate::quant::{ActFormat, ActRow};

/// Values that one sum in [`ActRow`] covers.
const SUM_LEN: usize = 16;

/// `rows` rows of `cols` activations in one or more formats. Buffers are kept between calls.
///
/// The blocks have the same bits whichever instruction set made them, so that a server and a device with different
/// processors agree.
#[derive(Debug, Default)]
pub struct Activations {
    cols: usize,
    rows: usize,
    values: Vec<f32>,
    has_values: bool,
    q8_0: Blocks,
    q8_k: Blocks,
}

/// One 8-bit form: `rows * cols` values, a scale a block, and sums of the values.
#[derive(Debug, Default)]
struct Blocks {
    held: bool,
    d: Vec<f32>,
    q: Lines,
    sums: Vec<i16>,
}

/// Bytes that begin with a cache line, so that no vector of a row's straddles two.
#[derive(Default)]
pub(crate) struct Lines {
    lines: Vec<Line>,
    len: usize,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([i8; 64]);

impl Activations {
    /// No rows yet, of `cols` values each.
    pub fn new(cols: usize) -> Activations {
        Activations { cols, ..Activations::default() }
    }

    /// Rows held.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Takes `[rows, cols]` values; quantised forms are forgotten.
    pub fn set(&mut self, rows: &[f32]) {
        assert!(
            rows.len().is_multiple_of(self.cols),
            "{} values in rows of {}",
            rows.len(),
            self.cols
        );
        self.reset(rows.len() / self.cols).copy_from_slice(rows);
    }

    /// Room for `rows` rows, for the caller to fill; quantised forms are forgotten.
    pub fn reset(&mut self, rows: usize) -> &mut [f32] {
        self.hold_nothing(rows);
        self.has_values = true;
        self.values.resize(rows * self.cols, 0.0);
        &mut self.values
    }

    /// As [`Activations::reset`], with another width.
    pub(crate) fn reshape(&mut self, rows: usize, cols: usize) -> &mut [f32] {
        self.cols = cols;
        self.reset(rows)
    }

    /// Makes the form `format`, if it is not held yet.
    pub fn quantize(&mut self, format: ActFormat) {
        self.quantize_on(None, format);
    }

    /// As [`Activations::quantize`], over the pool where there is enough to do.
    pub fn quantize_with(&mut self, pool: &Pool, format: ActFormat) {
        self.quantize_on(Some(pool), format);
    }

    fn quantize_on(&mut self, pool: Option<&Pool>, format: ActFormat) {
        if self.holds(format) {
            return;
        }
        self.restore_values();
        let (cols, rows, values) = (self.cols, self.rows, self.values.as_slice());
        let (blocks, len, quantize): (_, _, fn(_, &mut _, &mut _, &mut _)) = match format {
            ActFormat::F32 => return,
            ActFormat::Q8_0 => (&mut self.q8_0, 32, q8_0 as _),
            ActFormat::Q8_K => (&mut self.q8_k, 256, q8_k as _),
        };
        blocks.resize(rows, cols, len);
        let d = SharedMut::new(&mut blocks.d);
        let q = SharedMut::new(&mut blocks.q);
        let sums = SharedMut::new(&mut blocks.sums);
        let row = |r: usize| {
            // SAFETY: each row is one task's.
            let (d, q, sums) = unsafe {
                (
                    d.slice(r * (cols / len), cols / len),
                    q.slice(r * cols, cols),
                    sums.slice(r * (cols / SUM_LEN), cols / SUM_LEN),
                )
            };
            quantize(&values[r * cols..][..cols], d, q, sums);
        };
        match pool {
            Some(pool) => pool.run_rows(rows, cols, &row),
            None => (0..rows).for_each(row),
        }
    }

    /// Takes `rows` rows from the wire: `d` a scale per 32 values, `q` the values.
    pub fn set_q8_0(&mut self, rows: usize, d: &[f32], q: &[i8]) {
        self.hold_nothing(rows);
        self.q8_0.copy(rows, self.cols, 32, d, q);
    }

    /// Takes `rows` rows from the wire: `d` a scale per 256 values, `q` the values.
    pub fn set_q8_k(&mut self, rows: usize, d: &[f32], q: &[i8]) {
        self.hold_nothing(rows);
        self.q8_k.copy(rows, self.cols, 256, d, q);
    }

    /// The values, `[rows, cols]`.
    ///
    /// # Panics
    /// Where only a quantised form came from the wire and [`ActFormat::F32`] was not asked for.
    pub fn f32(&self) -> &[f32] {
        assert!(self.has_values, "these activations are held as blocks only");
        &self.values
    }

    /// Scales per 32 values (each an f16's value), and the values.
    ///
    /// # Panics
    /// Where that form is not held.
    pub fn q8_0(&self) -> (&[f32], &[i8]) {
        assert!(self.q8_0.held, "these activations are not held as Q8_0");
        (&self.q8_0.d, &self.q8_0.q)
    }

    /// Scales per 256 values, and the values.
    ///
    /// # Panics
    /// Where that form is not held.
    pub fn q8_k(&self) -> (&[f32], &[i8]) {
        assert!(self.q8_k.held, "these activations are not held as Q8_K");
        (&self.q8_k.d, &self.q8_k.q)
    }

    /// Row `r` in a form that is held.
    #[inline]
    pub(crate) fn row(&self, format: ActFormat, r: usize) -> ActRow<'_> {
        assert!(self.holds(format), "activations are not held as {format:?}");
        let blocks = match format {
            ActFormat::F32 => {
                return ActRow {
                    values: &self.values[r * self.cols..][..self.cols],
                    ..ActRow::default()
                };
            }
            ActFormat::Q8_0 => &self.q8_0,
            ActFormat::Q8_K => &self.q8_k,
        };
        blocks.row(r, self.cols)
    }

    fn holds(&self, format: ActFormat) -> bool {
        match format {
            ActFormat::F32 => self.has_values,
            ActFormat::Q8_0 => self.q8_0.held,
            ActFormat::Q8_K => self.q8_k.held,
        }
    }

    fn hold_nothing(&mut self, rows: usize) {
        self.rows = rows;
        self.has_values = false;
        self.q8_0.held = false;
        self.q8_k.held = false;
    }

    /// Values from the blocks that the wire brought, where another form is wanted.
    fn restore_values(&mut self) {
        if self.has_values {
            return;
        }
        let (blocks, len) = if self.q8_k.held { (&self.q8_k, 256) } else { (&self.q8_0, 32) };
        self.values.clear();
        let rows = blocks.q.chunks_exact(len).zip(&blocks.d);
        self.values.extend(rows.flat_map(|(q, d)| q.iter().map(move |q| d * f32::from(*q))));
        self.has_values = true;
    }
}

impl Lines {
    pub(crate) fn resize(&mut self, len: usize) {
        self.lines.resize(len.div_ceil(64), Line([0; 64]));
        self.len = len;
    }
}

impl Deref for Lines {
    type Target = [i8];

    #[inline]
    fn deref(&self) -> &[i8] {
        // SAFETY: a Line is 64 plain bytes, and `len` is at most 64 for each.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [i8] {
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

impl Blocks {
    fn resize(&mut self, rows: usize, cols: usize, len: usize) {
        assert!(cols.is_multiple_of(len), "rows of {cols} values in blocks of {len}");
        self.held = true;
        self.d.resize(rows * cols / len, 0.0);
        self.q.resize(rows * cols);
        self.sums.resize(rows * cols / SUM_LEN, 0);
    }

    fn copy(&mut self, rows: usize, cols: usize, len: usize, d: &[f32], q: &[i8]) {
        self.resize(rows, cols, len);
        self.d.copy_from_slice(d);
        self.q.copy_from_slice(q);
        for (sum, q) in self.sums.iter_mut().zip(q.chunks_exact(SUM_LEN)) {
            *sum = q.iter().copied().map(i16::from).sum();
        }
    }

    #[inline]
    fn row(&self, r: usize, cols: usize) -> ActRow<'_> {
        let (scales, sums) = (self.d.len() / (self.q.len() / cols), cols / SUM_LEN);
        ActRow {
            values: &[],
            d: &self.d[r * scales..][..scales],
            q: &self.q[r * cols..][..cols],
            sums: &self.sums[r * sums..][..sums],
        }
    }
}

multiversion! {
    /// `quantize_row_q8_0_ref` of `ggml-quants.c`, halves rounded to even.
    pub(crate) fn q8_0(x: &[f32], d: &mut [f32], q: &mut [i8], sums: &mut [i16]) {
        quantize_blocks::<32>(x, d, q, sums, |most| {
            let d = most / 127.0;
            (d, 1.0 / d)
        });
        for d in d {
            *d = f16::from_f32(*d).to_f32();
        }
    }

    /// `quantize_row_q8_K_ref` of `ggml-quants.c`, with positive scales: it negates both the scale and the values
    /// of a block whose extreme is positive, which changes no product.
    fn q8_k(x: &[f32], d: &mut [f32], q: &mut [i8], sums: &mut [i16]) {
        quantize_blocks::<256>(x, d, q, sums, |most| {
            let inverse = 127.0 / most;
            (1.0 / inverse, inverse)
        });
    }
}

/// The greatest magnitude; not a number is above all, so that it is not lost.
#[inline(always)]
pub(crate) fn magnitude(values: &[f32]) -> f32 {
    // As integers, magnitudes order as they do as floats.
    f32::from_bits(values.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff)))
}

/// `scale(greatest magnitude)` gives a block's scale and its inverse.
#[inline(always)]
fn quantize_blocks<const LEN: usize>(
    x: &[f32],
    d: &mut [f32],
    q: &mut [i8],
    sums: &mut [i16],
    scale: impl Fn(f32) -> (f32, f32),
) {
    let blocks = x.as_chunks::<LEN>().0.iter().zip(q.as_chunks_mut::<LEN>().0);
    let blocks = blocks.zip(sums.chunks_exact_mut(LEN / SUM_LEN)).zip(d);
    for (((x, q), sums), d) in blocks {
        let most = magnitude(x);
        let (scale, inverse) = scale(most);
        if !(most.is_finite() && inverse.is_finite()) {
            // All zero (or next to it), or not a number, which must show in every product.
            *d = if most.is_finite() { 0.0 } else { f32::NAN };
            q.fill(0);
            sums.fill(0);
            continue;
        }
        *d = scale;
        for (q, x) in q.iter_mut().zip(x) {
            *q = nearest(x * inverse) as i8;
        }
        for (sum, q) in sums.iter_mut().zip(q.as_chunks::<SUM_LEN>().0) {
            *sum = q.iter().fold(0, |sum, q| sum + i16::from(*q));
        }
    }
}

/// `nearest_int` of `ggml-quants.c`: halves to even, for magnitudes below 2^22.
#[inline(always)]
pub(crate) fn nearest(x: f32) -> i32 {
    ((x + 12_582_912.0).to_bits() as i32 & 0x007f_ffff) - 0x0040_0000
}
