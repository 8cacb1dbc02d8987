//! What can go wrong while a model learns.

use std::path::PathBuf;

/// Why training cannot begin or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A fault of the model or its files.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// A fault of another file.
    #[error(transparent)]
    File(#[from] formats::Error),
    /// The tokenizer fails.
    #[error(transparent)]
    Tokenizer(#[from] formats::tokenizer::Error),
    /// The data are of no use.
    #[error("{path}: {reason}")]
    Data {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would do.
        reason: String,
    },
    /// What was asked cannot be done.
    #[error("{0}")]
    Asked(String),
    /// A number grew beyond all bounds.
    #[error(
        "step {step}: {what} is not finite (tokens {from} to {to} of the data's order); the last checkpoint is kept. Lower --lr, or look at the data there"
    )]
    NotFinite {
        /// The step, counted from 1.
        step: u64,
        /// The loss, or the parameter whose gradient it is.
        what: String,
        /// First token of the step, in the order in which they are learned.
        from: u64,
        /// The token after the last one.
        to: u64,
    },
    /// Another rank failed, and says why.
    #[error("another rank failed; its message says why")]
    Elsewhere,
    /// The user interrupted the job; what is finished is kept.
    #[error("interrupted; run the same command again to go on from where it stopped")]
    Interrupted,
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
