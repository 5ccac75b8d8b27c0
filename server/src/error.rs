//! Why a server does not start, or stops.

use std::net::SocketAddr;
use std::path::PathBuf;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a server does not start, or stops. What is wrong with a request is a gRPC status instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system does not tell this program of a signal.
    #[error("cannot listen for {name}")]
    Signal {
        /// The signal.
        name: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The model file cannot be used.
    #[error("cannot serve this model")]
    Model(#[from] outrigger_experts::Error),
    /// The model file is a pack, which approximates experts: a server gives exact answers.
    #[error("{}: found a device's pack, expected the full model that it was made from", .0.display())]
    Pack(PathBuf),
    /// A range of layers or experts that the model does not have.
    #[error("{what} {first}-{last}: the model has {what} 0-{}", count - 1)]
    Range {
        /// "layers" or "experts".
        what: &'static str,
        /// First one asked for.
        first: u32,
        /// Last one asked for.
        last: u32,
        /// How many the model has.
        count: u32,
    },
    /// A setting that must be at least 1 is 0.
    #[error("{0} is 0, expected at least 1")]
    Zero(&'static str),
    /// A file of tokens that cannot be understood.
    #[error("{}: line {line}: {found}, expected NAME TOKEN [ROWS A SECOND]", path.display())]
    Tenants {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is there.
        found: &'static str,
    },
    /// A file that the server is set up with cannot be read.
    #[error("cannot read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Others could reach the server, and nothing protects the line.
    #[error(
        "{0} can be reached from other machines: give --tls-cert and --tls-key, or say --insecure \
         if everyone who can reach it may read and use it"
    )]
    Exposed(SocketAddr),
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The system gave no thread.
    #[error("cannot start the {name} thread")]
    Thread {
        /// What it is for: "compute" or "preload".
        name: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The compute thread panicked: a bug. Nothing can be answered any more.
    #[error("the compute thread has stopped")]
    ComputeStopped,
    /// A part of the TLS settings is not what it should be.
    #[error("TLS: {what}: {found}")]
    Tls {
        /// Which part, with its file.
        what: String,
        /// What is wrong with it.
        found: String,
    },
    /// The transport failed.
    #[error("cannot serve")]
    Transport(#[from] tonic::transport::Error),
}
