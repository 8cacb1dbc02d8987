//! Makes a GPT smaller and proves that its quality held: recipe, walker, methods, evaluation, solver, proof.
#![forbid(unsafe_code)]

mod calibrate;
pub mod data;
mod error;
pub mod evaluate;
pub mod journal;
pub mod methods;
pub mod progress;
pub mod recipe;
pub mod walk;

pub use calibrate::{Gather, Needs, Stats};
pub use error::{Error, Result};
pub use methods::{METHODS, Method, Plan, Rewrite};
pub use recipe::Recipe;
