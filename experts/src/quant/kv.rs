//! Products with cached keys and values, for some queries at once. Both lie in lines of 32 lanes: for keys a lane is a position
//! and the lines follow the head's values, for values it is the other way round. So nothing is ever added up across lanes.

use super::WidenFn;

/// 32 halves, or 32 pairs of signed bytes.
pub(crate) type Line = [u8; 64];

/// Lanes a line.
pub(crate) const LANES: usize = 32;

/// `out[i, l] += sum over s of lines[s, l] * x[i, s]` in the order of `s`, each term fused; lines of halves.
///
/// # Safety
/// The machine has the kernel's instructions; `x` is `[out.len(), n]` with `n >= lines.len()`.
pub(crate) type HalvesFn = unsafe fn(lines: &[Line], x: &[f32], out: &mut [[f32; LANES]]);

/// Lines of pairs of bytes for a [`PairsFn`].
pub(crate) struct Pairs<'a> {
    pub(crate) lines: &'a [Line],
    /// What a lane's bytes are to be multiplied with.
    pub(crate) scales: &'a [f32; LANES],
    /// `[queries, n]`, `n >= lines.len()`.
    pub(crate) x: &'a [[i16; 2]],
    /// What a query's `x` are to be multiplied with, at least one a query.
    pub(crate) d: &'a [f32],
}

/// `out[i, l] += (sum over s and both halves h of lines[s, l, h] * x[i, s, h]) * (d[i] * scales[l])`, fused; the sum is of
/// integers.
///
/// # Safety
/// The machine has the kernel's instructions; lengths are as [`Pairs`] says for `out.len()` queries; no sum leaves 32 bits.
pub(crate) type PairsFn = unsafe fn(pairs: &Pairs<'_>, out: &mut [[f32; LANES]]);

/// Calls `$some(first query, their outputs)` with as many queries at a time as fit in registers, then with one at a time.
#[cfg(target_arch = "x86_64")]
macro_rules! in_batches {
    ($batch:literal, $some:expr, $out:ident) => {{
        let (batches, rest) = $out.as_chunks_mut::<$batch>();
        let first_rest = $batch * batches.len();
        for (i, out) in batches.iter_mut().enumerate() {
            $some($batch * i, out);
        }
        for (i, out) in rest.as_chunks_mut::<1>().0.iter_mut().enumerate() {
            $some(first_rest + i, out);
        }
    }};
}
#[cfg(target_arch = "x86_64")]
pub(super) use in_batches;

/// [`HalvesFn`] for any machine: some lines are widened once for all queries.
#[inline(always)]
pub(super) fn halves(widen: WidenFn, lines: &[Line], x: &[f32], out: &mut [[f32; LANES]]) {
    const TOGETHER: usize = 16;
    let n = x.len() / out.len();
    let mut wide = [[0.0; LANES]; TOGETHER];
    for (part, lines) in lines.chunks(TOGETHER).enumerate() {
        let wide = &mut wide[..lines.len()];
        // SAFETY: these are the machine's kernels; a line has as many halves as lanes.
        unsafe { widen(lines.as_flattened(), wide.as_flattened_mut()) };
        for (out, x) in out.iter_mut().zip(x.chunks_exact(n)) {
            let mut sums = *out;
            for (line, x) in wide.iter().zip(&x[part * TOGETHER..]) {
                for (sum, value) in sums.iter_mut().zip(line) {
                    *sum = value.mul_add(*x, *sum);
                }
            }
            *out = sums;
        }
    }
}

/// [`PairsFn`] for any machine.
#[inline(always)]
pub(super) fn pairs(pairs: &Pairs<'_>, out: &mut [[f32; LANES]]) {
    let n = pairs.x.len() / out.len();
    for ((out, x), d) in out.iter_mut().zip(pairs.x.chunks_exact(n)).zip(pairs.d) {
        let mut sums = [0i32; LANES];
        for (line, x) in pairs.lines.iter().zip(x) {
            let x = x.map(i32::from);
            for (sum, pair) in sums.iter_mut().zip(line.as_chunks::<2>().0) {
                let pair = pair.map(|byte| i32::from(byte.cast_signed()));
                *sum += pair[0] * x[0] + pair[1] * x[1];
            }
        }
        for ((out, sum), scale) in out.iter_mut().zip(sums).zip(pairs.scales) {
            *out = (sum as f32).mul_add(d * scale, *out);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::quant::Kernels;

    const STEPS: usize = 48;

    fn noise() -> impl FnMut() -> i16 {
        let mut state = 7u32;
        move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) as u16 as i16
        }
    }

    /// Each kernel, with as many queries as fill no batch, one, and some more: the formula's results, and the same bits for a query
    /// whoever is beside it.
    #[test]
    fn lanes_add_up() {
        let mut next = noise();
        let mut floats =
            |n: usize| -> Vec<f32> { (0..n).map(|_| f32::from(next()) / 32768.0).collect() };
        let (x, before) = (floats(9 * STEPS), floats(9 * LANES));
        let values = floats(STEPS * LANES);
        let bytes: Vec<u8> =
            values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
        let lines = bytes.as_chunks().0;
        for kernels in Kernels::available() {
            for queries in [1, 4, 7, 8, 9] {
                let mut out = before.as_chunks().0[..queries].to_vec();
                kernels.halves(&lines[..41], &x[..queries * STEPS], &mut out);
                for (i, lane) in (0..queries).flat_map(|i| (0..LANES).map(move |lane| (i, lane))) {
                    let term = |s: usize, sum: f32| {
                        f16::from_f32(values[s * LANES + lane])
                            .to_f32()
                            .mul_add(x[i * STEPS + s], sum)
                    };
                    let want = (0..41).fold(before[i * LANES + lane], |sum, s| term(s, sum));
                    assert_eq!(out[i][lane], want, "{} query {i} of {queries}", kernels.name());
                }
            }
        }
    }

    #[test]
    fn pairs_add_up() {
        let mut next = noise();
        let bytes: Vec<u8> = (0..STEPS * 2 * LANES).map(|_| next() as u8).collect();
        let x: Vec<[i16; 2]> = (0..9 * STEPS).map(|_| [next(), next()]).collect();
        let d: Vec<f32> = (0..9).map(|_| f32::from(next())).collect();
        let scales = std::array::from_fn(|_| f32::from(next()) / 32768.0);
        for kernels in Kernels::available() {
            for queries in [1, 4, 7, 8, 9] {
                let mut out = vec![[1.5; LANES]; queries];
                let lines = &bytes.as_chunks().0[..31];
                let x = &x[..queries * STEPS];
                kernels.pairs(&Pairs { lines, scales: &scales, x, d: &d }, &mut out);
                for (i, lane) in (0..queries).flat_map(|i| (0..LANES).map(move |lane| (i, lane))) {
                    let term = |s: usize, half: usize| {
                        i32::from(lines[s][2 * lane + half] as i8)
                            * i32::from(x[i * STEPS + s][half])
                    };
                    let sum: i32 = (0..31).map(|s| term(s, 0) + term(s, 1)).sum();
                    let want = (sum as f32).mul_add(d[i] * scales[lane], 1.5);
                    assert_eq!(out[i][lane], want, "{} query {i} of {queries}", kernels.name());
                }
            }
        }
    }
}
