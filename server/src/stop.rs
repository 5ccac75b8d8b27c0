//! When a program that serves is to end, and when it is to look at its files.

use std::process::exit;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{Error, Result};

/// A shell's code for a program that an interrupt ended.
const INTERRUPTED: i32 = 130;

/// Resolves at SIGTERM or SIGINT, from the call on: a signal that comes before it is awaited is not lost. One more, while
/// work in hand is finished, ends the process at once.
///
/// # Errors
/// [`Error::Signal`] where the system takes no handler.
pub fn stop_signal() -> Result<impl Future<Output = ()>> {
    let mut terminate = listen(SignalKind::terminate(), "SIGTERM")?;
    let mut interrupt = listen(SignalKind::interrupt(), "SIGINT")?;
    let mut next = async move || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    Ok(async move {
        next().await;
        tokio::spawn(async move {
            next().await;
            tracing::warn!("a second signal: stopped at once");
            exit(INTERRUPTED);
        });
    })
}

/// From the call on, SIGHUP does not end the process: a server looks at its files then.
///
/// # Errors
/// [`Error::Signal`] where the system takes no handler.
pub fn outlive_hangup() -> Result<()> {
    hangup().map(drop)
}

/// SIGHUP, each from the call on.
pub(crate) fn hangup() -> Result<Signal> {
    listen(SignalKind::hangup(), "SIGHUP")
}

fn listen(kind: SignalKind, name: &'static str) -> Result<Signal> {
    signal(kind).map_err(|source| Error::Signal { name, source })
}
