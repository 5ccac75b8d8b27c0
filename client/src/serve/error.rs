//! What a request is told when it cannot be answered, in OpenAI's shape.

use std::time::Duration;

use hyper::header::{HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};

use super::reply::Reply;
use crate::Error;

/// When to ask again where everything is taken: about what a short answer takes.
const RETRY: Duration = Duration::from_secs(2);

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiError {
    status: StatusCode,
    code: &'static str,
    /// The field that is at fault.
    param: Option<String>,
    message: String,
}

impl ApiError {
    pub(super) fn new(
        status: StatusCode,
        code: &'static str,
        message: impl Into<String>,
    ) -> ApiError {
        ApiError { status, code, param: None, message: message.into() }
    }

    /// A field of the request that is not what it should be.
    pub(super) fn field(
        param: impl Into<String>,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> ApiError {
        let param = param.into();
        let message = format!("{param}: found {found}, expected {expected}");
        let error = ApiError::new(StatusCode::BAD_REQUEST, "invalid_value", message);
        ApiError { param: Some(param), ..error }
    }

    pub(super) fn with(self, status: StatusCode, code: &'static str) -> ApiError {
        ApiError { status, code, ..self }
    }

    /// More tokens than the context has positions.
    pub(super) fn context(param: &str, found: usize, context: usize) -> ApiError {
        let expected = format!("at most {context}, the context");
        let error = ApiError::field(param, format!("{found} tokens"), expected);
        error.with(StatusCode::BAD_REQUEST, "context_length_exceeded")
    }

    /// Everything is taken, for now.
    pub(super) fn overloaded(message: &str) -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", message)
    }

    /// A fault of this side. Its cause is in the log, since it may name files.
    pub(super) fn internal() -> ApiError {
        let message = "the model could not be run; the log says why";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// As an object; OpenAI's clients raise what they find as `error`, also in the middle of a stream.
    pub(super) fn json(&self) -> Value {
        let kind = match self.status.is_client_error() {
            true => "invalid_request_error",
            false => "server_error",
        };
        json!({ "error": {
            "message": self.message, "type": kind, "param": self.param, "code": self.code,
        }})
    }

    pub(super) fn response(&self) -> Response<Reply> {
        let mut response = Reply::json(self.status, &self.json());
        let headers = response.headers_mut();
        match self.status {
            StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(RETRY_AFTER, RETRY.as_secs().into());
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> ApiError {
        match error {
            Error::Missing { .. } => ApiError {
                code: "experts_missing",
                ..ApiError::overloaded("experts can run nowhere now, and --on-miss says to fail")
            },
            error => {
                let error: &dyn std::error::Error = &error;
                tracing::error!(error, "an answer failed");
                ApiError::internal()
            }
        }
    }
}
