//! What the device does while the network and the server fail, on a simulated network: every token within its
//! deadline, coverage that tells the truth, and everything well again once the fault is over.

use std::time::Duration;

use outrigger::{Engine, EngineConfig};
use outrigger_tests::simulated::{DEADLINE, Event, Observed, Outcome, run};
use outrigger_tests::{all_logits, fixtures, max_difference};

const SEEDS: [u64; 3] = [1, 2, 3];
/// Liveness: once a fault is over, coverage is whole again within this time.
const RECOVERY: Duration = Duration::from_secs(2);
/// What the simulation's clock ticks add to a deadline.
const TICKS: Duration = Duration::from_millis(5);

fn secs(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// What must hold whatever happened: no token waits past its deadline, and coverage is exactly 1 where and only where
/// no expert call is missing.
fn check_safety(tokens: &[Observed]) {
    for Observed { asked, token } in tokens {
        assert!(token.elapsed <= DEADLINE + TICKS, "at {asked:?}: {:?}", token.elapsed);
        assert_eq!(token.coverage == 1.0, token.tally.missing == 0, "at {asked:?}: {token:?}");
        assert_eq!(token.fault.is_some(), token.tally.missing > 0, "at {asked:?}: {token:?}");
        assert!(token.provisional || token.coverage == 1.0, "at {asked:?}: {token:?}");
    }
    let first_lost = tokens.iter().position(|seen| seen.token.coverage < 1.0);
    let first_marked = tokens.iter().position(|seen| seen.token.provisional);
    assert_eq!(first_marked, first_lost, "marks begin with the first loss");
}

/// Tokens asked for in an interval.
fn between(tokens: &[Observed], from: f64, to: f64) -> Vec<&Observed> {
    let seen: Vec<_> =
        tokens.iter().filter(|o| o.asked >= secs(from) && o.asked < secs(to)).collect();
    assert!(!seen.is_empty(), "no token between {from} s and {to} s");
    seen
}

fn check_whole(tokens: &[Observed], from: f64, to: f64) {
    for seen in between(tokens, from, to) {
        assert_eq!(seen.token.coverage, 1.0, "at {:?}: {:?}", seen.asked, seen.token.fault);
    }
}

/// Whole before the fault, which only meets a token that is under way, and from its end plus the time to recover.
fn check_liveness(tokens: &[Observed], fault: f64, end: f64, length: f64) {
    let under_way = |seen: &&Observed| seen.asked + seen.token.elapsed >= secs(fault);
    let first = tokens.iter().find(under_way).expect("tokens go on").asked;
    check_whole(tokens, 0.0, first.as_secs_f64());
    check_whole(tokens, end + RECOVERY.as_secs_f64(), length);
}

/// After healing, the session is as if it had never been cut: its logits are those of the whole model on its text.
fn check_healed(outcome: &Outcome) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (last, expected) = runtime.block_on(async {
        let engine = Engine::open(EngineConfig::new(fixtures::demo_model())).await.expect("opens");
        // The last token is pending: nothing was computed for it yet.
        let computed = &outcome.ids[..outcome.ids.len() - 1];
        let logits = all_logits(&engine, computed, 64).await;
        (engine.spec().n_vocab, logits)
    });
    let difference = max_difference(&outcome.settled_logits, &expected[expected.len() - last..]);
    assert!(difference <= 1e-4, "{difference}");
}

#[test]
fn a_partition_degrades_and_heals() {
    for seed in SEEDS {
        let script = [(secs(2.0), Event::Partition), (secs(5.0), Event::Repair)];
        let outcome = run(seed, secs(9.0), &script);
        check_safety(&outcome.tokens);
        check_liveness(&outcome.tokens, 2.0, 5.0, 9.0);
        let cut = between(&outcome.tokens, 2.1, 4.9);
        assert!(cut.iter().any(|seen| seen.token.coverage < 1.0), "the partition shows");
        check_healed(&outcome);
    }
}

#[test]
fn latency_beyond_the_deadline_degrades_and_heals() {
    for seed in SEEDS {
        let script = [
            (secs(2.0), Event::Latency(secs(2.0))),
            (secs(5.0), Event::Latency(Duration::from_millis(2))),
        ];
        let outcome = run(seed, secs(10.0), &script);
        check_safety(&outcome.tokens);
        // Messages that were sent late in the fault still take their two seconds.
        check_liveness(&outcome.tokens, 2.0, 7.0, 10.0);
        check_healed(&outcome);
    }
}

