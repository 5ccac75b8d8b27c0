//! What documents say of the code is so.

use std::path::{Path, PathBuf};

use outrigger::simulate::{Scenario, run};
use outrigger_tests::fixtures::repository;

/// Every file below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).expect("a directory").map(|e| e.expect("an entry"));
    let below = |path: PathBuf| if path.is_dir() { files(&path) } else { vec![path] };
    entries.map(|entry| entry.path()).flat_map(below).collect()
}

/// `file.rs::beginning_of_a_name…`, where a name in full ends without the dots, and a file alone.
#[test]
fn every_test_that_faults_md_names_is_there() {
    let sources: Vec<PathBuf> = ["router/src", "experts/tests", "client", "server", "tests"]
        .into_iter()
        .flat_map(|directory| files(&repository(directory)))
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect();
    let text = std::fs::read_to_string(repository("docs/faults.md")).expect("it is there");
    let (mut file, mut names) = (String::new(), 0);
    for quoted in text
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|quoted| quoted.contains(".rs") || quoted.starts_with('…'))
    {
        let (path, name) = quoted.split_once("::").unwrap_or((quoted, ""));
        if path != "…" {
            file = path.trim_start_matches("…/").to_owned();
        }
        let begins = match name.strip_suffix('…') {
            Some(begins) => format!("fn {begins}"),
            None if name.is_empty() => String::new(),
            None => format!("fn {name}("),
        };
        let found = sources
            .iter()
            .filter(|path| path.ends_with(&file))
            .any(|path| std::fs::read_to_string(path).expect("a source").contains(&begins));
        assert!(found, "`{quoted}`: no such test");
        names += 1;
    }
    assert!(names > 50, "{names} are named");
}

/// From the repository's root, as it stands.
#[test]
fn the_scenario_that_simulator_md_shows_happens() {
    let text = std::fs::read_to_string(repository("docs/simulator.md")).expect("it is there");
    let (_, shown) = text.split_once("```toml\n").expect("a scenario");
    let (shown, _) = shown.split_once("```").expect("its end");
    let scenario = Scenario::parse(shown, &repository("tunnel.toml")).expect("it is well formed");
    let run = run(&scenario, |_| ()).expect("it goes on");
    assert!(run.text.starts_with("Once upon a time") && run.rows.len() > 100, "{}", run.text);
}
