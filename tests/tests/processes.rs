//! Real processes and real connections: a server that is killed, frozen or replaced, and a link that goes silent or
//! narrow.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outrigger::proxy::{Conditions, FaultProxy, LinkFault};
use outrigger::{Engine, EngineConfig, LinkState, Session, Token};
use outrigger_tests::process::ServerProcess;
use outrigger_tests::{fixtures, greedy, quarter};

const DEADLINE: Duration = Duration::from_secs(2);
const PROMPT: &str = "Once upon a time";
const ANY_PORT: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// A device with a quarter of the demo model, connected to a server.
async fn device(server: SocketAddr, deadline: Duration) -> (Arc<Engine>, Session) {
    let config = EngineConfig { deadline, ..quarter(vec![server.to_string()]) };
    let engine = Engine::open(config).await.expect("it opens");
    assert!(engine.wait_connected(Duration::from_secs(10)).await, "the server is up");
    let mut session = greedy(&engine);
    session.push_text(PROMPT).expect("it fits");
    (engine, session)
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

/// Generates so many tokens of which `counts` says that they count.
async fn generate_some(
    session: &mut Session,
    count: usize,
    counts: impl Fn(&Token) -> bool,
) -> Vec<Token> {
    let mut left = count;
    let done = |token: &Token| {
        left -= usize::from(counts(token));
        left == 0
    };
    generate(session, done).await
}

/// A token may find all of its experts at home by luck: the server must have helped.
fn helped(token: &Token) -> bool {
    token.coverage == 1.0 && token.tally.remote > 0
}

fn degraded(token: &Token) -> bool {
    token.coverage < 1.0
}

/// Marked, and in time: scheduling noise comes on top of the deadline, but an unbounded wait would be far beyond it.
fn check(tokens: &[Token], deadline: Duration) {
    for token in tokens {
        assert!(token.elapsed < deadline * 4, "{token:?}");
        assert_eq!(token.coverage == 1.0, token.tally.missing == 0, "{token:?}");
        assert_eq!(token.fault.is_some(), token.tally.missing > 0, "{token:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_costs_coverage_and_nothing_else() {
    let server = ServerProcess::start(&fixtures::demo_model(), 0);
    let address = server.address;
    let (_engine, mut session) = device(address, DEADLINE).await;
    for token in generate_some(&mut session, 20, |_| true).await {
        assert_eq!(token.coverage, 1.0, "{token:?}");
    }

    // The process dies on another thread while tokens are being made.
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        drop(server);
    });
    let dying = generate_some(&mut session, 20, degraded).await;
    killer.join().expect("it was killed");
    check(&dying, DEADLINE);
    assert!(dying.last().is_some_and(|token| token.provisional && token.fault.is_some()));

    let _server = ServerProcess::start(&fixtures::demo_model(), address.port());
    let back = generate(&mut session, helped).await;
    assert!(back.last().is_some_and(|token| token.provisional), "it rests on what was said alone");
    let healed = session.settle().await.expect("it heals");
    assert_eq!(healed.fault, None, "every expert was reached");
    assert_eq!(session.settled() + 1, session.len(), "all but the pending token is settled");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_server_is_left_alone_until_it_answers_a_probe() {
    let server = ServerProcess::start(&fixtures::demo_model(), 0);
    let deadline = DEADLINE / 4;
    let (engine, mut session) = device(server.address, deadline).await;
    generate(&mut session, helped).await;

    server.freeze(true);
    // Its system still accepts connections: only silence tells.
    let frozen = generate_some(&mut session, 20, degraded).await;
    check(&frozen, deadline);
    assert_ne!(engine.servers()[0].state, LinkState::Up, "the breaker is open");
    let waited = frozen.iter().filter(|token| token.elapsed >= deadline / 4).count();
    assert!(waited <= 3, "{waited} tokens waited for a server that is left alone");

    server.freeze(false);
    let thawed = generate(&mut session, helped).await;
    check(&thawed, deadline);
    assert_eq!(engine.servers()[0].state, LinkState::Up);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_comes_back_with_another_model_is_refused() {
    let server = ServerProcess::start(&fixtures::demo_model(), 0);
    let address = server.address;
    let (engine, mut session) = device(address, DEADLINE).await;
    generate(&mut session, helped).await;

    drop(server);
    let other = ServerProcess::start(&fixtures::tiny_model("qwen3moe"), address.port());
    let says_so = |token: &Token| token.fault.as_ref().is_some_and(|f| f.contains("another model"));
    let mut tokens = generate(&mut session, says_so).await;
    let refused = tokens.pop().expect("the last one says so");
    assert_eq!(refused.tally.remote, 0, "{refused:?}");
    for token in generate_some(&mut session, 50, |_| true).await {
        assert_eq!(token.tally.remote, 0, "{token:?}");
    }
    assert_ne!(engine.servers()[0].state, LinkState::Up);

    drop(other);
    let _server = ServerProcess::start(&fixtures::demo_model(), address.port());
    generate(&mut session, helped).await;
}

/// A pulled cable: connections stay open, nothing arrives, nobody is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_goes_silent_costs_two_deadlines_and_comes_back() {
    let server = ServerProcess::start(&fixtures::demo_model(), 0);
    let proxy = FaultProxy::start(ANY_PORT, server.address.to_string()).await.expect("a port");
    let deadline = DEADLINE / 4;
    let (engine, mut session) = device(proxy.address(), deadline).await;
    generate(&mut session, helped).await;

    proxy.set(Conditions { state: LinkFault::Silent, ..Conditions::default() });
    let silent = generate_some(&mut session, 20, degraded).await;
    check(&silent, deadline);
    assert_ne!(engine.servers()[0].state, LinkState::Up);

    proxy.set(Conditions::default());
    let back = generate(&mut session, helped).await;
    check(&back, deadline);
}

/// Too narrow for a token's requests within its deadline: few are made, and none is left in the way when the link is
/// wide again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_gets_narrow_is_asked_for_less() {
    let server = ServerProcess::start(&fixtures::demo_model(), 0);
    let proxy = FaultProxy::start(ANY_PORT, server.address.to_string()).await.expect("a port");
    let deadline = DEADLINE / 4;
    let (_engine, mut session) = device(proxy.address(), deadline).await;
    let wide = generate_some(&mut session, 20, helped).await;
    let bytes = |tokens: &[Token]| {
        tokens.iter().map(|token| token.tally.bytes_up).sum::<u64>() / tokens.len() as u64
    };

    proxy.set(Conditions { bandwidth: NonZeroU64::new(1000), ..Conditions::default() });
    let narrow = generate_some(&mut session, 200, degraded).await;
    check(&narrow, deadline);
    assert!(bytes(&narrow) < bytes(&wide) / 4, "{} of {}", bytes(&narrow), bytes(&wide));

    proxy.set(Conditions::default());
    let back = generate(&mut session, helped).await;
    check(&back, deadline);
}
