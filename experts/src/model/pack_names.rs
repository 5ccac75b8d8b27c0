//! What packs call their metadata and tensors.

use crate::types::GgmlType;

/// The full model's fingerprint, in hexadecimal.
pub const FINGERPRINT: &str = "outrigger.fingerprint";
/// The types of the full model's gate, up and down projections, three names a layer. A file that has it is a pack.
pub const TYPES: &str = "outrigger.pack.types";
/// The budget for the experts, as it was asked for.
pub const BUDGET: &str = "outrigger.pack.budget";
/// What the experts were fitted to.
pub const CALIBRATION: &str = "outrigger.pack.calibration";
/// By layer and expert: its share of the layer's routed weight on the calibration text.
pub const MASS: &str = "outrigger.pack.mass";
/// By layer and expert: the squared error of its weighted outputs on the calibration text over their own squared sum.
pub const ERRORS: &str = "outrigger.pack.errors";

/// By layer, expert and matrix, three an expert: the [`checksum`](crate::checksum) of its bytes. A mean output has the
/// first of the three, and the others are 0.
pub const CHECKSUMS: &str = "outrigger.pack.checksums";

/// A matrix of one expert: `blk.3.ffn_gate.7.weight`, as the files of the first Mixtral had it, or `blk.3.ffn_gate.7.vq4`
/// where it is coded.
pub fn matrix(layer: usize, part: &str, e: usize, ty: GgmlType) -> String {
    match ty {
        GgmlType::Vq(dim) => format!("blk.{layer}.{part}.{e}.vq{dim}"),
        _ => format!("blk.{layer}.{part}.{e}.weight"),
    }
}

/// An expert's mean output.
pub fn mean(layer: usize, e: usize) -> String {
    format!("blk.{layer}.ffn_mean.{e}")
}
