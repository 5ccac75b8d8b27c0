//! TLS: who proves who it is to whom, and certificates that change.

mod common;

use std::process::Command;
use std::time::Duration;

use common::*;
use outrigger_experts::Model;
use outrigger_proto::v1::experts_client::ExpertsClient;
use outrigger_proto::v1::{DescribeRequest, Encoding};
use outrigger_server::{ExpertServer, Result, Tls, bind};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use tokio::task::JoinSet;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

/// An authority, and the certificates that it signs for `localhost`.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { pem, issuer: Issuer::new(params, key) }
    }

    /// A certificate and its key.
    fn pair(&self) -> (String, String) {
        self.pair_until(2100)
    }

    /// One that expires when this year begins.
    fn pair_until(&self, year: i32) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.not_after = date_time_ymd(year, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    fn identity(&self) -> Identity {
        let (certificate, key) = self.pair();
        Identity::from_pem(certificate, key)
    }
}

/// From files, which are gone afterwards: that changes nothing.
fn tls(certificate: &str, key: &str, client_ca: Option<&str>) -> Result<Tls> {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, pem: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, pem).unwrap();
        path
    };
    let client_ca = client_ca.map(|pem| write("ca.pem", pem));
    Tls::read(&write("cert.pem", certificate), &write("key.pem", key), client_ca.as_deref())
}

#[tokio::test(flavor = "multi_thread")]
async fn with_an_authority_for_devices_only_its_own_come_in() {
    let (ours, other) = (Authority::new(), Authority::new());
    let (certificate, key) = ours.pair();
    let tls = tls(&certificate, &key, Some(&ours.pem)).unwrap();
    let server = ExpertServer::open(config(&demo())).unwrap();
    let metrics = server.metrics();
    let incoming = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let url = format!("https://localhost:{}", incoming.local_addr().unwrap().port());
    tokio::spawn(server.serve(incoming, Some(tls), std::future::pending()));
    let call = async |identity: Option<Identity>| {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&ours.pem));
        let tls = match identity {
            Some(identity) => tls.identity(identity),
            None => tls,
        };
        let endpoint = Endpoint::from_shared(url.clone()).unwrap().tls_config(tls).unwrap();
        let mut client = ExpertsClient::new(endpoint.timeout(LONG).connect().await.ok()?);
        client.describe(DescribeRequest {}).await.ok()
    };
    assert!(call(Some(ours.identity())).await.is_some());
    assert_eq!(metric(&metrics, "tls_handshakes_failed_total"), 0.0);
    assert!(call(Some(other.identity())).await.is_none());
    assert!(call(None).await.is_none());
    eventually(|| metric(&metrics, "tls_handshakes_failed_total") >= 2.0).await;

    // The load generator is such a device.
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = ours.pair();
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-server"));
    command.args(["load", "--devices", "1", "--seconds", "1", "--server", &url]);
    for (flag, pem) in [("tls-ca", &ours.pem), ("tls-cert", &certificate), ("tls-key", &key)] {
        let path = directory.path().join(flag);
        std::fs::write(&path, pem).unwrap();
        command.arg(format!("--{flag}")).arg(path);
    }
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_shown_and_a_broken_one_is_not() {
    let (old, new) = (Authority::new(), Authority::new());
    let directory = tempfile::tempdir().unwrap();
    let (cert, key) = (directory.path().join("tls.crt"), directory.path().join("tls.key"));
    let write = |(certificate, its_key): (String, String)| {
        std::fs::write(&cert, certificate).unwrap();
        std::fs::write(&key, its_key).unwrap();
    };
    write(old.pair());
    let tls = Tls::read(&cert, &key, None).unwrap();
    let server = ExpertServer::open(config(&demo())).unwrap();
    let metrics = server.metrics();
    let incoming = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let url = format!("https://localhost:{}", incoming.local_addr().unwrap().port());
    tokio::spawn(server.serve(incoming, Some(tls), std::future::pending()));
    let connects = async |authority: &Authority| {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&authority.pem));
        let endpoint = Endpoint::from_shared(url.clone()).unwrap().tls_config(tls).unwrap();
        endpoint.timeout(LONG).connect().await.is_ok()
    };
    assert!(connects(&old).await && !connects(&new).await);

    // The key of another certificate: half of a renewal, or an accident.
    std::fs::write(&key, new.pair().1).unwrap();
    eventually(|| metric(&metrics, "certificate_stale") == 1.0).await;
    assert!(connects(&old).await);

    write(new.pair());
    eventually(|| metric(&metrics, "certificate_stale") == 0.0).await;
    assert!(connects(&new).await && !connects(&old).await);

    // One that is worse than what there is.
    let not_after = || metric(&metrics, "certificate_not_after_timestamp_seconds");
    assert_eq!(not_after(), 4_102_444_800.0);
    write(new.pair_until(2020));
    eventually(|| metric(&metrics, "certificate_stale") == 1.0).await;
    assert!(connects(&new).await && not_after() == 4_102_444_800.0);

    write(new.pair_until(2101));
    eventually(|| metric(&metrics, "certificate_stale") == 0.0).await;
    assert!(connects(&new).await && not_after() == 4_133_980_800.0);
}

