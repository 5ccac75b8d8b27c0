//! The headers that both sides know.

use std::time::Duration;

use tonic::Status;

/// What a device calls a request: token and layer. The logs of both sides name it.
pub const REQUEST_ID: &str = "x-request-id";

/// Tells a caller that was sent away when to come back, in milliseconds (gRPC proposal A6).
pub const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// How long to stay away, where a server says so.
pub fn pushback(status: &Status) -> Option<Duration> {
    let millis = status.metadata().get(PUSHBACK)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_millis(millis))
}
