//! Where servers are found: addresses, names of which every address is a server, and files that list those.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::Uri;

use crate::config::Dial;
use crate::error::{Error, Result};

/// How long a name may take to resolve.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// One server: the address as it was given, and where that name led.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Address {
    pub(super) uri: OrderedUri,
    /// Where to connect, if the name stands for several servers or for one that may move.
    pub(super) at: Option<SocketAddr>,
}

/// A checked URL, which compares as text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct OrderedUri(String);

/// All that was configured, and what was last known of it.
#[derive(Debug)]
pub(super) struct Sources {
    urls: Vec<OrderedUri>,
    files: Vec<Listing>,
    /// What names led to.
    resolved: BTreeMap<OrderedUri, Vec<SocketAddr>>,
    dial: Dial,
}

/// A file that lists servers, and what it said when it was last of use.
#[derive(Debug)]
struct Listing {
    path: PathBuf,
    urls: Vec<OrderedUri>,
    /// Whether it was of use when it was last looked at.
    sound: bool,
}

impl Sources {
    /// Checks what was configured: URLs, and `@FILE` for a file of them.
    ///
    /// # Errors
    /// An address that is none, or a file that cannot be read.
    pub(super) fn new(servers: &[String], dial: Dial) -> Result<Sources> {
        let (mut urls, mut files) = (Vec::new(), Vec::new());
        for server in servers {
            match server.strip_prefix('@') {
                None => urls.push(OrderedUri::parse(server)?),
                Some(path) => {
                    let path = PathBuf::from(path);
                    files.push(Listing { urls: read(&path)?, path, sound: true });
                }
            }
        }
        Ok(Sources { urls, files, resolved: BTreeMap::new(), dial })
    }

    /// Whether looking again could ever tell something else.
    pub(super) fn may_change(&self) -> bool {
        !self.files.is_empty() || self.listed().any(|uri| self.dial.resolves(&uri.parts().0))
    }

    /// The servers as far as they are known, in the order of the configuration, each once.
    pub(super) fn known(&self) -> Vec<Address> {
        let mut known = Vec::new();
        for uri in self.listed() {
            let places: Vec<Option<SocketAddr>> = match self.dial.resolves(&uri.parts().0) {
                true => self.resolved.get(uri).into_iter().flatten().map(|&at| Some(at)).collect(),
                false => vec![None],
            };
            for at in places {
                let address = Address { uri: uri.clone(), at };
                if !known.contains(&address) {
                    known.push(address);
                }
            }
        }
        known
    }

    /// Reads the files and resolves the names again. What fails, or is empty, is as it was last.
    pub(super) async fn look(&mut self) {
        for file in &mut self.files {
            let sound = match read(&file.path) {
                Ok(urls) if !urls.is_empty() => {
                    file.urls = urls;
                    true
                }
                _ => false,
            };
            if file.sound && !sound {
                tracing::warn!(
                    "{}: lists no servers any more; the last ones stay",
                    file.path.display()
                );
            }
            file.sound = sound;
        }
        let listed: Vec<OrderedUri> = self.listed().cloned().collect();
        self.resolved.retain(|uri, _| listed.contains(uri));
        for uri in listed {
            let (host, port) = uri.parts();
            if !self.dial.resolves(&host) {
                continue;
            }
            let answer = tokio::time::timeout(RESOLVE_TIMEOUT, self.dial.resolve(&host, port));
            match answer.await {
                Ok(Ok(places)) if !places.is_empty() => {
                    self.resolved.insert(uri, one_family(places));
                }
                Ok(Ok(_)) => tracing::debug!(host, "has no address"),
                Ok(Err(error)) => tracing::debug!(host, %error, "does not resolve"),
                Err(_) => tracing::debug!(host, "does not resolve in time"),
            }
        }
    }

    fn listed(&self) -> impl Iterator<Item = &OrderedUri> {
        self.urls.iter().chain(self.files.iter().flat_map(|file| &file.urls))
    }
}

impl OrderedUri {
    fn parse(url: &str) -> Result<OrderedUri> {
        let bad = |source: Box<dyn std::error::Error + Send + Sync>| Error::ServerUrl {
            url: url.to_owned(),
            source,
        };
        let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let uri: Uri = full.parse().map_err(|error| bad(Box::new(error)))?;
        if uri.port_u16().is_none() || !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(bad("scheme or port is missing".into()));
        }
        Ok(OrderedUri(full))
    }

    pub(super) fn uri(&self) -> Uri {
        self.0.parse().expect("it was parsed before")
    }

    /// Host, without brackets, and port.
    fn parts(&self) -> (String, u16) {
        let uri = self.uri();
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        (host, uri.port_u16().expect("it was checked"))
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let url = self.uri.0.strip_prefix("http://").unwrap_or(&self.uri.0);
        match self.at {
            None => f.write_str(url),
            Some(at) => write!(f, "{url} ({})", at.ip()),
        }
    }
}

/// One URL a line; empty lines and those that begin with `#` are comments.
fn read(path: &Path) -> Result<Vec<OrderedUri>> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::ServerFile { path: path.to_owned(), source })?;
    let lines = text.lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(OrderedUri::parse).collect()
}

/// A server with an address of either family is still one: the family with more addresses tells how many there are, and
/// of equals the one that the system puts first.
fn one_family(places: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let of = |v4: bool| places.iter().filter(|at| at.is_ipv4() == v4).count();
    let first = places[0].is_ipv4();
    let v4 = if of(first) >= of(!first) { first } else { !first };
    places.into_iter().filter(|at| at.is_ipv4() == v4).collect()
}

#[cfg(test)]
mod tests;
