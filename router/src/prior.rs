//! The prior: selection that knows which experts are here.
//!
//! The idea of "Mixture of Cache-Conditional Experts" (Skliar et al. 2024, arXiv 2412.00099): the
//! last experts of a row's top-k are close to those that just missed it, and a device loses little
//! by taking one that is in memory instead.

use crate::placement::group_calls;
use crate::{Group, Routing};

/// Favours resident experts in selection. Weights derive from the scores all the same, and the
/// model's first choice stays.
#[derive(Debug, Clone, Copy)]
pub struct Prior<'a> {
    /// By expert, whether it is here; experts past the end are not.
    pub resident: &'a [bool],
    /// By what fraction of the range of the row's router logits a resident expert is ahead of one
    /// that is not: 0 changes nothing, from 1 on any resident expert is preferred.
    pub strength: f32,
}

impl Prior<'_> {
    /// Replaces those of `experts`, best first, that a resident expert overtakes, each in its place.
    ///
    /// What results is the top-k of the logits with the head start added, of which the first was
    /// chosen without it. Only residents come in, and only others go.
    pub(crate) fn favour(&self, logits: &[f32], experts: &mut [u16]) {
        let head_start = f64::from(self.strength) * range(logits);
        let here = |e: usize| self.resident.get(e) == Some(&true);
        // The least first: those that stay are ever better, and those that come ever worse.
        for slot in (1..experts.len()).rev() {
            let last = usize::from(experts[slot]);
            if here(last) {
                continue;
            }
            let outside = |&e: &usize| here(e) && !experts.contains(&(e as u16));
            let finite = (0..logits.len()).filter(outside).filter(|&e| logits[e].is_finite());
            let best = finite.max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)));
            let overtakes =
                |&e: &usize| f64::from(logits[e]) + head_start > f64::from(logits[last]);
            let Some(best) = best.filter(overtakes) else { return };
            experts[slot] = best as u16;
        }
    }
}

/// The calls that a prior put in place of the model's own choice, by expert ascending, weights
/// final. They run here, and do not count into coverage.
pub fn favoured(routing: &Routing) -> Vec<Group> {
    // As ever without a prior: nothing to group, layer by layer.
    if routing.own.iter().all(|own| *own) {
        return Vec::new();
    }
    let rows = 0..routing.rows();
    let calls = rows.flat_map(|r| routing.calls(r, false).map(move |(e, w)| (e, r as u32, w)));
    group_calls(routing.n_experts, calls)
}

/// The difference of the greatest and the least finite value; 0 where there is none.
fn range(values: &[f32]) -> f64 {
    let finite = values.iter().filter(|x| x.is_finite()).map(|&x| f64::from(x));
    let (least, most) = finite
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), x| (least.min(x), most.max(x)));
    (most - least).max(0.0)
}

#[cfg(test)]
mod tests;
