//! Makes a GPT smaller and proves that its quality held: recipe, walker, methods, evaluation, solver, proof.
#![forbid(unsafe_code)]

mod activations;
pub mod artefact;
pub mod audit;
mod blocks;
pub mod builtin;
mod calibrate;
pub mod changes;
mod course;
pub mod create;
pub mod data;
mod error;
pub mod evaluate;
pub mod export;
pub mod gate;
pub mod gradients;
mod heal;
pub mod journal;
pub mod lesson;
pub mod manifest;
pub mod methods;
pub mod mixes;
pub mod optimize;
pub mod plan;
pub use train::progress;
pub mod recipe;
pub mod report;
pub mod run;
pub mod solve;
pub mod speed;
pub mod stats;
pub mod teach;
pub mod walk;
pub mod written;

pub use blocks::{Batch, Block, BlockRewrite, Texts};
pub use calibrate::{Gather, Needs, Stats, reader};
pub use error::{Error, Result};
pub use methods::{METHODS, Method, Plan, Rewrite};
pub use recipe::Recipe;
