use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const N: usize = 12;
const MS: Duration = Duration::from_millis(1);
const US: Duration = Duration::from_micros(1);

/// A site that owns what it holds.
#[derive(Debug, Clone)]
struct Server {
    id: u16,
    holds: Vec<bool>,
    trip: Duration,
    per_row: Duration,
}

impl Server {
    fn site(&self) -> Site<'_> {
        Site { server: self.id, holds: &self.holds, trip: self.trip, per_row: self.per_row }
    }
}

fn server(id: u16, holds: &[usize], trip: Duration) -> Server {
    let holds = (0..N).map(|e| holds.contains(&e)).collect();
    Server { id, holds, trip, per_row: 50 * US }
}

fn one_row(experts: &[u16]) -> Vec<Group> {
    experts.iter().map(|&expert| Group { expert, rows: vec![(0, 0.25)] }).collect()
}

fn placed(
    pending: &[Group],
    residency: &[Residency],
    servers: &[Server],
    cold_load: Duration,
) -> Placement {
    let sites: Vec<Site<'_>> = servers.iter().map(Server::site).collect();
    place(pending, residency, &sites, cold_load)
}

fn experts(groups: &[Group]) -> Vec<u16> {
    groups.iter().map(|group| group.expert).collect()
}

fn residency() -> impl Strategy<Value = Vec<Residency>> {
    let one = prop_oneof![Just(Residency::Hot), Just(Residency::Cold), Just(Residency::Absent)];
    prop::collection::vec(one, N)
}

fn servers() -> impl Strategy<Value = Vec<Server>> {
    let one = (prop::collection::vec(any::<bool>(), N), 0..40_000_u32, 0..500_u32);
    prop::collection::vec(one, 0..4).prop_map(|all| {
        let all = all.into_iter().enumerate();
        all.map(|(i, (holds, trip, per_row))| Server {
            id: 7 * i as u16,
            holds,
            trip: trip * US,
            per_row: per_row * US,
        })
        .collect()
    })
}

fn pending() -> impl Strategy<Value = Vec<Group>> {
    let rows = prop::collection::btree_map(0..20_u32, 0.0_f32..1.0, 1..8);
    prop::collection::btree_map(0..N as u16, rows, 0..N).prop_map(|groups| {
        let groups = groups.into_iter();
        groups.map(|(expert, rows)| Group { expert, rows: rows.into_iter().collect() }).collect()
    })
}

