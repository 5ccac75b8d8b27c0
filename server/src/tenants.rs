//! Who may ask, and how much.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use subtle::ConstantTimeEq as _;
use tokio::signal::unix::Signal;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::service::Interceptor;
use tonic::{Code, Request, Status};

use crate::connection::Due;
use crate::metrics::Metrics;
use crate::queue::sent_away;
use crate::seldom::Seldom;
use crate::watch;
use crate::{Error, Result};

/// A shorter token could be guessed.
const MIN_TOKEN_BYTES: usize = 16;

/// Those who may ask, each with a bearer token and perhaps a quota.
#[derive(Clone, Debug)]
pub struct Tenants {
    known: Arc<RwLock<Vec<Arc<Tenant>>>>,
    file: PathBuf,
}

/// One of them.
pub(crate) struct Tenant {
    pub(crate) name: String,
    token: String,
    quota: Option<Quota>,
}

impl Tenants {
    /// Reads a file with a line for each tenant: its name, its token, and the rows times experts that it may have
    /// computed a second, without limit if there is no such number. Empty lines and those that begin with `#` are
    /// comments. It is read again every 2 s while a server serves, and at SIGHUP: tokens that are no longer there count
    /// for nothing from then on. A file that cannot be used changes nothing.
    ///
    /// # Errors
    /// [`Error::File`] for one that cannot be read as text. [`Error::Tenants`] with the line, for one that is anything
    /// else; a name or a token that comes twice; no tenant at all.
    pub fn read(path: &Path) -> Result<Tenants> {
        let known = Arc::new(RwLock::new(read(path)?));
        Ok(Tenants { known, file: path.to_owned() })
    }

    /// Follows the file. Never returns.
    pub(crate) async fn watch(self, hangup: Signal, metrics: Arc<Metrics>) -> Infallible {
        let path = self.file.clone();
        let read = move || read(&path);
        let stale = &metrics.tokens_stale;
        watch::watch(&self.file, hangup, stale, read, |fresh| self.adopt(fresh)).await
    }

    /// Makes the tenants those of `fresh`; who has not changed keeps its quota as far as it is used up. Whether anything
    /// has changed.
    fn adopt(&self, mut fresh: Vec<Arc<Tenant>>) -> bool {
        let mut known = self.known.write().expect("nothing panics under this lock");
        let mut changed = fresh.len() != known.len();
        for tenant in &mut fresh {
            match known.iter().find(|known| known.is_as(tenant)) {
                Some(known) => *tenant = known.clone(),
                None => changed = true,
            }
        }
        *known = fresh;
        changed
    }

    /// Whose bearer token the metadata have. Looks at every token in full, so that the time tells nothing about them
    /// but their length.
    fn authenticate(&self, metadata: &MetadataMap) -> Result<Arc<Tenant>, Status> {
        let given =
            metadata.get("authorization").map_or(&b""[..], |value| value.as_encoded_bytes());
        let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
        let mut found = None;
        for tenant in self.known.read().expect("nothing panics under this lock").iter() {
            if bool::from(tenant.token.as_bytes().ct_eq(given)) {
                found = Some(tenant.clone());
            }
        }
        found.ok_or_else(|| {
            Status::unauthenticated("authorization: expected a bearer token of this server's")
        })
    }
}

fn read(path: &Path) -> Result<Vec<Arc<Tenant>>> {
    let text = String::from_utf8(watch::read(path)?).map_err(|error| {
        let source = std::io::Error::other(error.utf8_error());
        Error::File { path: path.to_owned(), source }
    })?;
    parse(&text, path)
}

/// What the file at `path` says, which errors name.
fn parse(text: &str, path: &Path) -> Result<Vec<Arc<Tenant>>> {
    let wrong = |line, found| Error::Tenants { path: path.to_owned(), line, found };
    let mut tenants: Vec<Arc<Tenant>> = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        let text = text.trim();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let tenant = Tenant::parse(text).and_then(|tenant| {
            let twice = tenants.iter().any(|t| t.name == tenant.name || t.token == tenant.token);
            if twice { Err("a name or a token for the second time") } else { Ok(tenant) }
        });
        tenants.push(Arc::new(tenant.map_err(|found| wrong(line, found))?));
    }
    if tenants.is_empty() {
        return Err(wrong(1, "nobody in the whole file"));
    }
    Ok(tenants)
}

