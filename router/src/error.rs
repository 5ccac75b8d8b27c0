//! What this crate refuses.

/// A setting that makes no sense. Decisions themselves cannot fail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A field of a [`Gate`](crate::Gate) contradicts another, or itself.
    #[error("gate: {field} is {found}, expected {expected}")]
    Gate {
        /// The field's name.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// A field of a [`LinkConfig`](crate::LinkConfig) contradicts another, or itself.
    #[error("link: {field} is {found}, expected {expected}")]
    Link {
        /// The field's name.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// No degradation policy has this name.
    #[error("policy is {found:?}, expected leave-out, renormalise or reroute")]
    Policy {
        /// The name that was given.
        found: String,
    },
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;
