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
    until_up(&engine, &[first, second.clone()]).await;
    assert_eq!(session.step().await.expect("a token").coverage, 1.0);

    fs::write(&list, &second).expect("it is written");
    until_up(&engine, &[second]).await;
    drop(one);
    for _ in 0..3 {
        assert_eq!(session.step().await.expect("a token").coverage, 1.0);
    }
}