/// One thread for all handlers: one that computed for its device alone would keep the others from being read.
#[tokio::test]
async fn devices_share_batches_over_tls_too() {
    const DEVICES: u64 = 4;
    const CALLS: u64 = 25;
    let authority = Authority::new();
    let (certificate, key) = authority.pair();
    let tls = tls(&certificate, &key, None).unwrap();
    let model = Model::open(&demo()).unwrap();
    let server = ExpertServer::open(config(&demo())).unwrap();
    let metrics = server.metrics();
    let incoming = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let url = format!("https://localhost:{}", incoming.local_addr().unwrap().port());
    tokio::spawn(server.serve(incoming, Some(tls), std::future::pending()));
    let mut devices = JoinSet::new();
    for seed in 0..DEVICES {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&authority.pem));
        let endpoint = Endpoint::from_shared(url.clone()).unwrap().tls_config(tls).unwrap();
        let mut client = ExpertsClient::new(endpoint.timeout(LONG).connect().await.unwrap());
        let request = Job::random(&model, 0, 1, 4, seed).request(&model, Encoding::Q80);
        devices.spawn(async move {
            for _ in 0..CALLS {
                client.forward(request.clone()).await.unwrap();
            }
        });
    }
    while let Some(done) = devices.join_next().await {
        done.unwrap();
    }
    let (rows, batches) = (metric(&metrics, "rows_total"), metric(&metrics, "batches_total"));
    assert_eq!(rows, (DEVICES * CALLS) as f64);
    assert!(batches < rows, "{batches} batches of {rows} rows");
}

async fn eventually(done: impl Fn() -> bool) {
    let waiting = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(LONG, waiting).await.expect("it comes");
}

#[test]
fn what_is_no_certificate_is_named() {
    let (certificate, key) = Authority::new().pair();
    let (_, another) = Authority::new().pair();
    let error = |cert, key, ca| tls(cert, key, ca).unwrap_err().to_string();
    for (error, begins, file) in [
        (error("", &key, None), "TLS: the certificate /", "/cert.pem: no certificate in it"),
        (error(&certificate, "", None), "TLS: the key /", "/key.pem: "),
        (
            error(&certificate, &key, Some("-----BEGIN")),
            "TLS: the devices' authority /",
            "/ca.pem: ",
        ),
        (error(&certificate, &another, None), "TLS: the certificate /", "/cert.pem with the key /"),
    ] {
        assert!(error.starts_with(begins) && error.contains(file), "{error}");
    }
    let directory = tempfile::tempdir().unwrap();
    let gone = directory.path().join("gone.pem");
    let error = Tls::read(&gone, &gone, None).unwrap_err().to_string();
    assert_eq!(error, format!("cannot read {}", gone.display()));
}
