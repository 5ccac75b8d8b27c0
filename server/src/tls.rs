//! TLS: the server's certificate and, for mutual TLS, the authority of the devices' certificates.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::signal::unix::Signal;
use tokio::task::JoinSet;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{self, RootCertStore};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::{Stream, StreamExt as _};
use x509_parser::parse_x509_certificate;
use x509_parser::time::ASN1Time;

use crate::connection::Limited;
use crate::metrics::Metrics;
use crate::seldom::Seldom;
use crate::watch;
use crate::{Error, Result};

/// A certificate that expires within this time is in the log when it comes into force.
const EXPIRES_SOON: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// What the server shows to devices, and what it asks them for.
#[derive(Clone, Debug)]
pub struct Tls {
    now: Arc<RwLock<Settings>>,
    files: Files,
}

/// As PEM, beside what they come to.
#[derive(Clone, Debug)]
struct Settings {
    pem: Pem,
    /// Until when the certificate counts.
    not_after: ASN1Time,
    config: Arc<rustls::ServerConfig>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Pem {
    certificate: Part,
    key: Part,
    client_ca: Option<Part>,
}

/// One of them, with what it is in words and its file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    what: String,
    bytes: Vec<u8>,
}

#[derive(Clone, Debug)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

impl Tls {
    /// From files in PEM: a certificate chain, its key and, if devices must show certificates too, the authority of
    /// those. They are read again every 2 s while a server serves, and at SIGHUP: connections from then on see what
    /// they have. Files that cannot be used change nothing.
    ///
    /// # Errors
    /// [`Error::File`] for one that cannot be read, [`Error::Tls`] for what is no PEM of its kind, or a key that is not
    /// the certificate's.
    pub fn read(certificate: &Path, key: &Path, client_ca: Option<&Path>) -> Result<Tls> {
        let (certificate, key) = (certificate.to_owned(), key.to_owned());
        let files = Files { certificate, key, client_ca: client_ca.map(Path::to_owned) };
        let settings = Settings::new(files.read()?)?;
        settings.log_expiry();
        Ok(Tls { now: Arc::new(RwLock::new(settings)), files })
    }

    /// Follows the files. Never returns.
    pub(crate) async fn watch(self, hangup: Signal, metrics: Arc<Metrics>) -> Infallible {
        let tls = self.clone();
        // The same files keep their settings, and with them the sessions that devices may resume.
        let read = move || {
            let pem = tls.files.read()?;
            let now = tls.now.read().expect("nothing panics under this lock");
            if now.pem == pem { Ok(None) } else { now.successor(pem).map(Some) }
        };
        let tell_expiry = |settings: &Settings| {
            metrics.certificate_not_after.set(settings.not_after.timestamp());
        };
        tell_expiry(&self.now.read().expect("nothing panics under this lock"));
        let adopt = |fresh: Option<Settings>| {
            let changed = fresh.is_some();
            if let Some(fresh) = fresh {
                tell_expiry(&fresh);
                fresh.log_expiry();
                *self.now.write().expect("nothing panics under this lock") = fresh;
            }
            changed
        };
        let (file, stale) = (&self.files.certificate, &metrics.certificate_stale);
        watch::watch(file, hangup, stale, read, adopt).await
    }

    /// The connections of `incoming` that came to terms, handshakes side by side.
    pub(crate) fn accept<IO>(
        self,
        incoming: impl Stream<Item = Limited<IO>> + Send + 'static,
        metrics: Arc<Metrics>,
    ) -> impl Stream<Item = TlsStream<Limited<IO>>>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (shaken, accepted) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            let mut incoming = std::pin::pin!(incoming);
            let (mut handshakes, failures) = (JoinSet::new(), Seldom::default());
            while !shaken.is_closed() {
                tokio::select! {
                    next = incoming.next() => match next {
                        Some(io) => {
                            let (peer, handshake) = (io.peer(), self.acceptor().accept(io));
                            handshakes.spawn(async move { handshake.await.map_err(|e| (peer, e)) });
                        }
                        None => break,
                    },
                    Some(Ok(done)) = handshakes.join_next() => match done {
                        // Nobody takes it where the server has ended.
                        Ok(io) => { let _ = shaken.send(io).await; }
                        Err((peer, error)) => {
                            metrics.handshakes_failed.inc();
                            log_failure(peer, &error, &failures);
                        }
                    },
                    () = shaken.closed() => break,
                }
            }
        });
        tokio_stream::wrappers::ReceiverStream::new(accepted)
    }

    fn acceptor(&self) -> TlsAcceptor {
        let now = self.now.read().expect("nothing panics under this lock");
        TlsAcceptor::from(now.config.clone())
    }
}

