//! TLS between device and server.

use outrigger::{Engine, EngineConfig, Error, TlsIdentity};
use outrigger_server::Tls;
use outrigger_tests::loopback::LoopbackServer;
use outrigger_tests::{first_token, fixtures, quarter};

/// A certificate for `localhost` that vouches for itself, and its key, as PEM.
fn certificate() -> (String, String) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// A server's, from files, which are gone afterwards: that changes nothing.
fn tls(certificate: &str, key: &str, client_ca: Option<&str>) -> Tls {
    let directory = tempfile::tempdir().expect("a directory");
    let write = |name: &str, pem: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, pem).expect("it is written");
        path
    };
    let client_ca = client_ca.map(|pem| write("ca.pem", pem));
    Tls::read(&write("cert.pem", certificate), &write("key.pem", key), client_ca.as_deref())
        .expect("they fit")
}

async fn first_coverage(port: u16, scheme: &str, authority: &str) -> (f32, Option<String>) {
    first_coverage_as(None, port, scheme, authority).await
}

async fn first_coverage_as(
    identity: Option<TlsIdentity>,
    port: u16,
    scheme: &str,
    authority: &str,
) -> (f32, Option<String>) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("ca.pem");
    std::fs::write(&path, authority).expect("it is written");
    let servers = vec![format!("{scheme}://localhost:{port}")];
    let config = EngineConfig { tls_ca: Some(path), tls_identity: identity, ..quarter(servers) };
    let token = first_token(config).await;
    (token.coverage, token.fault)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_server_that_proves_who_it_is_is_asked() {
    let (certificate_pem, key) = certificate();
    let tls = tls(&certificate_pem, &key, None);
    let config = LoopbackServer::config(&fixtures::demo_model());
    let server = LoopbackServer::start_with(config, Some(tls)).await;
    let port = server.address.port();

    let (coverage, fault) = first_coverage(port, "https", &certificate_pem).await;
    assert_eq!(coverage, 1.0, "{fault:?}");
    let (somebody_else, _) = certificate();
    let (coverage, fault) = first_coverage(port, "https", &somebody_else).await;
    let why = fault.expect("it is not asked");
    assert!(coverage < 1.0 && why.contains("invalid peer certificate"), "{why}");
    let (coverage, fault) = first_coverage(port, "http", &certificate_pem).await;
    assert!(coverage < 1.0 && fault.is_some(), "no TLS: {fault:?}");
}

/// At once, and not only when the first server is called.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_are_of_no_use_are_refused() {
    let ((mine, key), (_, foreign)) = (certificate(), certificate());
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("ca.pem");
    let open = async |authority: &str, key: &str| {
        std::fs::write(&path, authority).expect("it is written");
        let config = EngineConfig {
            tls_ca: Some(path.clone()),
            tls_identity: Some(TlsIdentity::from_pem(&mine, key)),
            ..quarter(vec!["https://experts.invalid:7070".to_owned()])
        };
        Engine::open(config).await.map(drop)
    };
    open(&mine, &key).await.expect("both are of use");
    let refused = open(&mine, &foreign).await;
    assert!(matches!(refused, Err(Error::TlsIdentity { .. })), "{refused:?}");
    let refused = open(&key, &key).await;
    assert!(matches!(refused, Err(Error::TlsCa { .. })), "a key is no authority: {refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_asked_who_it_is_shows_its_certificate() {
    let (server_pem, server_key) = certificate();
    let (device_pem, device_key) = certificate();
    let tls = tls(&server_pem, &server_key, Some(&device_pem));
    let config = LoopbackServer::config(&fixtures::demo_model());
    let server = LoopbackServer::start_with(config, Some(tls)).await;
    let port = server.address.port();

    let device = Some(TlsIdentity::from_pem(device_pem, device_key));
    let (coverage, fault) = first_coverage_as(device, port, "https", &server_pem).await;
    assert_eq!(coverage, 1.0, "{fault:?}");
    let (other_pem, other_key) = certificate();
    for stranger in [None, Some(TlsIdentity::from_pem(other_pem, other_key))] {
        let (coverage, fault) = first_coverage_as(stranger, port, "https", &server_pem).await;
        assert!(coverage < 1.0 && fault.is_some(), "{fault:?}");
    }
}
