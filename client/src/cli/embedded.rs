//! An expert server inside this process, on a loopback port: real gRPC over real sockets.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context as _, Result};
use outrigger_server::{ExpertServer, ServerConfig};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub(crate) struct EmbeddedServer {
    pub(crate) address: SocketAddr,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), outrigger_server::Error>>,
}

impl EmbeddedServer {
    /// Serves every expert of `model` on a free loopback port.
    pub(crate) async fn start(model: &Path) -> Result<EmbeddedServer> {
        let config =
            ServerConfig { model: model.to_owned(), threads: 1, ..ServerConfig::default() };
        let server = ExpertServer::open(config).context("cannot open the model for the server")?;
        let incoming = outrigger_server::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
            .await
            .context("cannot listen on loopback")?;
        let address = incoming.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(server.serve(incoming, None, async {
            let _ = stopped.await;
        }));
        Ok(EmbeddedServer { address, stop, serving })
    }

    /// Drains and ends.
    pub(crate) async fn stop(self) -> Result<()> {
        let _ = self.stop.send(());
        Ok(self.serving.await.context("the server died")??)
    }
}
