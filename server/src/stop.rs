//! When a program that serves is to end.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{Error, Result};

/// Resolves at SIGTERM or SIGINT, from the call on: a signal that comes before it is awaited is not lost.
pub fn stop_signal() -> Result<impl Future<Output = ()>> {
    let mut terminate = listen(SignalKind::terminate(), "SIGTERM")?;
    let mut interrupt = listen(SignalKind::interrupt(), "SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn listen(kind: SignalKind, name: &'static str) -> Result<Signal> {
    signal(kind).map_err(|source| Error::Signal { name, source })
}
