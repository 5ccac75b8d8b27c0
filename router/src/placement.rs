//! Placement: where each expert of a layer runs.
//!
//! What is in memory runs here. What only servers hold goes to a server. What lies in a local file
//! goes wherever it costs less. The decision sees estimates and residency as data, never a socket
//! or a file.

use std::cmp::Reverse;
use std::time::Duration;

use crate::Routing;

/// Where an expert's weights are, as the device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residency {
    /// In memory.
    Hot,
    /// In a local file, not in memory.
    Cold,
    /// Only a server has it.
    Absent,
}

/// The rows that one expert is to run for.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// The expert within its layer.
    pub expert: u16,
    /// Row and routed weight, rows ascending.
    pub rows: Vec<(u32, f32)>,
}

/// One server as placement sees it, for one layer. Leave out those that may not be asked now.
#[derive(Debug, Clone, Copy)]
pub struct Site<'a> {
    /// The server's number; every site has another.
    pub server: u16,
    /// By expert, whether the server holds it; experts past the end are not held.
    pub holds: &'a [bool],
    /// One request's round trip.
    pub trip: Duration,
    /// What each row of each expert adds: wire and service time.
    pub per_row: Duration,
}

/// Where the pending groups go: each is in exactly one list.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Placement {
    /// To run here, experts ascending.
    pub local: Vec<Group>,
    /// By server, ascending; experts ascending.
    pub remote: Vec<(u16, Vec<Group>)>,
    /// What nobody can run, experts ascending.
    pub missing: Vec<Group>,
}

/// All of a layer's work that the model itself chose, by expert ascending; what a prior put in place
/// of the rest is [`favoured`](crate::favoured).
pub fn group(routing: &Routing) -> Vec<Group> {
    let rows = 0..routing.rows();
    let calls = rows.flat_map(|r| routing.calls(r, true).map(move |(e, w)| (e, r as u32, w)));
    group_calls(routing.n_experts, calls)
}

/// Decides where `pending` runs: all of a layer's groups, or what a failed server left behind.
///
/// Absent experts go to a site that holds them. Cold ones go where they cost less: asking a site
/// costs its per-row time, and its trip so far as nothing else waits that long anyway; not asking
/// costs `cold_load` an expert, which brings it from the local file into memory. Among sites with the same expert the layer's end decides. The answer
/// depends neither on the order of `sites` nor on anything but the arguments.
///
/// Experts past the end of `residency` are absent.
pub fn place(
    pending: &[Group],
    residency: &[Residency],
    sites: &[Site<'_>],
    cold_load: Duration,
) -> Placement {
    let mut fleet = Fleet::new(sites);
    let (mut local, mut missing) = (Vec::new(), Vec::new());
    let (mut absent, mut cold) = (Vec::new(), Vec::new());
    for group in pending {
        let held = fleet.holders(group.expert).next().is_some();
        match residency.get(usize::from(group.expert)).unwrap_or(&Residency::Absent) {
            Residency::Hot => local.push(group),
            Residency::Cold if held => cold.push(group),
            Residency::Cold => local.push(group),
            Residency::Absent if held => absent.push(group),
            Residency::Absent => missing.push(group),
        }
    }
    fleet.spread(absent);
    let asked = fleet.worth_asking(&mut cold, cold_load);
    fleet.spread(asked);
    local.append(&mut cold);
    Placement { local: by_expert(local), remote: fleet.into_remote(), missing: by_expert(missing) }
}

/// Calls as `(expert, row, weight)`, rows ascending, to groups by expert ascending.
pub(crate) fn group_calls(
    n_experts: usize,
    calls: impl IntoIterator<Item = (u16, u32, f32)>,
) -> Vec<Group> {
    let mut rows = vec![Vec::new(); n_experts];
    for (expert, row, weight) in calls {
        rows[usize::from(expert)].push((row, weight));
    }
    let groups = rows.into_iter().enumerate().filter(|(_, rows)| !rows.is_empty());
    groups.map(|(expert, rows)| Group { expert: expert as u16, rows }).collect()
}

/// The sites in ascending order of server, and what each has been given so far.
struct Fleet<'a> {
    sites: Vec<Site<'a>>,
    given: Vec<Vec<&'a Group>>,
    rows: Vec<usize>,
    /// When the last site's answer is expected: sites work side by side.
    finish: Duration,
}

