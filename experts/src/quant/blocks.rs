//! What the block layouts of `ggml-common.h` have in common.

use half::f16;

/// The f16 at `at`, little-endian.
#[inline]
pub(super) fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Scale and minimum of sub-block `j` of Q4_K and Q5_K, 6 bits each packed in 12 bytes: `get_scale_min_k4` of
/// `ggml-quants.c`.
#[inline]
pub(super) fn scale_min(j: usize, packed: &[u8]) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            (packed[j + 4] & 0x0f) | ((packed[j - 4] >> 6) << 4),
            (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4),
        )
    }
}

/// Packs eight 6-bit scales and minima: the inverse of [`scale_min`].
pub(super) fn pack_scales_mins(scales: [u8; 8], mins: [u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for j in 0..4 {
        packed[j] = scales[j] | ((scales[j + 4] >> 4) << 6);
        packed[j + 4] = mins[j] | ((mins[j + 4] >> 4) << 6);
        packed[j + 8] = (scales[j + 4] & 0x0f) | ((mins[j + 4] & 0x0f) << 4);
    }
    packed
}

/// Q4_0: f16 scale, then 16 bytes: value `i` in the low nibble of byte `i`, value `16 + i` in its high nibble, +8.
pub(super) mod q4_0 {
    pub(crate) const BYTES: usize = 18;
    pub(crate) const QS: usize = 2;
}

/// Q8_0: f16 scale, then 32 signed bytes.
pub(super) mod q8_0 {
    pub(crate) const BYTES: usize = 34;
    pub(crate) const QS: usize = 2;
}

/// Q4_K: f16 scale of the scales, f16 scale of the minima, 12 bytes of both, then four chunks of 32 bytes: low
/// nibbles are sub-block `2c`, high nibbles sub-block `2c + 1`.
pub(super) mod q4_k {
    pub(crate) const BYTES: usize = 144;
    pub(crate) const SCALES: usize = 4;
    pub(crate) const QS: usize = 16;
}

/// Q5_K: as Q4_K, with 32 bytes of fifth bits before the nibbles: bit `j` of byte `i` belongs to value `i` of
/// sub-block `j`.
pub(super) mod q5_k {
    pub(crate) const BYTES: usize = 176;
    pub(crate) const SCALES: usize = 4;
    pub(crate) const QH: usize = 16;
    pub(crate) const QS: usize = 48;
}

/// Q6_K: 128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 signed scales, f16 scale, values +32. Each half
/// of 128 values has 64 bytes of nibbles (low: values 0..64, high: values 64..128) and 32 bytes of bit pairs (pair
/// `k` of byte `i`: value `32 k + i`).
pub(super) mod q6_k {
    pub(crate) const BYTES: usize = 210;
    pub(crate) const QH: usize = 128;
    pub(crate) const SCALES: usize = 192;
    pub(crate) const D: usize = 208;
}