impl Tenant {
    fn parse(line: &str) -> Result<Tenant, &'static str> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (name, token, quota) = match fields[..] {
            [name, token] => (name, token, None),
            [name, token, rows] => match rows.parse::<u32>() {
                Ok(rows @ 1..) => (name, token, Some(Quota::new(rows))),
                _ => return Err("a quota that is no number from 1"),
            },
            _ => return Err("not two or three fields"),
        };
        if token.len() < MIN_TOKEN_BYTES {
            return Err("a token of fewer than 16 characters");
        }
        Ok(Tenant { name: name.to_owned(), token: token.to_owned(), quota })
    }

    fn is_as(&self, other: &Tenant) -> bool {
        let rate = |tenant: &Tenant| tenant.quota.as_ref().map(|quota| quota.rate);
        self.name == other.name && self.token == other.token && rate(self) == rate(other)
    }

    /// Takes `rows` from the quota for what `run` computes. It gets them back where that is sent away UNAVAILABLE.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED with the time until there is something again, and those of `run`.
    pub(crate) async fn charge<T>(
        &self,
        rows: usize,
        run: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        self.take(rows)?;
        let answer = run.await;
        if let (Some(quota), Err(status)) = (&self.quota, &answer)
            && status.code() == Code::Unavailable
        {
            quota.give_back(rows);
        }
        answer
    }

    fn take(&self, rows: usize) -> Result<(), Status> {
        let Some(quota) = &self.quota else { return Ok(()) };
        quota.take(rows).map_err(|wait| {
            let message =
                format!("the quota of {} is used up: {} rows a second", self.name, quota.rate);
            sent_away(Code::ResourceExhausted, message, wait)
        })
    }
}

impl std::fmt::Debug for Tenant {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tenant").field(&self.name).finish()
    }
}

/// A bucket that fills at `rate` up to what flows in a second. Whoever finds something in it takes what it needs, into
/// debt if need be, so that a request larger than the bucket passes too.
struct Quota {
    rate: f64,
    bucket: Mutex<Bucket>,
}

struct Bucket {
    level: f64,
    at: Instant,
}

impl Quota {
    fn new(rows: u32) -> Quota {
        let rate = f64::from(rows);
        Quota { rate, bucket: Mutex::new(Bucket { level: rate, at: Instant::now() }) }
    }

    /// Fails with the time until the bucket is no longer empty.
    fn take(&self, rows: usize) -> Result<(), Duration> {
        let mut bucket = self.bucket.lock().expect("nothing panics under this lock");
        let now = Instant::now();
        let flowed = (now - bucket.at).as_secs_f64() * self.rate;
        *bucket = Bucket { level: (bucket.level + flowed).min(self.rate), at: now };
        if bucket.level <= 0.0 {
            return Err(Duration::from_secs_f64((1.0 - bucket.level) / self.rate));
        }
        bucket.level -= rows as f64;
        Ok(())
    }

    /// What is too much for the bucket flows over at the next look at it.
    fn give_back(&self, rows: usize) {
        self.bucket.lock().expect("nothing panics under this lock").level += rows as f64;
    }
}

/// At the door of every service: the connection is in use, and the caller is known.
#[derive(Clone)]
pub(crate) struct Door {
    pub(crate) metrics: Arc<Metrics>,
    /// `None`: everyone may come in.
    pub(crate) tenants: Option<Tenants>,
    pub(crate) refusals: Arc<Seldom>,
}

impl Interceptor for Door {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let due = Due::of(request.extensions());
        if let Some(due) = due {
            due.put_off();
        }
        let peer = due.and_then(|due| due.peer);
        if let Some(tenants) = &self.tenants {
            let tenant = tenants.authenticate(request.metadata()).inspect_err(|status| {
                self.metrics.request(status.code(), None);
                let peer = peer.map(tracing::field::display);
                match self.refusals.turn() {
                    Some(left_out) => tracing::info!(peer, left_out, "no good token"),
                    None => tracing::debug!(peer, "no good token"),
                }
            })?;
            request.extensions_mut().insert(tenant);
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests;
