//! The float part of every product with quantised weights.
//!
//! A kernel works out each block's integer product exactly, in whatever order suits its machine. Blocks then add to
//! one of [`LANES`] sums in turn, `sum[b % LANES] = fma(integer, w.d * x.d, sum[b % LANES])`, where a minimum is a
//! second, negative term after the first; and the sums are added up by halves. So a product has the same bits on every
//! instruction set and in every batch.

/// Sums that blocks add to in turn.
pub(super) const LANES: usize = 8;

/// One product in the making.
pub(super) struct Sums([f32; LANES]);

impl Sums {
    pub(super) fn new() -> Sums {
        Sums([0.0; LANES])
    }

    /// Block `b`'s term.
    #[inline(always)]
    pub(super) fn add(&mut self, b: usize, integer: i32, scale: f32) {
        let sum = &mut self.0[b % LANES];
        *sum = (integer as f32).mul_add(scale, *sum);
    }

    #[inline(always)]
    pub(super) fn total(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
}
