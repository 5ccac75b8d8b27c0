//! Files that are read again while the server serves, as when Kubernetes renews a secret.

use std::convert::Infallible;
use std::path::Path;
use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;

use crate::Result;

/// How often they are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Reads `file` again and again; `adopt` tells whether anything has changed. What is of no use changes nothing, and `stale`
/// says so. Never returns.
pub(crate) async fn watch<T>(
    file: &Path,
    stale: &Gauge,
    read: impl Fn() -> Result<T>,
    adopt: impl Fn(T) -> bool,
) -> Infallible {
    let file = file.display();
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let was_stale = stale.get() == 1;
        let fresh = read();
        stale.set(fresh.is_err().into());
        match fresh.map(&adopt) {
            Ok(changed) if changed || was_stale => tracing::info!("{file}: read again"),
            Err(error) if !was_stale => {
                let error: &dyn std::error::Error = &error;
                tracing::error!(error, "{file}: of no use; what it had last stays good");
            }
            _ => {}
        }
    }
}
