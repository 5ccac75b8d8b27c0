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
const NONE_LISTED: &str = "it lists no servers";

/// One server: the address as it was given, and where that name led.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Address {
    pub(super) uri: OrderedUri,
    /// Where to connect, if the name stands for several servers, or for one that may move and has one address.
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
    resolved: BTreeMap<OrderedUri, Vec<Option<SocketAddr>>>,
    /// Why names lead nowhere, of those that did when they were last looked up.
    unresolved: BTreeMap<OrderedUri, String>,
    dial: Dial,
}

/// Something that was configured and leads to no server.
#[derive(Clone, Debug)]
pub(super) struct Unfound {
    /// As it was given.
    pub(super) server: String,
    pub(super) why: String,
}

/// A file that lists servers, and what it said when it was last of use.
#[derive(Debug)]
struct Listing {
    path: PathBuf,
    urls: Vec<OrderedUri>,
    /// Why it was of no use when it was last looked at, if it was not.
    useless: Option<String>,
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
                    files.push(Listing { urls: read(&path)?, path, useless: None });
                }
            }
        }
        Ok(Sources { urls, files, resolved: BTreeMap::new(), unresolved: BTreeMap::new(), dial })
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
                true => self.resolved.get(uri).cloned().unwrap_or_default(),
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

    /// What leads to no server, as far as it was looked at.
    pub(super) fn unfound(&self) -> Vec<Unfound> {
        let names = self.unresolved.iter().filter(|(uri, _)| !self.resolved.contains_key(uri));
        let names = names.map(|(uri, why)| (uri.to_string(), why.clone()));
        let empty = self.files.iter().filter(|file| file.urls.is_empty());
        let empty = empty.map(|file| (format!("@{}", file.path.display()), NONE_LISTED.to_owned()));
        names.chain(empty).map(|(server, why)| Unfound { server, why }).collect()
    }

    /// Reads the files and resolves the names again. What fails, or is empty, is as it was last.
    pub(super) async fn look(&mut self) {
        for file in &mut self.files {
            let useless = match read(&file.path) {
                Ok(urls) if urls.is_empty() => Some(NONE_LISTED.to_owned()),
                Ok(urls) => {
                    file.urls = urls;
                    None
                }
                Err(error) => Some(said(&error)),
            };
            if let Some(why) = useless.as_ref().filter(|why| file.useless.as_ref() != Some(why)) {
                tracing::warn!("{}: {why}; the last servers stay", file.path.display());
            }
            file.useless = useless;
        }
        let listed: Vec<OrderedUri> = self.listed().cloned().collect();
        self.resolved.retain(|uri, _| listed.contains(uri));
        self.unresolved.clear();
        for uri in listed {
            let (host, port) = uri.parts();
            if !self.dial.resolves(&host) {
                continue;
            }
            let answer = tokio::time::timeout(RESOLVE_TIMEOUT, self.dial.resolve(&host, port));
            let why = match answer.await {
                Ok(Ok(places)) if !places.is_empty() => {
                    self.resolved.insert(uri, servers_at(places));
                    continue;
                }
                Ok(Ok(_)) => "the name has no address".to_owned(),
                Ok(Err(error)) => format!("the name does not resolve: {error}"),
                Err(_) => "the name does not resolve in time".to_owned(),
            };
            tracing::debug!(host, why);
            self.unresolved.insert(uri, why);
        }
    }

    fn listed(&self) -> impl Iterator<Item = &OrderedUri> {
        self.urls.iter().chain(self.files.iter().flat_map(|file| &file.urls))
    }
}

impl Address {
    pub(super) fn is_https(&self) -> bool {
        self.uri.uri().scheme_str() == Some("https")
    }

    /// Whether nothing that goes there leaves this machine.
    pub(super) fn is_loopback(&self) -> bool {
        let (host, _) = self.uri.parts();
        let ip = self.at.map(|at| at.ip()).or_else(|| host.parse().ok());
        ip.map_or(host == "localhost", |ip| ip.is_loopback())
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
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(bad("something follows the port".into()));
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

impl std::fmt::Display for OrderedUri {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.strip_prefix("http://").unwrap_or(&self.0))
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.at {
            None => self.uri.fmt(f),
            Some(at) => write!(f, "{} ({})", self.uri, at.ip()),
        }
    }
}

/// One URL a line; empty lines and those that begin with `#` are comments.
fn read(path: &Path) -> Result<Vec<OrderedUri>> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::ServerFile { path: path.to_owned(), source })?;
    let lines = (1..).zip(text.lines().map(str::trim));
    let named = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let parsed = named.map(|(at, line)| {
        OrderedUri::parse(line).map_err(|error| Error::ServerFile {
            path: path.to_owned(),
            source: std::io::Error::other(format!("line {at}: {error}")),
        })
    });
    parsed.collect()
}

/// An error with its cause.
fn said(error: &Error) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

/// The servers that a name's addresses are. With one address of each family they are one server, which is looked for at
/// both, by its name.
fn servers_at(places: Vec<SocketAddr>) -> Vec<Option<SocketAddr>> {
    match *places {
        [one, other] if one.is_ipv4() != other.is_ipv4() => vec![None],
        _ => one_family(places).into_iter().map(Some).collect(),
    }
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
