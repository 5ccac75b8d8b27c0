//! The real client and the real server over a simulated network, in virtual time: what a device does in a tunnel, on
//! a plane or beside a busy access point, the same every time that it is asked.
//!
//! A [`Scenario`] says what happens; [`run`] lets it happen and gives a [`Run`], a row a token with the full model's
//! opinion beside it; [`sweep()`] compares budgets and policies offline. [`Network`] is what lies below: any device
//! code against any timeline of links and servers.

mod draw;
mod files;
mod medium;
mod network;
mod plot;
mod report;
mod run;
mod scenario;
mod stream;
mod sweep;
mod units;

use std::path::PathBuf;

pub use files::{prepare, write_sweep};
pub use medium::{Conditions, Timeline, Way};
pub use network::{Network, ServerEvent};
pub use report::{Row, Run, Summary};
pub use run::run;
pub use scenario::{CUT, Compute, Device, Event, Input, Link, Scenario, ServerChange};
pub use sweep::{Point, Sweep, sweep};
pub use units::{Rate, Share, Time};

/// The result of this module's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a simulation does not take place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read.
    #[error("{}: cannot read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file or a directory cannot be written.
    #[error("{}: cannot write", path.display())]
    Write {
        /// The file or the directory.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A scenario is not well formed.
    #[error("{}: not a scenario", path.display())]
    Toml {
        /// The scenario.
        path: PathBuf,
        /// Where, what was found and what was expected.
        source: Box<toml::de::Error>,
    },
    /// A field of a scenario means nothing.
    #[error("{}: {field}: found {found}, expected {expected}", path.display())]
    Field {
        /// The scenario.
        path: PathBuf,
        /// The field.
        field: String,
        /// What it says.
        found: String,
        /// What would mean something.
        expected: String,
    },
    /// A text or a prompt is too short.
    #[error("input: found a {what} of {found} tokens, expected at least {least}")]
    Short {
        /// What it is.
        what: &'static str,
        /// Tokens that it has.
        found: usize,
        /// Tokens that are needed.
        least: usize,
    },
    /// It ended before the first token.
    #[error(
        "no token was made: expected a length beyond the deadline, for which a device waits for its server at the \
         start, and a prompt that leaves room in the context"
    )]
    Nothing,
    /// A sweep's range is none.
    #[error("found `{found}`, expected cache= and shares such as cache=10%,25%,50%")]
    Sweep {
        /// What was given.
        found: String,
    },
    /// A sweep needs the same text at every point.
    #[error("input.prompt: a sweep compares one text, expected input.text or input.file")]
    NoText,
    /// A sweep needs a cache that it can vary.
    #[error("device.pack: a sweep varies the expert cache, expected device.expert_cache instead")]
    NoCache,
    /// The device's pack was made from another model.
    #[error(
        "{}: found another model's pack, expected one that was made from {}",
        pack.display(),
        model.display()
    )]
    Pack {
        /// The pack.
        pack: PathBuf,
        /// The scenario's model.
        model: PathBuf,
    },
    /// The device cannot go on.
    #[error(transparent)]
    Device(#[from] crate::Error),
    /// The server cannot go on.
    #[error("the simulated server")]
    Server(#[from] outrigger_server::Error),
    /// A plot cannot be drawn.
    #[error(transparent)]
    Plot(#[from] plot::Error),
}
