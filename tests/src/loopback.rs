//! Real servers on loopback ports, inside the test's process.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use outrigger_server::{ExpertServer, Metrics, ServerConfig, Tls};
use tokio::task::JoinHandle;

/// A running server; dropping it ends it.
pub struct LoopbackServer {
    /// Where it listens.
    pub address: SocketAddr,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    serving: JoinHandle<()>,
}

impl LoopbackServer {
    /// Serves `model`, or only a range of each layer's experts, with one compute thread.
    pub async fn start(model: &Path, experts: Option<RangeInclusive<u32>>) -> LoopbackServer {
        let config = ServerConfig { experts, ..LoopbackServer::config(model) };
        LoopbackServer::start_with(config, None).await
    }

    /// All of `model`, with one compute thread, and nothing shed for its wait, which depends on the machine.
    pub fn config(model: &Path) -> ServerConfig {
        let (model, max_wait) = (model.to_owned(), Duration::from_secs(60));
        ServerConfig { model, threads: 1, max_wait, ..ServerConfig::default() }
    }

    /// A server that is configured, over TLS if it is given.
    pub async fn start_with(config: ServerConfig, tls: Option<Tls>) -> LoopbackServer {
        let server = ExpertServer::open(config).expect("the model opens");
        let metrics = server.metrics();
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let incoming = outrigger_server::bind(any_port).await.expect("loopback has ports");
        let address = incoming.local_addr().expect("it is bound");
        let forever = std::future::pending();
        let serving = tokio::spawn(async move {
            server.serve(incoming, tls, forever).await.expect("it serves");
        });
        LoopbackServer { address, metrics, serving }
    }
}

impl Drop for LoopbackServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}
