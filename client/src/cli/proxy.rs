//! `outrigger proxy`: a bad network at home.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::time::Duration;

use super::view::line;
use anyhow::{Context as _, Result};
use clap::Args;
use outrigger::proxy::{Conditions, FaultProxy, LinkFault};

/// Put a slow, narrow or dead link between a device and a server.
#[derive(Debug, Args)]
pub(crate) struct Proxy {
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDR")]
    listen: SocketAddr,
    /// The server behind it, host:port
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
    /// Round trip to add, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 0.0)]
    rtt: f64,
    /// Bytes a second in each direction [default: unlimited]
    #[arg(long, value_name = "BYTES")]
    bandwidth: Option<NonZeroU64>,
}

impl Proxy {
    pub(crate) async fn run(self) -> Result<()> {
        let proxy = FaultProxy::start(self.listen, self.to.clone())
            .await
            .with_context(|| format!("cannot listen on {}", self.listen))?;
        let delay = Duration::try_from_secs_f64(self.rtt / 2e3).context("--rtt")?;
        proxy.set(Conditions { delay, bandwidth: self.bandwidth, state: LinkFault::None });
        line(format!(
            "{} -> {}, round trip + {} ms; Ctrl-C ends",
            proxy.address(),
            self.to,
            self.rtt
        ))?;
        tokio::signal::ctrl_c().await.context("cannot wait for Ctrl-C")
    }
}