/// A token has time for some of its layers. That the rest is not waited for is no fault of the server's, which stays in use.
#[test]
fn a_link_too_slow_for_all_layers_of_a_token_serves_some_of_each() {
    for seed in SEEDS {
        let script = [(secs(1.0), Event::Latency(Duration::from_millis(35)))];
        let outcome = run(seed, secs(6.0), &script);
        check_safety(&outcome.tokens);
        let seen = between(&outcome.tokens, 1.5, 6.0);
        for seen in &seen {
            assert!(seen.token.tally.remote > 0, "at {:?}: {:?}", seen.asked, seen.token.fault);
        }
        let lacking = seen.iter().filter(|seen| seen.token.coverage < 1.0).count();
        assert!(2 * lacking > seen.len(), "{lacking} of {}", seen.len());
    }
}

/// Some requests, to see whether it is wide again, but no queue of them that is in the way once it is.
#[test]
fn a_link_that_gets_narrow_is_asked_for_less() {
    for seed in SEEDS {
        let script = [(secs(2.0), Event::Bandwidth(20e3)), (secs(6.0), Event::Repair)];
        let outcome = run(seed, secs(10.0), &script);
        check_safety(&outcome.tokens);
        check_liveness(&outcome.tokens, 2.0, 6.0, 10.0);
        let asked = |from, to| {
            let tokens = between(&outcome.tokens, from, to);
            tokens.iter().map(|seen| seen.token.tally.bytes_up).sum::<u64>() as f64 / (to - from)
        };
        let (wide, narrow) = (asked(1.0, 2.0), asked(2.5, 6.0));
        assert!(narrow < wide / 4.0, "{narrow} of {wide} bytes a second");
    }
}

/// What was known of the link before is not believed after, and the connection that the server has closed meanwhile
/// costs no more than a fault does.
#[test]
fn a_device_that_slept_for_an_hour_goes_on() {
    for seed in SEEDS {
        let hour = Duration::from_secs(3600);
        let outcome = run(seed, hour + secs(6.0), &[(secs(2.0), Event::Sleep(hour))]);
        check_safety(&outcome.tokens);
        check_liveness(&outcome.tokens, 2.0, 3602.0, 3606.0);
        check_healed(&outcome);
    }
}

#[test]
fn a_crash_and_a_restart_degrade_and_heal() {
    for seed in SEEDS {
        let script =
            [(secs(2.0), Event::Crash), (secs(5.0), Event::Restart(fixtures::demo_model()))];
        let outcome = run(seed, secs(9.0), &script);
        check_safety(&outcome.tokens);
        check_liveness(&outcome.tokens, 2.0, 5.0, 9.0);
        check_healed(&outcome);
    }
}

#[test]
fn another_model_is_never_mixed_in() {
    for seed in SEEDS {
        let other = fixtures::tiny_model("qwen3moe");
        let script = [
            (secs(2.0), Event::Crash),
            (secs(2.5), Event::Restart(other)),
            (secs(9.0), Event::Crash),
            (secs(9.5), Event::Restart(fixtures::demo_model())),
        ];
        let outcome = run(seed, secs(20.0), &script);
        check_safety(&outcome.tokens);
        let refused = between(&outcome.tokens, 3.0, 9.0);
        assert!(refused.iter().all(|seen| seen.token.tally.remote == 0), "nothing came from it");
        let says_so =
            |o: &&Observed| o.token.fault.as_ref().is_some_and(|f| f.contains("another model"));
        assert!(refused.iter().any(says_so), "the reason is said");
        check_whole(&outcome.tokens, 11.5, 20.0);
        check_healed(&outcome);
    }
}

#[test]
fn flapping_degrades_and_heals() {
    for seed in SEEDS {
        let flaps = (0..10).flat_map(|i| {
            let at = 2.0 + 0.6 * f64::from(i);
            [(secs(at), Event::Partition), (secs(at + 0.3), Event::Repair)]
        });
        let outcome = run(seed, secs(20.0), &flaps.collect::<Vec<_>>());
        check_safety(&outcome.tokens);
        check_whole(&outcome.tokens, 0.0, 1.9);
        // Hysteresis asks a link that flapped for more good probes, but not for longer.
        check_whole(&outcome.tokens, 10.0, 20.0);
        check_healed(&outcome);
    }
}
