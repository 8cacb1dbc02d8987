//! Training: a model's values, what changes them, and what survives a crash.
//!
//! The forward pass and its gradient are the model's ([`model::Backward`]); this crate holds the loop around them.
#![forbid(unsafe_code)]

pub mod checkpoint;
mod codes;
pub mod course;
pub mod data;
pub mod distil;
mod error;
mod holes;
mod learner;
pub mod lines;
mod lora;
mod muon;
mod optimizer;
pub mod progress;
pub mod ranks;
mod schedule;
mod sequences;
mod sums;
mod wire;

pub use error::{Error, Result};
pub use learner::{Learner, Precision, Scaling, Stepped};
pub use lora::Lora;
pub use optimizer::{Kind as OptimizerKind, Rule};
pub use schedule::{Curve, Schedule};
pub use sequences::Sequences;
