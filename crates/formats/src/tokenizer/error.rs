//! What can be wrong with a tokenizer, each with the file, the field and the remedy.

use std::path::PathBuf;

/// The module's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a tokenizer cannot be read, used or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read, is of another kind, or is not JSON.
    #[error(transparent)]
    File(#[from] crate::Error),
    /// The file is larger than any real one.
    #[error("{path}: has {size} bytes and a tokenizer has at most {limit}; check that this is the tokenizer file")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// The most that is read.
        limit: u64,
    },
    /// A field is missing, of another type, or has a value that cannot be right.
    #[error("{path}: `{field}` {problem}; {remedy}")]
    Field {
        /// The file, or the GGUF's metadata.
        path: PathBuf,
        /// Where in it, with dots and indices.
        field: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A field names a part that this program does not have.
    #[error("{path}: `{field}` is `{value}`, which is not supported; supported are {supported}")]
    Unsupported {
        /// The file, or the GGUF's metadata.
        path: PathBuf,
        /// Where in it.
        field: String,
        /// The value.
        value: String,
        /// The values that are supported.
        supported: String,
    },
    /// The checks found nothing and the library refuses it all the same.
    #[error("{path}: the tokenizer library refuses it: {problem}; save it again with a current `tokenizers`")]
    Library {
        /// The file.
        path: PathBuf,
        /// The library's words.
        problem: String,
    },
    /// A text cannot be encoded, or ids cannot be decoded.
    #[error("cannot {doing}: {problem}")]
    Text {
        /// `encode the text` or `decode the ids`.
        doing: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The tokenizer would give other ids in a GGUF.
    #[error(
        "this tokenizer cannot be stored in a GGUF so that it gives the same ids: {reason}; export to safetensors keeps it"
    )]
    NotRepresentable {
        /// Which part, and why.
        reason: String,
    },
}
