//! The end of products that are kept as [sums](super::sums) of lanes while many are in the making. (Not with AVX2, whose
//! kernels multiply two rows at a time: a last pass over all sums is sooner done there.)

use std::ops::Range;

use super::Tile;
use super::sums::LANES;

/// What becomes of a lane's sum once block `b` of `blocks` has added to it, for kernels that keep the sums of many products
/// in memory: as soon as the lanes below a node of the final tree have seen their last blocks, it is one sum, so that no pass
/// over all of them is left for the end.
pub(super) struct Fold {
    others: [usize; LANES.ilog2() as usize],
    count: usize,
    /// The lane in whose place it is kept; none where it is the whole product.
    pub(super) to: Option<usize>,
}

impl Fold {
    #[inline]
    pub(super) fn new(b: usize, blocks: usize) -> Fold {
        let over = |lane: usize| b + 1 + lane.wrapping_sub(b + 1) % LANES >= blocks;
        let mut node = b % LANES;
        let mut fold = Fold { others: [0; _], count: 0, to: Some(node) };
        if !over(node) {
            return fold;
        }
        for half in [4, 2, 1] {
            let other = node ^ half;
            if !(other..LANES).step_by(2 * half).all(over) {
                fold.to = Some(node);
                return fold;
            }
            if other < blocks {
                fold.others[fold.count] = other;
                fold.count += 1;
            }
            node %= half;
        }
        fold.to = None;
        fold
    }

    /// Where the sums are that are to be added to it before.
    #[inline(always)]
    pub(super) fn others(&self) -> &[usize] {
        &self.others[..self.count]
    }
}

/// Where an activation row's products with some neighbouring weight rows of a tile go.
#[derive(Clone, Copy)]
pub(super) struct Out {
    pub(super) at: *mut f32,
    /// How many they are.
    pub(super) rows: usize,
    stride: usize,
}

impl Out {
    /// Those of the first activation row with these weight rows.
    pub(super) fn new(tile: &Tile<'_>, rows: Range<usize>) -> Out {
        Out { at: tile.out.wrapping_add(rows.start), rows: rows.len(), stride: tile.stride }
    }

    /// Those of the activation row `i` rows on.
    #[inline(always)]
    pub(super) fn row(self, i: usize) -> Out {
        Out { at: self.at.wrapping_add(i * self.stride), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::sums::Sums;

    #[test]
    fn folding_adds_up_as_the_whole_tree_does() {
        for blocks in 1..=3 * LANES {
            let (mut whole, mut lanes, mut product) = (Sums::new(), [f32::NAN; LANES], None);
            for b in 0..blocks {
                let scale = (b as f32 + 0.7).sin();
                whole.add(b, 1, scale);
                let before = if b < LANES { 0.0 } else { lanes[b % LANES] };
                let fold = Fold::new(b, blocks);
                let sum = fold.others().iter().fold(scale + before, |sum, i| sum + lanes[*i]);
                assert_eq!(product, None, "{blocks} blocks, whole before {b}");
                match fold.to {
                    Some(lane) => lanes[lane] = sum,
                    None => product = Some(sum),
                }
            }
            assert_eq!(product, Some(whole.total()), "{blocks} blocks");
        }
    }
}
