//! Servers that join and leave while a device decodes: a list of them, and a name that stands for several.

use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use outrigger::{Budget, Elsewhere, Engine, EngineConfig, LinkState};
use outrigger_tests::fixtures::demo_model;
use outrigger_tests::greedy;
use outrigger_tests::loopback::LoopbackServer;
use outrigger_tests::process::ServerProcess;

const LONG: Duration = Duration::from_secs(30);

/// Waits until exactly these servers are there, and up.
async fn until_up(engine: &Engine, addresses: &[String]) {
    let start = Instant::now();
    loop {
        let servers = engine.servers();
        let mut up: Vec<String> = servers
            .iter()
            .filter(|server| server.state == LinkState::Up)
            .map(|server| server.url.clone())
            .collect();
        up.sort_unstable();
        if up == addresses && servers.len() == addresses.len() {
            return;
        }
        assert!(start.elapsed() < LONG, "{servers:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A device without a single expert.
fn config(server: String) -> EngineConfig {
    let mut config = EngineConfig::new(demo_model());
    config.servers = vec![server];
    config.expert_cache = Budget::Bytes(0);
    config.elsewhere = Elsewhere::Absent;
    config.deadline = LONG;
    config.threads = 1;
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_follows_the_list_of_its_servers_without_missing_an_expert() {
    let (one, other) = (
        LoopbackServer::start(&demo_model(), None).await,
        LoopbackServer::start(&demo_model(), None).await,
    );
    let (first, second) = (one.address.to_string(), other.address.to_string());
    let mut both = [first.clone(), second.clone()];
    both.sort_unstable();
    let directory = tempfile::tempdir().expect("a directory");
    let list = directory.path().join("servers");
    fs::write(&list, &first).expect("it is written");

    let engine = Engine::open(config(format!("@{}", list.display()))).await.expect("it opens");
    let mut session = greedy(&engine);
    session.push_text("Once upon a time").expect("it fits");
    until_up(&engine, std::slice::from_ref(&first)).await;
    assert_eq!(session.step().await.expect("a token").coverage, 1.0);

    fs::write(&list, format!("{first}\n{second}\n")).expect("it is written");
    until_up(&engine, &both).await;
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

const NAME: &str = "experts.test";
/// Tells the part of the test that runs where names are what the test says.
const HOSTS: &str = "OUTRIGGER_TEST_HOSTS";

/// A program in a mount namespace where `hosts` is `/etc/hosts`.
fn with_hosts(hosts: &Path, program: impl AsRef<OsStr>, args: &[&str]) -> Command {
    let mut inside = Command::new("unshare");
    inside.args(["-r", "-m", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]);
    inside.arg(hosts).arg(program).args(args);
    inside
}

/// The system's own resolver, real servers, and a name that loses one of two addresses. Where there are no namespaces,
/// this says on standard error that it was skipped, whatever captures its output.
#[test]
fn a_device_follows_the_addresses_of_a_name() {
    if let Some(hosts) = std::env::var_os(HOSTS) {
        let runtime = tokio::runtime::Runtime::new().expect("threads");
        return runtime.block_on(follow_a_name(Path::new(&hosts)));
    }
    let directory = tempfile::tempdir().expect("a directory");
    let hosts = directory.path().join("hosts");
    fs::write(&hosts, format!("127.0.0.2 {NAME}\n127.0.0.3 {NAME}\n")).expect("it is written");
    let found = with_hosts(&hosts, "getent", &["ahostsv4", NAME]).output();
    let found = found.map_or_else(
        |error| error.to_string(),
        |output| String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
    );
    let name = "a_device_follows_the_addresses_of_a_name";
    if !found.contains("127.0.0.2") || !found.contains("127.0.0.3") {
        let _ = writeln!(std::io::stderr(), "SKIPPED {name}: no names of its own: {found}");
        return;
    }
    let test = std::env::current_exe().expect("this test has a path");
    let mut inside = with_hosts(&hosts, test, &["--exact", name, "--nocapture"]);
    let output = inside.env(HOSTS, &hosts).output().expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

async fn follow_a_name(hosts: &Path) {
    let one = ServerProcess::start_at(&demo_model(), ([127, 0, 0, 2], 0).into());
    let port = one.address.port();
    let _other = ServerProcess::start_at(&demo_model(), ([127, 0, 0, 3], port).into());
    let [first, second] = ["127.0.0.2", "127.0.0.3"].map(|ip| format!("{NAME}:{port} ({ip})"));

    let engine = Engine::open(config(format!("{NAME}:{port}"))).await.expect("it opens");
    let mut session = greedy(&engine);
    session.push_text("Once upon a time").expect("it fits");
    until_up(&engine, &[first, second.clone()]).await;
    for _ in 0..8 {
        assert_eq!(session.step().await.expect("a token").coverage, 1.0);
    }
    // The file itself, which is what the namespace has in the place of its own.
    fs::write(hosts, format!("127.0.0.3 {NAME}\n")).expect("it is written");
    until_up(&engine, std::slice::from_ref(&second)).await;
    drop(one);
    for _ in 0..8 {
        assert_eq!(session.step().await.expect("a token").coverage, 1.0);
    }
    // A name that is gone changes nothing, and holds no token up.
    fs::write(hosts, "").expect("it is written");
    let gone = Instant::now();
    while gone.elapsed() < Duration::from_secs(5) {
        assert_eq!(session.step().await.expect("a token").coverage, 1.0);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    until_up(&engine, &[second]).await;
}