proptest! {
    #[test]
    fn every_call_is_placed_once_where_it_can_run(
        pending in pending(),
        residency in residency(),
        servers in servers(),
        cold_load in (0..20_000_u32).prop_map(|us| us * US),
    ) {
        let got = placed(&pending, &residency, &servers, cold_load);
        let holds = |id: u16, e: u16| {
            servers.iter().any(|s| s.id == id && s.holds[usize::from(e)])
        };

        let remote = got.remote.iter().flat_map(|(_, groups)| groups);
        let mut all: Vec<&Group> = got.local.iter().chain(remote).chain(&got.missing).collect();
        all.sort_by_key(|group| group.expert);
        prop_assert_eq!(all, pending.iter().collect::<Vec<_>>());

        for group in &got.local {
            prop_assert_ne!(residency[usize::from(group.expert)], Residency::Absent);
        }
        for (id, groups) in &got.remote {
            prop_assert!(!groups.is_empty());
            for group in groups {
                prop_assert_ne!(residency[usize::from(group.expert)], Residency::Hot);
                prop_assert!(holds(*id, group.expert));
            }
            prop_assert!(groups.is_sorted_by_key(|group| group.expert));
        }
        // Work-conserving: missing is only what nobody has.
        for group in &got.missing {
            prop_assert_eq!(residency[usize::from(group.expert)], Residency::Absent);
            prop_assert!(servers.iter().all(|s| !s.holds[usize::from(group.expert)]));
        }
        prop_assert!(got.local.is_sorted_by_key(|group| group.expert));
        prop_assert!(got.remote.is_sorted_by_key(|(id, _)| *id));
    }

    #[test]
    fn the_order_of_sites_does_not_show(
        pending in pending(),
        residency in residency(),
        (servers, shuffled) in servers().prop_flat_map(|s| (Just(s.clone()), Just(s).prop_shuffle())),
    ) {
        let load = 3 * MS;
        prop_assert_eq!(
            placed(&pending, &residency, &servers, load),
            placed(&pending, &residency, &shuffled, load)
        );
    }

    /// Replicas are used: the last answer comes no later than if one full site did everything.
    #[test]
    fn no_later_than_one_server_for_all(pending in pending(), mut servers in servers()) {
        servers.push(server(90, &(0..N).collect::<Vec<_>>(), 5 * MS));
        let got = placed(&pending, &[Residency::Absent; N], &servers, MS);
        prop_assert!(got.missing.is_empty() && got.local.is_empty());
        let rows = |groups: &[Group]| groups.iter().map(|g| g.rows.len() as u32).sum::<u32>();
        let finish = got.remote.iter().map(|(id, groups)| {
            let server = servers.iter().find(|s| s.id == *id).expect("a server that exists");
            server.trip + server.per_row * rows(groups)
        });
        let alone = 5 * MS + 50 * US * rows(&pending);
        prop_assert!(finish.max().unwrap_or_default() <= alone);
    }

    /// With one server and nothing else to wait for, no other split of the cold ones is cheaper.
    #[test]
    fn the_cold_split_is_the_cheapest(
        pending in pending(),
        residency in residency(),
        trip in 0..20_000_u32,
        per_row in 0..500_u32,
        cold_load in 0..5_000_u32,
    ) {
        let server = Server {
            id: 1,
            holds: vec![true; N],
            trip: trip * US,
            per_row: per_row * US,
        };
        let got = placed(&pending, &residency, &[server], cold_load * US);
        let is = |g: &Group, r: Residency| residency[usize::from(g.expert)] == r;
        let cold: Vec<&Group> = pending.iter().filter(|g| is(g, Residency::Cold)).collect();
        let trip = if pending.iter().any(|g| is(g, Residency::Absent)) { 0 } else { trip };
        // Absent experts' rows may already cover a part of the trip; here the trip is all of it.
        let cost = |sent: &dyn Fn(usize) -> bool| -> u64 {
            let any = (0..cold.len()).any(sent);
            let each = cold.iter().enumerate().map(|(i, group)| match sent(i) {
                true => u64::from(per_row) * group.rows.len() as u64,
                false => u64::from(cold_load),
            });
            each.sum::<u64>() + if any { u64::from(trip) } else { 0 }
        };
        let local = experts(&got.local);
        let chosen = cost(&|i| !local.contains(&cold[i].expert));
        for split in 0..1_u32 << cold.len() {
            prop_assert!(chosen <= cost(&|i| split >> i & 1 == 1));
        }
    }

    #[test]
    fn grouping_loses_nothing(
        calls in prop::collection::vec((0.0_f32..1.0, any::<prop::sample::Index>()), 0..40),
        k in 1..4_usize,
    ) {
        let rows = calls.len() / k;
        let routing = Routing {
            k,
            n_experts: N,
            experts: calls[..rows * k].iter().map(|(_, e)| e.index(N) as u16).collect(),
            weights: calls[..rows * k].iter().map(|(w, _)| *w).collect(),
            own: vec![true; rows * k],
            ..Routing::default()
        };
        let mut want: BTreeMap<u16, Vec<(u32, f32)>> = BTreeMap::new();
        for r in 0..rows {
            for (expert, weight) in routing.row(r) {
                want.entry(expert).or_default().push((r as u32, weight));
            }
        }
        let got = group(&routing).into_iter().map(|g| (g.expert, g.rows));
        prop_assert_eq!(got.collect::<Vec<_>>(), want.into_iter().collect::<Vec<_>>());
    }
}

#[test]
fn a_load_beats_a_slow_link_and_loses_to_a_fast_one() {
    let (pending, cold) = (one_row(&[1, 2]), [Residency::Cold; N]);
    let all: Vec<usize> = (0..N).collect();
    let wan = placed(&pending, &cold, &[server(0, &all, 20 * MS)], MS);
    assert_eq!(experts(&wan.local), [1, 2]);
    let lan = placed(&pending, &cold, &[server(0, &all, 300 * US)], MS);
    assert_eq!(experts(&lan.remote[0].1), [1, 2]);
    // 99 MB of Mixtral from flash.
    let mixtral = placed(&pending, &cold, &[server(0, &all, 20 * MS)], 40 * MS);
    assert_eq!(experts(&mixtral.remote[0].1), [1, 2]);
}

/// Two loads of 1 ms do not pay for a trip of 20 ms; with an absent expert it is made anyway.
#[test]
fn cold_experts_share_a_trip_that_is_made_anyway() {
    let mut residency = [Residency::Cold; N];
    residency[3] = Residency::Absent;
    let all: Vec<usize> = (0..N).collect();
    let got = placed(&one_row(&[1, 2, 3]), &residency, &[server(0, &all, 20 * MS)], MS);
    assert_eq!(experts(&got.remote[0].1), [1, 2, 3]);
}

