//! What can be wrong with a model, in words that name the file, the field or the site and the remedy.

use crate::Site;
use std::path::PathBuf;

/// Why a model cannot be read, run or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the model is malformed.
    #[error(transparent)]
    Format(#[from] formats::Error),
    /// The tokenizer is malformed.
    #[error(transparent)]
    Tokenizer(#[from] formats::tokenizer::Error),
    /// The chat template fails.
    #[error(transparent)]
    Template(#[from] formats::chat_template::Error),
    /// A path that is neither a model directory nor a GGUF file.
    #[error("{path}: {reason}")]
    NoModel {
        /// The path that was given.
        path: PathBuf,
        /// What was found, and what would do.
        reason: String,
    },
    /// No family knows the architecture.
    #[error("{path}: no family knows the architecture {architecture:?}; planish runs {known}")]
    UnknownFamily {
        /// The configuration.
        path: PathBuf,
        /// Its `architectures` entry or GGUF `general.architecture`.
        architecture: String,
        /// What there is.
        known: String,
    },
    /// A field of the configuration is missing or of no use.
    #[error("{path}: `{field}` {reason}")]
    Config {
        /// The configuration.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A tensor is missing or has the wrong shape or type.
    #[error("{path}: tensor {name:?} {reason}")]
    Tensor {
        /// The file or directory.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A weight is wrong for its site.
    #[error("{site}: {reason}")]
    Site {
        /// The site.
        site: Site,
        /// What is wrong.
        reason: String,
    },
    /// There is no memory to lay the weights out in.
    #[error(
        "no memory for {bytes} bytes of weights laid out for speed: {source}. Use --exact, which keeps them in their file, or a smaller model"
    )]
    NoRoom {
        /// Bytes that they take.
        bytes: usize,
        /// What the system says.
        source: std::io::Error,
    },
    /// What was asked of the model does not fit it.
    #[error("{0}")]
    Asked(String),
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
