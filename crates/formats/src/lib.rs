//! Files: safetensors, GGUF, importance matrices, JSON, tokenizer, chat template. Hostile bytes in, typed errors out.
//!
//! No file causes a panic, an abort or an allocation that its size does not justify. This crate knows no model.
#![forbid(unsafe_code)]

pub mod atomic;
pub mod chat_template;
mod dtype;
mod error;
pub mod gguf;
pub mod imatrix;
pub mod json;
pub mod parquet;
pub mod quantized;
pub mod safetensors;
pub mod tokenizer;

pub use dtype::Dtype;
pub use error::{Error, Result, check_kind};
