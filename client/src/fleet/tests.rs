use super::*;

fn entry(server: u16, held: &Arc<Held>) -> RosterEntry {
    let (trip, per_row) = (Duration::ZERO, Duration::ZERO);
    RosterEntry { server, held: held.clone(), trip, per_row }
}

#[test]
fn two_of_those_that_hold_the_same_are_drawn_and_each_is_drawn_as_often() {
    let (all, part) = (Arc::new(Held::of(&[true, true])), Arc::new(Held::of(&[true, false])));
    let mut drawn = [0; 6];
    for draw in 0..3000 {
        let entries = (0..5).map(|server| entry(server, &all)).chain([entry(5, &part)]).collect();
        let two = two_of_each(entries, draw);
        assert_eq!(two.len(), 3);
        two.iter().for_each(|entry| drawn[usize::from(entry.server)] += 1);
    }
    assert_eq!(drawn[5], 3000, "nobody else holds the same");
    // 1200 are expected of each, give or take 27.
    assert!(drawn[..5].iter().all(|&times| (1065..1335).contains(&times)), "{drawn:?}");
}

#[test]
fn two_replicas_are_both_seen() {
    let held = Arc::new(Held::of(&[true]));
    assert_eq!(two_of_each(vec![entry(0, &held), entry(1, &held)], 7).len(), 2);
}
