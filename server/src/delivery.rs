//! Answers on their way: how long a peer takes to read what it asked for.
//!
//! HTTP/2 lets a peer hold an answer up for ever, by giving it no window. So an answer's bytes carry a token that is gone
//! when the last of them was written, and the connection is closed when that takes too long.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::NamedService;

use crate::connection::Due;

/// A service whose answers are to be taken in time.
#[derive(Clone)]
pub(crate) struct Delivered<S>(pub(crate) S);

impl<S: NamedService> NamedService for Delivered<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Delivered<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let due = Due::of(request.extensions()).cloned();
        let answer = self.0.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            Ok(match due {
                Some(due) => answer.map(|body| Body::new(Answer { body, held: due.answer() })),
                None => answer,
            })
        })
    }
}

/// An answer that has not been taken yet.
struct Answer {
    body: Body,
    held: Arc<()>,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        let part = |bytes| Bytes::from_owner(Part { bytes, _held: self.held.clone() });
        frame.map_ok(|frame| frame.map_data(part))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Bytes of an answer, which the connection drops when they are written.
struct Part {
    bytes: Bytes,
    _held: Arc<()>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}
