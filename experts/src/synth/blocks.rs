//! Random blocks of every weight type: random bytes with chosen scales, which is faster than quantising floats.

use half::{bf16, f16};

use crate::types::GgmlType;

/// What a tensor's values are like.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fill {
    /// Mean 0 and this standard deviation.
    Spread(f32),
    /// Near 1: a norm's weights.
    NearOne,
}

impl Fill {
    /// Fills whole blocks of `ty`.
    pub(super) fn blocks(self, ty: GgmlType, random: &mut Random, out: &mut [u8]) {
        let (mean, std) = match self {
            Fill::Spread(std) => (0.0, std),
            Fill::NearOne => (1.0, 0.05),
        };
        match ty {
            GgmlType::F32 => {
                out.as_chunks_mut().0.iter_mut().for_each(|out| {
                    *out = (mean + std * random.unit()).to_le_bytes();
                });
            }
            GgmlType::F16 => {
                out.as_chunks_mut().0.iter_mut().for_each(|out| {
                    *out = f16::from_f32(mean + std * random.unit()).to_le_bytes();
                });
            }
            GgmlType::BF16 => {
                out.as_chunks_mut().0.iter_mut().for_each(|out| {
                    *out = bf16::from_f32(mean + std * random.unit()).to_le_bytes();
                });
            }
            _ => {
                random.fill(out);
                let mut blocks = out.chunks_exact_mut(ty.block_bytes());
                blocks.by_ref().for_each(|block| set_scales(ty, std, block));
            }
        }
    }
}

/// Sets the scales of a block of random quants so that its values have mean 0 and standard deviation `std`.
///
/// Block layouts: ggml's `ggml-common.h`. Quants are uniform; the 6-bit scales of Q4_K and Q5_K are uniform over 0 to
/// 63, of mean square 1333.5; 8-bit numbers are uniform over -128 to 127, of mean square 5461.5.
fn set_scales(ty: GgmlType, std: f32, block: &mut [u8]) {
    // The standard deviations of a uniform n-bit number.
    let (bits4, bits5, bits6) = (4.610f32, 9.233f32, 18.473f32);
    let (scale6, scale8) = (1333.5f32.sqrt(), 5461.5f32.sqrt());
    match ty {
        GgmlType::Q8_0 => put_f16(&mut block[0..2], std / scale8),
        // The quants' mean is half a step below zero: scales of both signs even it out.
        GgmlType::Q4_0 => {
            let sign = if block[0] & 1 == 0 { 1.0 } else { -1.0 };
            put_f16(&mut block[0..2], sign * std / bits4);
        }
        GgmlType::Q4_K | GgmlType::Q5_K => {
            let (bits, middle) = if ty == GgmlType::Q4_K { (bits4, 7.5) } else { (bits5, 15.5) };
            let d = f16::from_f32(std / (scale6 * bits)).to_f32();
            put_f16(&mut block[0..2], d);
            put_f16(&mut block[2..4], d * middle);
            centre_minima(&mut block[4..16]);
        }
        GgmlType::Q6_K => put_f16(&mut block[208..210], std / (scale8 * bits6)),
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 | GgmlType::Vq(_) => {
            unreachable!("no blocks, no scales")
        }
    }
}

/// Makes each 6-bit minimum of a K-quant's packed scales equal to its scale, so that quants centre on zero: bytes 0 to
/// 3 and 4 to 7 hold the same parts of scales and minima, bytes 8 to 11 the other parts of both in their nibbles.
fn centre_minima(packed: &mut [u8]) {
    for j in 0..4 {
        packed[4 + j] = packed[j];
        let nibble = packed[8 + j] & 15;
        packed[8 + j] = nibble | nibble << 4;
    }
}

fn put_f16(out: &mut [u8], value: f32) {
    out.copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// SplitMix64 (Steele, Lea and Flood, 2014): the same numbers on every machine.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform, of mean 0 and standard deviation 1.
    fn unit(&mut self) -> f32 {
        let from_zero_to_one = (self.next() >> 40) as f32 / (1 << 24) as f32;
        (from_zero_to_one - 0.5) * 12f32.sqrt()
    }

    fn fill(&mut self, out: &mut [u8]) {
        let (words, rest) = out.as_chunks_mut::<8>();
        words.iter_mut().for_each(|word| *word = self.next().to_le_bytes());
        rest.copy_from_slice(&self.next().to_le_bytes()[..rest.len()]);
    }
}
