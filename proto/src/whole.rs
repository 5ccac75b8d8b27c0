//! Requests whose last frame says that it is the last.
//!
//! tonic ends a request with an empty frame of its own: one more system call on either side, and a server that has the
//! message waits for it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};

/// A channel that sends a request's end along with its last frame.
#[derive(Clone, Debug)]
pub struct Whole<S>(pub S);

impl<S: Service<http::Request<Body>>> Service<http::Request<Body>> for Whole<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> S::Future {
        self.0.call(request.map(|body| Body::new(Ahead { body, next: Next::Unknown })))
    }
}

/// A body that looks one frame ahead.
struct Ahead {
    body: Body,
    next: Next,
}

enum Next {
    Unknown,
    Frame(Result<Frame<Bytes>, Status>),
    End,
}

impl Ahead {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match std::mem::replace(&mut self.next, Next::Unknown) {
            Next::Unknown => http_body::Body::poll_frame(Pin::new(&mut self.body), cx),
            Next::Frame(frame) => Poll::Ready(Some(frame)),
            Next::End => {
                self.next = Next::End;
                Poll::Ready(None)
            }
        }
    }
}

impl http_body::Body for Ahead {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(self.poll_next(cx));
        // What is not ready yet is asked for again after this frame.
        self.next = match self.poll_next(cx) {
            Poll::Ready(Some(next)) => Next::Frame(next),
            Poll::Ready(None) => Next::End,
            Poll::Pending => Next::Unknown,
        };
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.next, Next::End)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests;
