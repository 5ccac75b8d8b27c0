use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use super::*;

/// A name service whose answers the test decides.
#[derive(Clone, Default)]
struct Names(Arc<Mutex<BTreeMap<String, Vec<&'static str>>>>);

impl Names {
    fn say(&self, host: &str, places: &[&'static str]) {
        self.0.lock().unwrap().insert(host.to_owned(), places.to_vec());
    }

    fn sources(&self, servers: &[&str]) -> Sources {
        let names = self.0.clone();
        let dial = Dial::new(|endpoint| endpoint.connect_lazy()).resolving(move |host, port| {
            let found = names.lock().unwrap().get(&host).cloned();
            async move {
                let places = found.ok_or_else(|| io::Error::other("no such name"))?;
                Ok(places.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), port)).collect())
            }
        });
        let servers: Vec<String> = servers.iter().map(|server| (*server).to_owned()).collect();
        Sources::new(&servers, dial).unwrap()
    }
}

fn told(sources: &Sources) -> Vec<String> {
    sources.known().iter().map(Address::to_string).collect()
}

#[tokio::test]
async fn every_address_of_a_name_is_a_server_and_the_last_ones_stay() {
    let names = Names::default();
    let mut sources = names.sources(&["10.1.1.1:7", "https://experts:70", "localhost:7"]);
    assert!(sources.may_change());
    assert_eq!(told(&sources), ["10.1.1.1:7", "localhost:7"], "nobody was asked yet");
    sources.look().await;
    assert_eq!(told(&sources), ["10.1.1.1:7", "localhost:7"], "there is no such name");
    let unfound = |sources: &Sources| {
        let unfound = sources.unfound().into_iter();
        unfound.map(|Unfound { server, why }| format!("{server}: {why}")).collect::<Vec<_>>()
    };
    let why = "https://experts:70: the name does not resolve: no such name";
    assert_eq!(unfound(&sources), [why]);

    names.say("experts", &["10.0.0.1", "10.0.0.2"]);
    sources.look().await;
    let two = [
        "10.1.1.1:7",
        "https://experts:70 (10.0.0.1)",
        "https://experts:70 (10.0.0.2)",
        "localhost:7",
    ];
    assert_eq!(told(&sources), two);
    assert_eq!(sources.known()[1].at, Some("10.0.0.1:70".parse().unwrap()));

    names.say("experts", &[]);
    sources.look().await;
    assert_eq!(told(&sources), two, "an empty answer changes nothing");
    names.0.lock().unwrap().clear();
    sources.look().await;
    assert_eq!(told(&sources), two, "nor does a failure");
    assert!(unfound(&sources).is_empty(), "where it led is known");
    names.say("experts", &["10.0.0.3"]);
    sources.look().await;
    assert_eq!(told(&sources)[1..2], ["https://experts:70 (10.0.0.3)"]);
}

#[tokio::test]
async fn a_server_with_addresses_of_both_families_is_one() {
    let names = Names::default();
    let mut sources = names.sources(&["one:7", "three:7"]);
    names.say("one", &["fd00::1", "10.0.0.1"]);
    names.say("three", &["fd00::1", "10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    sources.look().await;
    let expected = ["one:7", "three:7 (10.0.0.1)", "three:7 (10.0.0.2)", "three:7 (10.0.0.3)"];
    assert_eq!(told(&sources), expected);
}

#[tokio::test]
async fn a_file_is_read_again_and_a_useless_one_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("servers");
    std::fs::write(&path, "# ours\n10.0.0.1:7\n\n 10.0.0.2:7 \n10.0.0.1:7\n").unwrap();
    let mut sources = Names::default().sources(&[&format!("@{}", path.display())]);
    assert_eq!(told(&sources), ["10.0.0.1:7", "10.0.0.2:7"], "each once");
    std::fs::write(&path, "10.0.0.3:7\n").unwrap();
    sources.look().await;
    assert_eq!(told(&sources), ["10.0.0.3:7"]);
    for useless in ["", "# nobody\n", "10.0.0.3\n"] {
        std::fs::write(&path, useless).unwrap();
        sources.look().await;
        assert_eq!(told(&sources), ["10.0.0.3:7"], "{useless:?}");
    }
    std::fs::remove_file(&path).unwrap();
    sources.look().await;
    assert_eq!(told(&sources), ["10.0.0.3:7"]);
}

#[test]
fn what_is_no_server_is_refused_at_once() {
    let refused = |server: &str| Sources::new(&[server.to_owned()], Dial::default()).unwrap_err();
    for bad in ["experts", "ftp://experts:7", "http://experts", ":", "a b:7"] {
        assert!(matches!(refused(bad), Error::ServerUrl { url, .. } if url == bad), "{bad}");
    }
    let missing = refused("@/nowhere/servers");
    assert!(
        matches!(&missing, Error::ServerFile { path, .. } if path == Path::new("/nowhere/servers"))
    );
}

#[test]
fn where_connections_are_simulated_a_name_is_a_server() {
    let dial = Dial::new(|endpoint| endpoint.connect_lazy());
    let sources = Sources::new(&["server:7".to_owned()], dial).unwrap();
    assert!(!sources.may_change());
    assert_eq!(told(&sources), ["server:7"]);
}