impl Files {
    fn read(&self) -> Result<Pem> {
        let read_ca = |path: &PathBuf| Part::read("the devices' authority", path);
        Ok(Pem {
            certificate: Part::read("the certificate", &self.certificate)?,
            key: Part::read("the key", &self.key)?,
            client_ca: self.client_ca.as_ref().map(read_ca).transpose()?,
        })
    }
}

impl Settings {
    fn new(pem: Pem) -> Result<Settings> {
        let chain = pem.certificate.certificates()?;
        let not_after = match parse_x509_certificate(&chain[0]) {
            Ok((_, certificate)) => certificate.validity().not_after,
            Err(error) => return Err(wrong(&pem.certificate.what, error)),
        };
        let key = PrivateKeyDer::from_pem_slice(&pem.key.bytes);
        let key = key.map_err(|error| wrong(&pem.key.what, error))?;
        let provider = Arc::new(ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("the provider knows them");
        let builder = match &pem.client_ca {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                for certificate in authority.certificates()? {
                    roots.add(certificate).map_err(|error| wrong(&authority.what, error))?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                let verifier = verifier.map_err(|error| wrong(&authority.what, error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let pair = || format!("{} with {}", pem.certificate.what, pem.key.what);
        let config = builder.with_single_cert(chain, key);
        let mut config = config.map_err(|error| wrong(&pair(), error))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Settings { pem, not_after, config: Arc::new(config) })
    }

    /// Those of `pem`, unless they are of less use than these: of a certificate that has expired, where this one has not.
    fn successor(&self, pem: Pem) -> Result<Settings> {
        let (fresh, now) = (Settings::new(pem)?, ASN1Time::now());
        if fresh.not_after < now && now <= self.not_after {
            let found = format!("expired on {}, the one in force has not", fresh.not_after);
            return Err(wrong(&fresh.pem.certificate.what, found));
        }
        Ok(fresh)
    }

    /// Warns of a certificate that has expired, or will soon.
    fn log_expiry(&self) {
        let (certificate, not_after) = (&self.pem.certificate.what, self.not_after);
        match not_after - ASN1Time::now() {
            None => tracing::warn!("{certificate} expired on {not_after}"),
            Some(left) if left < EXPIRES_SOON => {
                tracing::warn!("{certificate} expires on {not_after}")
            }
            Some(_) => {}
        }
    }
}

/// Tells why there is no TLS with a peer, unless it only looked whether the port is open, as load balancers do time and
/// again.
fn log_failure(peer: Option<SocketAddr>, error: &io::Error, failures: &Seldom) {
    let peer = peer.map(tracing::field::display);
    let looked =
        matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset);
    match if looked { None } else { failures.turn() } {
        Some(left_out) => tracing::info!(peer, left_out, %error, "no TLS with a peer"),
        None => tracing::debug!(peer, %error, "no TLS with a peer"),
    }
}

impl Part {
    fn read(what: &str, path: &Path) -> Result<Part> {
        Ok(Part { what: format!("{what} {}", path.display()), bytes: watch::read(path)? })
    }

    /// At least one.
    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>> {
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.bytes).collect();
        match found {
            Ok(found) if !found.is_empty() => Ok(found),
            Ok(_) => Err(wrong(&self.what, "no certificate in it")),
            Err(error) => Err(wrong(&self.what, error)),
        }
    }
}

fn wrong(what: &str, found: impl std::fmt::Display) -> Error {
    Error::Tls { what: what.to_owned(), found: found.to_string() }
}
