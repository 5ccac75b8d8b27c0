//! The scenarios that ship with the project, and what must hold in them.

use std::path::Path;
use std::time::Duration;

use outrigger::simulate::{CUT, Input, Row, Run, Scenario, run, sweep, write_sweep};
use outrigger_tests::fixtures::{repository, tiny_model};

/// What the clock's ticks add to a deadline.
const TICKS: Duration = Duration::from_millis(5);

fn scenario(name: &str) -> Scenario {
    let path = repository("tests/scenarios").join(name).with_extension("toml");
    Scenario::read(&path).expect("it is well formed")
}

/// Lets a scenario happen and checks what holds whatever happens.
fn happen(name: &str) -> Run {
    let scenario = scenario(name);
    let run = run(&scenario, |_| ()).expect("it goes on");
    assert!(run.rows.len() > 100, "{} tokens", run.rows.len());
    let deadline = scenario.device.deadline.0;
    for row in &run.rows {
        // A prompt is a batch, and waits longer in proportion.
        assert!(row.waited <= deadline * row.rows.div_ceil(8) + TICKS, "{row:?}");
        assert!(row.coverage == 1.0 || (row.provisional && row.tally.missing > 0), "{row:?}");
        assert_eq!(row.provisional, row.settled < row.computed, "{row:?}");
        if !row.provisional {
            // What rests on nothing but settled rows is the full model's, bit for bit.
            assert_eq!(row.coverage, 1.0, "{row:?}");
            assert_eq!((row.nll, row.distance.kl), (row.nll_full, 0.0), "{row:?}");
        }
    }
    assert!(run.rows.is_sorted_by_key(|row| row.settled), "what is settled stays so");
    run
}

/// Rows that were asked for in an interval, in seconds.
fn between(run: &Run, from: f64, to: f64) -> Vec<&Row> {
    let (from, to) = (Duration::from_secs_f64(from), Duration::from_secs_f64(to));
    let rows: Vec<_> = run.rows.iter().filter(|row| row.asked >= from && row.asked < to).collect();
    assert!(!rows.is_empty(), "no token between {from:?} and {to:?}");
    rows
}

fn all_settled(run: &Run, from: f64, to: f64) {
    for row in between(run, from, to) {
        assert!(!row.provisional && row.coverage == 1.0, "{row:?}");
    }
}

/// Without the server every token is marked, and nothing comes from outside.
fn all_alone(run: &Run, from: f64, to: f64) {
    for row in between(run, from, to) {
        assert!(row.provisional && row.tally.remote == 0, "{row:?}");
    }
}

fn mean_coverage(rows: &[&Row]) -> f64 {
    rows.iter().map(|row| f64::from(row.coverage)).sum::<f64>() / rows.len() as f64
}

#[test]
fn in_tunnels_the_text_goes_on_and_heals_behind_them() {
    let run = happen("train-tunnels");
    all_settled(&run, 0.0, 11.5);
    all_alone(&run, 13.0, 17.0);
    all_settled(&run, 27.0, 30.0);
    all_alone(&run, 39.0, 43.0);
    all_settled(&run, 57.0, 60.0);
    let tunnel = between(&run, 13.0, 17.0);
    assert!(tunnel.iter().any(|row| row.coverage < 0.7), "the tunnel shows");
    assert!(tunnel.iter().all(|row| row.link == CUT));
    assert!(run.summary().ppl_ratio.expect("it reads a text") > 1.0);
}

#[test]
fn on_a_flight_the_story_goes_on() {
    let run = happen("flight");
    all_settled(&run, 0.0, 9.5);
    all_alone(&run, 12.0, 28.0);
    let (gate, air) = (between(&run, 0.0, 9.5), between(&run, 12.0, 28.0));
    // Alone, the device waits for nobody.
    assert!(air.iter().all(|row| row.waited.is_zero()));
    assert!(air.len() as f64 / 16.0 > gate.len() as f64 / 9.5);
    all_settled(&run, 57.0, 60.0);
    assert!(run.text.starts_with("Once upon a time there was a king"), "{}", run.text);
    // The text is what the device finds likely: its perplexity says nothing.
    let summary = run.summary();
    assert_eq!([summary.ppl, summary.ppl_full, summary.ppl_ratio], [None; 3]);
    assert!(summary.acceptance < 1.0 && summary.kl > 0.0, "{summary:?}");
}

