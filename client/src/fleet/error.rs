//! What can be wrong with a call, and what follows from it.

use std::time::Duration;

use outrigger_proto::pushback;
use outrigger_router::Failure;

/// Why a call gave nothing to merge.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The server was not late: the token had waited for others before.
    #[error("no answer within the {} ms that were left to the token", .0.as_millis())]
    Impatient(Duration),
    #[error("serves another model (`{found}`)")]
    WrongModel { found: String },
    #[error("bad answer: {0}")]
    BadAnswer(String),
    #[error("overloaded: {message}")]
    Overloaded { retry_after: Duration, message: String },
    #[error("{}", explained(.0))]
    Status(Box<tonic::Status>),
}

impl CallError {
    pub(super) fn gone() -> CallError {
        CallError::Status(Box::new(tonic::Status::unavailable("the connection is gone")))
    }

    /// In a word, for metrics.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            CallError::Timeout(_) | CallError::Impatient(_) => "timeout",
            CallError::WrongModel { .. } => "wrong_model",
            CallError::BadAnswer(_) => "bad_answer",
            CallError::Overloaded { .. } => "overloaded",
            CallError::Status(_) => "status",
        }
    }

    /// What the link makes of it.
    pub(super) fn failure(&self) -> Failure {
        match self {
            CallError::Timeout(_) | CallError::Impatient(_) => Failure::Timeout,
            CallError::WrongModel { .. } => Failure::WrongModel,
            CallError::BadAnswer(_) => Failure::BadAnswer,
            CallError::Overloaded { retry_after, .. } => {
                Failure::Overloaded { retry_after: *retry_after }
            }
            CallError::Status(status) => match status.code() {
                tonic::Code::InvalidArgument
                | tonic::Code::DataLoss
                | tonic::Code::Unimplemented => Failure::BadAnswer,
                _ => Failure::Transport,
            },
        }
    }
}

impl From<tonic::Status> for CallError {
    fn from(status: tonic::Status) -> CallError {
        match (status.code(), pushback(&status)) {
            (tonic::Code::FailedPrecondition, _) => {
                CallError::WrongModel { found: status.message().to_owned() }
            }
            (tonic::Code::Unavailable | tonic::Code::ResourceExhausted, Some(retry_after)) => {
                CallError::Overloaded { retry_after, message: status.message().to_owned() }
            }
            _ => CallError::Status(Box::new(status)),
        }
    }
}

/// A status with what is behind it: most say no more than "transport error" themselves.
fn explained(status: &tonic::Status) -> String {
    let first = std::error::Error::source(status);
    let causes = std::iter::successors(first, |error| error.source());
    causes.fold(format!("{}: {}", status.code(), status.message()), |text, cause| {
        let cause = cause.to_string();
        if text.ends_with(&cause) { text } else { text + ": " + &cause }
    })
}
