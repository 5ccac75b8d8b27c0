//! Adding the sites' parts up, always in the same order, and saying how much of a row they are.

use crate::Group;

/// One site's weighted sum for each row, and the routed weight that it covers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Partial {
    /// `[rows, width]`. In f64, so that the order of adding does not show once they are f32: what a
    /// row is does not depend on where its experts ran.
    pub sums: Vec<f64>,
    /// `[rows]`. In f64, so that the order of adding does not show next to an f32 weight.
    pub mass: Vec<f64>,
}

impl Partial {
    /// Nothing yet, for `rows` rows of `width` values.
    pub fn zeros(rows: usize, width: usize) -> Self {
        Partial { sums: vec![0.0; rows * width], mass: vec![0.0; rows] }
    }

    /// Counts the weights of `groups`, which ran, towards the rows' mass. Experts that run
    /// instead of routed ones must not be counted.
    ///
    /// # Panics
    /// If a group names a row that the partial does not have.
    pub fn cover(&mut self, groups: &[Group]) {
        for &(row, weight) in groups.iter().flat_map(|group| &group.rows) {
            self.mass[row as usize] += f64::from(weight);
        }
    }

    /// Multiplies each row's sum by its factor, `[rows]`. The mass stays: coverage tells what
    /// arrived, not what was made of it.
    ///
    /// # Panics
    /// If there is not one factor a row.
    pub fn rescale(&mut self, scale: &[f32]) {
        assert_eq!(scale.len(), self.mass.len(), "one factor a row");
        let width = self.width();
        for (row, &factor) in scale.iter().enumerate().filter(|&(_, &factor)| factor != 1.0) {
            self.sums[row * width..(row + 1) * width]
                .iter_mut()
                .for_each(|x| *x *= f64::from(factor));
        }
    }

    fn width(&self) -> usize {
        self.sums.len().checked_div(self.mass.len()).unwrap_or(0)
    }
}

/// Adds the servers' partials to the local one, in place.
///
/// Floating-point addition does not associate, so the order is fixed: local, then servers
/// ascending, whatever order `remote` came in. One partial a server: what a later attempt brought
/// is combined after the first.
///
/// # Panics
/// If the partials differ in shape: answers are checked where they arrive.
pub fn combine(local: &mut Partial, remote: &mut [(u16, Partial)]) {
    remote.sort_unstable_by_key(|(server, _)| *server);
    for (_, part) in remote.iter() {
        assert_eq!(part.sums.len(), local.sums.len(), "partials have the same shape");
        assert_eq!(part.mass.len(), local.mass.len(), "partials have the same rows");
        local.sums.iter_mut().zip(&part.sums).for_each(|(sum, x)| *sum += x);
        local.mass.iter_mut().zip(&part.mass).for_each(|(mass, x)| *mass += x);
    }
}

/// Arrived mass over routed mass: 1.0, exactly, where everything arrived, less where anything is
/// missing that an f32 sum could show.
pub fn coverage(arrived: f64, routed: f64) -> f32 {
    // f64 sums of f32 weights differ by 1e-15 or so with the order; an f32 sum cannot show a part
    // below 2^-25 of it. What is between the two is neither rounding nor worth a mark.
    const NOTHING: f64 = 1.0 / (1_u64 << 30) as f64;
    const BELOW_ONE: f32 = 1.0 - f32::EPSILON / 2.0;
    if arrived >= routed * (1.0 - NOTHING) {
        return 1.0;
    }
    let share = (arrived / routed) as f32;
    if share.is_nan() { 0.0 } else { share.clamp(0.0, BELOW_ONE) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn partial(seed: &[f32], rows: usize) -> Partial {
        Partial {
            sums: seed.iter().map(|&x| f64::from(x)).collect(),
            mass: seed[..rows].iter().map(|&x| f64::from(x.abs())).collect(),
        }
    }

    proptest! {
        #[test]
        fn the_order_of_arrival_does_not_show(
            parts in prop::collection::vec(prop::collection::vec(-1e3_f32..1e3, 6), 2..7),
            order in Just((0..6_usize).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let remote: Vec<_> =
                parts[1..].iter().enumerate().map(|(i, p)| (i as u16 * 3, partial(p, 2))).collect();
            let arrived: Vec<_> =
                order.iter().filter_map(|&i| remote.get(i).cloned()).collect();
            let mut got = partial(&parts[0], 2);
            combine(&mut got, &mut arrived.clone());

            for column in 0..6 {
                let mut want = f64::from(parts[0][column]);
                for part in &parts[1..] {
                    want += f64::from(part[column]);
                }
                prop_assert_eq!(got.sums[column].to_bits(), want.to_bits());
            }
        }

        #[test]
        fn everything_in_any_split_and_order_is_exactly_one(
            weights in prop::collection::vec((0.0_f32..3.0, 0..4_usize), 1..64),
            order in Just((0..64_usize).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let routed: f64 = weights.iter().map(|(w, _)| f64::from(*w)).sum();
            let mut sites = [0.0_f64; 4];
            for (weight, site) in order.iter().filter_map(|&i| weights.get(i)) {
                sites[*site] += f64::from(*weight);
            }
            prop_assert_eq!(coverage(sites.iter().sum(), routed), 1.0);
        }

        #[test]
        fn a_missing_weight_shows(
            weights in prop::collection::vec(1e-6_f32..1.0, 2..16),
            lost in any::<prop::sample::Index>(),
        ) {
            let lost = lost.index(weights.len());
            let routed: f64 = weights.iter().map(|w| f64::from(*w)).sum();
            let arrived: f64 = routed - f64::from(weights[lost]);
            let got = coverage(arrived, routed);
            prop_assert!(got < 1.0);
            prop_assert!((f64::from(got) - arrived / routed).abs() < 1e-6);
        }
    }

    #[test]
    fn coverage_at_the_edges() {
        assert_eq!(coverage(0.0, 1.0), 0.0);
        assert_eq!(coverage(0.0, 0.0), 1.0);
        assert_eq!(coverage(0.25, 1.0), 0.25);
        assert_eq!(coverage(f64::NAN, 1.0), 0.0);
    }

    #[test]
    fn cover_counts_and_rescale_leaves_the_mass() {
        let mut part = Partial { sums: vec![1.0, 2.0, 3.0, 4.0], mass: vec![0.0; 2] };
        part.cover(&[
            Group { expert: 0, rows: vec![(0, 0.5), (1, 0.25)] },
            Group { expert: 7, rows: vec![(1, 0.5)] },
        ]);
        part.rescale(&[1.0, 2.0]);
        assert_eq!(part, Partial { sums: vec![1.0, 2.0, 6.0, 8.0], mass: vec![0.5, 0.75] });
    }
}
