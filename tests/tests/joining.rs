//! Servers that join and leave while a device decodes.

use std::fs;
use std::time::{Duration, Instant};

use outrigger::{Budget, Elsewhere, Engine, EngineConfig, LinkState};
use outrigger_tests::fixtures::demo_model;
use outrigger_tests::greedy;
use outrigger_tests::loopback::LoopbackServer;

const LONG: Duration = Duration::from_secs(30);

/// Waits until exactly these servers are up.
async fn until_up(engine: &Engine, addresses: &[String]) {
    let start = Instant::now();
    loop {
        let servers = engine.servers();
        let up = servers.iter().filter(|server| server.state == LinkState::Up);
        if up.map(|server| server.url.clone()).eq(addresses.iter().cloned())
            && servers.len() == addresses.len()
        {
            return;
        }
        assert!(start.elapsed() < LONG, "{servers:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_follows_the_list_of_its_servers_without_missing_an_expert() {
    let (one, other) = (
        LoopbackServer::start(&demo_model(), None).await,
        LoopbackServer::start(&demo_model(), None).await,
    );
    let (first, second) = (one.address.to_string(), other.address.to_string());
    let directory = tempfile::tempdir().expect("a directory");
    let list = directory.path().join("servers");
    fs::write(&list, &first).expect("it is written");

    let mut config = EngineConfig::new(demo_model());
    config.servers = vec![format!("@{}", list.display())];
    config.expert_cache = Budget::Bytes(0);
    config.elsewhere = Elsewhere::Absent;
    config.deadline = LONG;
    config.threads = 1;
    let engine = Engine::open(config).await.expect("it opens");
    let mut session = greedy(&engine);
    session.push_text("Once upon a time").expect("it fits");
    until_up(&engine, std::slice::from_ref(&first)).await;
    assert_eq!(session.step().await.expect("a token").coverage, 1.0);

    fs::write(&list, format!("{first}\n{second}\n")).expect("it is written");
    until_up(&engine, &[first.clone(), second.clone()]).await;
    assert_eq!(session.step().await.expect("a token").coverage, 1.0);

    fs::write(&list, &second).expect("it is written");
    until_up(&engine, std::slice::from_ref(&second)).await;
    drop(one);
    for _ in 0..3 {
        assert_eq!(session.step().await.expect("a token").coverage, 1.0);
    }

    let text = engine.metrics();
    let value = |name: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} in {text}")).parse().expect("a number")
    };
    assert_eq!(
        (value("outrigger_tokens_total"), value("outrigger_tokens_provisional_total")),
        (5.0, 0.0)
    );
    assert_eq!((value("outrigger_coverage_sum"), value("outrigger_coverage_count")), (5.0, 5.0));
    let calls = |place: &str| value(&format!("outrigger_expert_calls_total{{place=\"{place}\"}}"));
    assert!(calls("remote") > 0.0 && calls("local") == 0.0 && calls("missing") == 0.0, "{text}");
    let trips =
        |server: &str| value(&format!("outrigger_round_trip_seconds_count{{server=\"{server}\"}}"));
    assert!(trips(&first) > 0.0 && trips(&second) > 0.0, "{text}");
    assert_eq!(value(&format!("outrigger_link_up{{server=\"{second}\"}}")), 1.0);
    assert!(!text.contains(&format!("outrigger_link_up{{server=\"{first}\"}}")), "it has left");
    assert!(
        value("outrigger_sent_bytes_total") > 0.0 && value("outrigger_received_bytes_total") > 0.0
    );
}
