use std::collections::VecDeque;
use std::convert::Infallible;
use std::task::Waker;

use http_body::Body as _;

use super::*;

/// Frames as they come; `None` is one that takes a while.
struct Frames(VecDeque<Option<&'static str>>);

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.0.pop_front() {
            None => Poll::Ready(None),
            Some(None) => Poll::Pending,
            Some(Some(text)) => Poll::Ready(Some(Ok(Frame::data(text.into())))),
        }
    }
}

/// Each poll's frame, and whether it said that it was the last; "" where there was none yet.
fn polled(frames: &[Option<&'static str>]) -> Vec<(String, bool)> {
    let body = Body::new(Frames(frames.iter().copied().collect()));
    let mut body = Ahead { body, next: Next::Unknown };
    let mut seen = Vec::new();
    loop {
        let polled = Pin::new(&mut body).poll_frame(&mut Context::from_waker(Waker::noop()));
        let text = match polled {
            Poll::Ready(None) => return seen,
            Poll::Ready(Some(frame)) => frame.unwrap().into_data().unwrap(),
            Poll::Pending => Bytes::new(),
        };
        seen.push((String::from_utf8(text.into()).unwrap(), body.is_end_stream()));
    }
}

#[test]
fn the_last_frame_says_so() {
    assert_eq!(polled(&[Some("a")]), [("a".into(), true)]);
    assert_eq!(polled(&[Some("a"), Some("b")]), [("a".into(), false), ("b".into(), true)]);
}

#[test]
fn a_frame_waits_for_no_other() {
    let frames = [Some("a"), None, None, Some("b")];
    let expected = [("a".into(), false), ("".into(), false), ("b".into(), true)];
    assert_eq!(polled(&frames), expected);
    assert_eq!(polled(&[]), []);
}
