//! The body of a response: whole, or events as they come.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::Value;
use tokio::sync::mpsc;

use super::answer::Answer;
use super::generate::Event;

/// A body.
pub(super) enum Reply {
    /// All of it, until it is taken.
    Whole(Option<Bytes>),
    /// What a generation tells, as server-sent events.
    Events(Box<Events>),
}

/// A generation as it goes on.
pub(super) struct Events {
    /// What came before the response was begun.
    first: Option<Event>,
    rest: mpsc::Receiver<Event>,
    answer: Answer,
    ended: bool,
}

impl Reply {
    pub(super) fn text(
        status: StatusCode,
        content_type: &'static str,
        text: String,
    ) -> Response<Reply> {
        let mut response = Response::new(Reply::Whole(Some(text.into())));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        response
    }

    pub(super) fn json(status: StatusCode, value: &Value) -> Response<Reply> {
        Reply::text(status, "application/json", value.to_string())
    }

    pub(super) fn events(
        first: Event,
        rest: mpsc::Receiver<Event>,
        answer: Answer,
    ) -> Response<Reply> {
        let events = Events { first: Some(first), rest, answer, ended: false };
        let mut response = Response::new(Reply::Events(Box::new(events)));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        response
    }
}

impl Events {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let event = match self.first.take() {
            Some(first) => Some(first),
            None => ready!(self.rest.poll_recv(cx)),
        };
        self.ended = !matches!(event, Some(Event::Text { .. } | Event::End { .. }));
        Poll::Ready(Some(self.answer.stream(event).into()))
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let bytes = match self.get_mut() {
            Reply::Whole(bytes) => bytes.take(),
            Reply::Events(events) => ready!(events.poll_next(cx)),
        };
        Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Reply::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64)
            }
            Reply::Events(_) => SizeHint::default(),
        }
    }
}
