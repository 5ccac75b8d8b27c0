//! The listening socket.

use std::net::SocketAddr;
use std::time::Duration;

use tonic::transport::server::TcpIncoming;

use crate::{Error, Result};

/// Idle time after which the kernel asks whether a peer is still there.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);

/// Listens on `addr`; port 0 takes any free one, which [`TcpIncoming::local_addr`] tells.
/// Connections send small messages at once (TCP_NODELAY).
pub async fn bind(addr: SocketAddr) -> Result<TcpIncoming> {
    let incoming = TcpIncoming::bind(addr).map_err(|source| Error::Bind { addr, source })?;
    Ok(incoming.with_nodelay(Some(true)).with_keepalive(Some(TCP_KEEPALIVE)))
}

/// Refuses an address that other machines can reach, unless the line is protected or the user said
/// that it need not be: activations let a listener recover what was written.
pub fn check_exposure(addr: SocketAddr, tls: bool, insecure: bool) -> Result<()> {
    if addr.ip().is_loopback() || tls || insecure { Ok(()) } else { Err(Error::Exposed(addr)) }
}
