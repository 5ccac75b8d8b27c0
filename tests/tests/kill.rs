//! Real processes: the server dies by `kill -9` while it answers, and comes back later.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outrigger::{Budget, Elsewhere, Engine, EngineConfig, Session, Token};
use outrigger_tests::{fixtures, greedy};

const DEADLINE: Duration = Duration::from_secs(2);
const PROMPT: &str = "Once upon a time";

struct ServerProcess {
    child: Child,
    address: SocketAddr,
}

impl ServerProcess {
    /// Starts the real binary and waits until it says where it listens.
    fn start(listen: SocketAddr) -> ServerProcess {
        let mut child = Command::new(binary())
            .arg("-m")
            .arg(fixtures::demo_model())
            .args(["--listen", &listen.to_string(), "-t", "1"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the server starts");
        let out = BufReader::new(child.stdout.take().expect("it is piped"));
        let listening = out.lines().map_while(Result::ok).find_map(|line| {
            line.strip_prefix("listening on ")?.split_whitespace().next()?.parse().ok()
        });
        ServerProcess { child, address: listening.expect("it says where it listens") }
    }

    /// `kill -9`.
    fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it died");
    }
}

/// The server's binary beside this test's own, built if it is not there yet.
fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("this test has a path");
    let profile = test.parent().and_then(|deps| deps.parent()).expect("target/<profile>/deps");
    let binary = profile.join("outrigger-server");
    if !binary.exists() {
        let built = Command::new(env!("CARGO")).args(["build", "-p", "outrigger-server"]).status();
        assert!(built.is_ok_and(|status| status.success()), "the server builds");
    }
    binary
}

/// Generates until `done` says so of a token, and returns all tokens.
async fn generate(session: &mut Session, mut done: impl FnMut(&Token) -> bool) -> Vec<Token> {
    let started = Instant::now();
    let mut tokens = Vec::new();
    loop {
        assert!(started.elapsed() < Duration::from_secs(20), "what was waited for did not happen");
        if session.len() + 1 >= 500 {
            session.truncate(0);
            session.push_text(PROMPT).expect("it fits");
        }
        tokens.push(session.step().await.expect("a token"));
        if done(tokens.last().expect("just pushed")) {
            return tokens;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_costs_coverage_and_nothing_else() {
    let server = ServerProcess::start(SocketAddr::from(([127, 0, 0, 1], 0)));
    let address = server.address;
    let mut config = EngineConfig::new(fixtures::demo_model());
    config.servers = vec![address.to_string()];
    config.expert_cache = Budget::Fraction(0.25);
    config.elsewhere = Elsewhere::Absent;
    config.deadline = DEADLINE;
    let engine = Engine::open(config).await.expect("it opens");
    assert!(engine.wait_connected(Duration::from_secs(10)).await, "the server is up");
    let mut session = greedy(&engine);
    session.push_text(PROMPT).expect("it fits");

    let mut count = 0;
    let connected = generate(&mut session, |_| {
        count += 1;
        count == 20
    });
    for token in connected.await {
        assert_eq!(token.coverage, 1.0, "{token:?}");
    }

    // The process dies on another thread while tokens are being made.
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        server.kill();
    });
    let mut lost = 0;
    let dying = generate(&mut session, |token| {
        lost += u32::from(token.coverage < 1.0);
        lost == 20
    })
    .await;
    killer.join().expect("it was killed");
    for token in &dying {
        // Scheduling noise comes on top of the deadline; an unbounded wait would be far beyond it.
        assert!(token.elapsed < DEADLINE * 4, "{token:?}");
        assert_eq!(token.coverage == 1.0, token.tally.missing == 0, "{token:?}");
    }
    assert!(dying.last().is_some_and(|token| token.provisional && token.fault.is_some()));

    let server = ServerProcess::start(address);
    // A token may find all of its experts at home by luck: the server must have helped.
    let back =
        generate(&mut session, |token| token.coverage == 1.0 && token.tally.remote > 0).await;
    assert!(back.last().is_some_and(|token| token.provisional), "it rests on what was said alone");
    let healed = session.settle().await.expect("it heals");
    assert_eq!(healed.fault, None, "every expert was reached");
    assert_eq!(session.settled() + 1, session.len(), "all but the pending token is settled");
    server.kill();
}