#[test]
fn many_loads_together_pay_for_a_trip() {
    let all: Vec<usize> = (0..N).collect();
    let servers = [server(0, &all, 4 * MS)];
    let cold = [Residency::Cold; N];
    let three = placed(&one_row(&[0, 1, 2]), &cold, &servers, MS);
    assert_eq!(three.local.len(), 3);
    let six = placed(&one_row(&[0, 1, 2, 3, 4, 5]), &cold, &servers, MS);
    assert_eq!(six.remote[0].1.len(), 6);
}

#[test]
fn replicas_share_the_rows() {
    let all: Vec<usize> = (0..N).collect();
    let servers = [server(4, &all, MS), server(2, &all, MS)];
    let got = placed(&one_row(&[0, 1, 2, 3]), &[Residency::Absent; N], &servers, MS);
    let counts: Vec<_> = got.remote.iter().map(|(id, groups)| (*id, groups.len())).collect();
    assert_eq!(counts, [(2, 2), (4, 2)]);
}

/// Once one site is waited for, another with the same trip costs no more waiting.
#[test]
fn trips_side_by_side_are_waited_for_once() {
    let servers = [server(0, &[0, 1, 2, 3, 4, 5], 4 * MS), server(1, &[6], 4 * MS)];
    let cold = [Residency::Cold; N];
    let got = placed(&one_row(&[0, 1, 2, 3, 4, 5, 6]), &cold, &servers, MS);
    assert_eq!(got.remote.len(), 2);
    assert_eq!(placed(&one_row(&[6]), &cold, &servers, MS).local.len(), 1);
}

#[test]
fn those_without_a_choice_choose_first_then_the_largest() {
    let servers = [server(0, &[0, 1, 2, 3], MS), server(1, &[0, 2, 3], MS)];
    let absent = [Residency::Absent; N];
    let got = placed(&one_row(&[0, 1]), &absent, &servers, MS);
    assert_eq!((experts(&got.remote[0].1), experts(&got.remote[1].1)), (vec![1], vec![0]));

    let mut groups = one_row(&[0, 2, 3]);
    groups[2].rows.push((1, 0.25));
    let got = placed(&groups, &absent, &servers, MS);
    assert_eq!((experts(&got.remote[0].1), experts(&got.remote[1].1)), (vec![3], vec![0, 2]));
}

/// A request that goes out anyway takes one more expert, if the layer does not end later for it.
#[test]
fn no_request_more_than_it_needs() {
    let servers = [server(0, &[9], 80 * MS), server(1, &[0, 8], 5 * MS), server(2, &[0], MS)];
    let got = placed(&one_row(&[0, 8, 9]), &[Residency::Absent; N], &servers, MS);
    let asked: Vec<_> = got.remote.iter().map(|(id, groups)| (*id, experts(groups))).collect();
    assert_eq!(asked, [(0, vec![9]), (1, vec![0, 8])]);
}

#[test]
fn the_far_replica_is_left_alone() {
    let all: Vec<usize> = (0..N).collect();
    let servers = [server(0, &all, 80 * MS), server(1, &all, MS)];
    let got = placed(&one_row(&[0, 1, 2, 3]), &[Residency::Absent; N], &servers, MS);
    assert_eq!(got.remote.len(), 1);
    assert_eq!(got.remote[0].0, 1);
    // Unless somebody has to go there anyway: then the near one has less to do.
    let servers = [server(0, &[9], 80 * MS), server(1, &all[..9], MS)];
    let got = placed(&one_row(&[0, 9]), &[Residency::Absent; N], &servers, MS);
    assert_eq!(experts(&got.remote[0].1), [9]);
    assert_eq!(experts(&got.remote[1].1), [0]);
}

#[test]
fn without_a_fleet_absent_is_missing_and_cold_is_loaded() {
    let mut residency = vec![Residency::Hot; 3];
    residency[1] = Residency::Cold;
    residency[2] = Residency::Absent;
    // Expert 9 lies past the end of what residency tells.
    let got = placed(&one_row(&[0, 1, 2, 9]), &residency, &[], MS);
    assert_eq!((experts(&got.local), experts(&got.missing)), (vec![0, 1], vec![2, 9]));
    assert_eq!(got.remote, []);
}
