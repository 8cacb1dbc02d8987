//! What can go wrong while a model is made smaller, by the exit code that it deserves.

use model::Site;
use std::path::PathBuf;

/// Why a job cannot begin or go on.
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
    /// A fault of the data, or an interruption.
    #[error(transparent)]
    Train(#[from] train::Error),
    /// The recipe is malformed or asks for what is not there.
    #[error("recipe: {0}")]
    Recipe(String),
    /// A method's options are wrong.
    #[error("method {method}: {reason}")]
    Options {
        /// The method.
        method: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A storage has no such name.
    #[error(transparent)]
    Storage(#[from] tensor::grid::GridError),
    /// A weight cannot be treated as asked.
    #[error("{site}: {reason}")]
    Site {
        /// The site.
        site: Site,
        /// What is wrong and what would do.
        reason: String,
    },
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
    /// The result did not meet its floor, or no recipe meets the target.
    #[error("{0}")]
    Gate(String),
    /// The job would take more memory than it may.
    #[error(
        "the job takes about {needed} bytes of memory and may use {allowed}; lower --calibration-tokens, free some, or raise --max-ram"
    )]
    Memory {
        /// What it takes.
        needed: u64,
        /// What it may use.
        allowed: u64,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
