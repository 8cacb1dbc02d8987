//! The built-in sample GPT and the story grammar that it was trained on.
//!
//! The sample shows what planish does before a user has a model at hand; its README tells how it was made.
#![forbid(unsafe_code)]

mod random;
mod stories;
mod words;

pub use stories::{Story, score, story};