#[test]
fn jitter_costs_some_experts_and_no_token() {
    let run = happen("cafe-wifi");
    all_settled(&run, 0.0, 11.5);
    let noon = between(&run, 12.0, 28.0);
    assert!(noon.iter().any(|row| row.tally.missing > 0), "noon shows");
    assert!(noon.iter().any(|row| row.tally.remote > 0), "the server is still used");
    let evening = mean_coverage(&between(&run, 38.0, 45.0));
    assert_eq!(evening, 1.0);
}

#[test]
fn a_hand_over_is_over_soon() {
    let run = happen("mobile-handover");
    all_settled(&run, 0.0, 11.5);
    assert!(mean_coverage(&between(&run, 12.5, 13.2)) < 0.9, "the hand-over shows");
    // Whole again within two seconds of the new link.
    for (from, to) in [(15.2, 24.0), (27.4, 33.0), (38.0, 45.0)] {
        assert_eq!(mean_coverage(&between(&run, from, to)), 1.0, "from {from} s on");
    }
    all_settled(&run, 42.0, 45.0);
}

#[test]
fn a_server_may_be_stopped_or_die_and_be_started_again() {
    let run = happen("server-redeploy");
    all_settled(&run, 0.0, 9.5);
    all_alone(&run, 10.5, 13.0);
    all_settled(&run, 23.0, 25.5);
    all_alone(&run, 26.5, 30.0);
    all_settled(&run, 42.0, 45.0);
}

#[test]
fn the_same_seed_gives_the_same_files_and_another_one_others() {
    let written = |seed: u64, to: &Path| {
        let mut scenario = scenario("cafe-wifi");
        scenario.seed = seed;
        scenario.length.0 = Duration::from_secs(16);
        run(&scenario, |_| ()).expect("it goes on").write(to).expect("the files are written");
        ["tokens.csv", "summary.json", "timeline.svg", "timeline.png"]
            .map(|file| std::fs::read(to.join(file)).expect("it was written"))
    };
    let directory = tempfile::tempdir().expect("a directory");
    let first = written(1, &directory.path().join("first"));
    assert!(first == written(1, &directory.path().join("second")), "the files differ");
    let other = written(2, &directory.path().join("other"));
    assert!(first.iter().zip(&other).all(|(one, another)| one != another));
}

#[test]
fn a_device_with_another_models_file_is_refused() {
    let mut scenario = scenario("flight");
    scenario.device.pack = Some(tiny_model("qwen3moe"));
    let error = run(&scenario, |_| ()).expect_err("it is another model").to_string();
    assert!(error.contains("qwen3moe") && error.contains("demo.gguf"), "{error}");
    scenario.input = Input::Text("It was the best of times".to_owned());
    let error = sweep(&scenario, &"cache=50%".parse().expect("a share"), |_| ());
    let error = error.expect_err("it has no cache").to_string();
    assert!(error.starts_with("device.pack: a sweep varies the expert cache"), "{error}");
}

#[test]
fn a_sweep_compares_policies_at_each_budget() {
    let mut scenario = scenario("train-tunnels");
    let Input::Text(text) = &mut scenario.input else { panic!("a text") };
    let end = text.char_indices().nth(600).expect("it is long").0;
    text.truncate(end);
    let budgets = "cache=25%,100%".parse().expect("it is well formed");
    let points = sweep(&scenario, &budgets, |_| ()).expect("it goes on");
    assert_eq!(points.len(), 6);
    for point in &points {
        let whole = point.cache == 1.0;
        assert_eq!(point.coverage == 1.0, whole, "{point:?}");
        assert_eq!(point.kl == 0.0, whole, "{point:?}");
        assert_eq!(point.ppl_ratio == 1.0, whole, "{point:?}");
        assert!(point.acceptance < 1.0 || whole, "{point:?}");
    }
    let directory = tempfile::tempdir().expect("a directory");
    write_sweep(&scenario, &points, directory.path()).expect("it is written");
    for file in ["sweep.csv", "sweep.svg", "sweep.png"] {
        assert!(directory.path().join(file).metadata().expect("it was written").len() > 100);
    }
}

/// Neither the scenario's length nor the time that its device computes ends it before, and a longer text is cut.
#[test]
fn a_sweep_scores_the_whole_second_half_of_what_the_context_holds() {
    let mut scenario = scenario("train-tunnels");
    scenario.model = tiny_model("olmoe");
    scenario.length.0 = Duration::from_secs(1);
    let points = sweep(&scenario, &"cache=50%".parse().expect("a share"), |_| ());
    for point in points.expect("it goes on") {
        assert_eq!(point.tokens, 128 / 2, "{point:?}");
    }
}
