//! Files that are read again while the server serves, as when Kubernetes renews a secret.

use std::convert::Infallible;
use std::path::Path;
use std::time::Duration;
use std::{fs, io};

use prometheus_client::metrics::gauge::Gauge;
use tokio::signal::unix::Signal;
use tokio::task::spawn_blocking;

use crate::{Error, Result};

/// How often they are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// What a file has. A pipe or a device is refused: reading it may never end.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::metadata(path).and_then(|metadata| match metadata.is_file() {
        true => fs::read(path),
        false => {
            Err(io::Error::other("found a directory, a pipe or a device, expected a regular file"))
        }
    });
    bytes.map_err(|source| Error::File { path: path.to_owned(), source })
}

/// Reads `file` again and again, and at each `hangup`; `adopt` tells whether anything has changed. What is of no use changes
/// nothing, and `stale` says so. Never returns.
pub(crate) async fn watch<T: Send + 'static>(
    file: &Path,
    mut hangup: Signal,
    stale: &Gauge,
    read: impl Fn() -> Result<T> + Clone + Send + 'static,
    adopt: impl Fn(T) -> bool,
) -> Infallible {
    let file = file.display();
    // What the log was told of last.
    let mut told = None;
    loop {
        // Who asks for it gets an answer in any case.
        let asked = tokio::select! {
            () = tokio::time::sleep(LOOK_INTERVAL) => false,
            Some(()) = hangup.recv() => true,
        };
        // A disk, or what is mounted as one, may keep this waiting, and nobody else. Fails where the process ends.
        let Ok(fresh) = spawn_blocking(read.clone()).await else { continue };
        stale.set(fresh.is_err().into());
        let wrong = fresh.as_ref().err().map(|error| format!("{error:?}"));
        match fresh.map(&adopt) {
            Ok(changed) if changed || told.is_some() => tracing::info!("{file}: read again"),
            Ok(_) if asked => tracing::info!("{file}: as it was"),
            Err(error) if asked || wrong != told => {
                let error: &dyn std::error::Error = &error;
                tracing::error!(error, "{file}: of no use; what it had last stays good");
            }
            _ => {}
        }
        told = wrong;
    }
}