impl<'a> Fleet<'a> {
    fn new(sites: &[Site<'a>]) -> Self {
        let mut sites = sites.to_vec();
        sites.sort_by_key(|site| site.server);
        let (given, rows) = (vec![Vec::new(); sites.len()], vec![0; sites.len()]);
        Fleet { sites, given, rows, finish: Duration::ZERO }
    }

    fn holders(&self, expert: u16) -> impl Iterator<Item = usize> + '_ {
        (0..self.sites.len()).filter(move |&i| self.sites[i].holds_expert(expert))
    }

    /// Gives each group to one of its holders so that the last answer comes early.
    ///
    /// Greedy: groups without a choice first, then the largest first (Graham's LPT rule), each
    /// where the layer ends soonest; then where a request goes out anyway.
    fn spread(&mut self, mut groups: Vec<&'a Group>) {
        groups.sort_by_key(|group| {
            let choice = self.holders(group.expert).nth(1).is_some();
            (choice, Reverse(group.rows.len()), group.expert)
        });
        for group in groups {
            let finish_at = |i: usize| self.sites[i].time(self.rows[i] + group.rows.len());
            let best = self.holders(group.expert).min_by_key(|&i| {
                (finish_at(i).max(self.finish), self.given[i].is_empty(), finish_at(i))
            });
            if let Some(i) = best {
                self.finish = self.finish.max(finish_at(i));
                self.rows[i] += group.rows.len();
                self.given[i].push(group);
            }
        }
    }

    /// Takes from `cold` what is cheaper to ask for than to load.
    ///
    /// A trip pays for itself only if the loads that it saves are worth it together, so sites are
    /// opened one by one, the most profitable first, until none saves anything.
    fn worth_asking(&self, cold: &mut Vec<&'a Group>, cold_load: Duration) -> Vec<&'a Group> {
        let saved = |site: &Site<'_>, group: &Group| match site.holds_expert(group.expert) {
            true => cold_load.saturating_sub(site.row_time(group.rows.len())),
            false => Duration::ZERO,
        };
        let mut waited = self.finish;
        let mut asked = Vec::new();
        loop {
            let profit = |site: &Site<'_>| {
                let loads = cold.iter().map(|group| saved(site, group));
                let loads = loads.fold(Duration::ZERO, Duration::saturating_add);
                loads.saturating_sub(site.trip.saturating_sub(waited))
            };
            // Of equals the lowest server: the first minimum wins.
            let best = self.sites.iter().min_by_key(|site| Reverse(profit(site)));
            let Some(site) = best.filter(|site| !profit(site).is_zero()) else { return asked };
            waited = waited.max(site.trip);
            cold.retain(|group| {
                let keep = saved(site, group).is_zero();
                if !keep {
                    asked.push(*group);
                }
                keep
            });
        }
    }

    fn into_remote(self) -> Vec<(u16, Vec<Group>)> {
        let sites = self.sites.iter().zip(self.given);
        let asked = sites.filter(|(_, groups)| !groups.is_empty());
        asked.map(|(site, groups)| (site.server, by_expert(groups))).collect()
    }
}

impl Site<'_> {
    fn holds_expert(&self, expert: u16) -> bool {
        self.holds.get(usize::from(expert)).copied().unwrap_or(false)
    }

    fn time(&self, rows: usize) -> Duration {
        self.trip.saturating_add(self.row_time(rows))
    }

    fn row_time(&self, rows: usize) -> Duration {
        self.per_row.saturating_mul(u32::try_from(rows).unwrap_or(u32::MAX))
    }
}

fn by_expert(mut groups: Vec<&Group>) -> Vec<Group> {
    groups.sort_by_key(|group| group.expert);
    groups.into_iter().cloned().collect()
}

#[cfg(test)]
mod tests;
