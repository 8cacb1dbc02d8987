//! A GPT that runs: sites, families as data, one decoder, cache, generation, load and save.
//!
//! Only `families/` holds the tensor names of Hugging Face and GGUF files.
#![forbid(unsafe_code)]

pub mod adapter;
mod adapting;
mod aim;
mod backward;
mod cache;
mod config;
mod decoder;
mod error;
pub mod families;
mod frozen;
pub mod generate;
mod gpt;
mod layout;
pub mod load;
mod model;
mod narrow;
mod parameters;
mod profile;
mod rotate;
mod runner;
mod sample;
pub mod save;
mod shape;
mod site;
mod source;
pub mod spec;
pub mod speculate;
mod tap;
mod vocabulary;

pub use adapter::{Adapter, Adapters, Branch, Change};
pub use aim::{Aim, Heads, Likelihood, Tokens};
pub use backward::{Asked, Backward, BlockBackward, Tell};
pub use cache::Cache;
pub use config::Config;
pub use decoder::{Flow, Kept, Stage};
pub use error::{Error, Result};
pub use families::Family;
pub use gpt::Gpt;
pub use model::{Model, NormWeights};
pub use narrow::{Channels, Widths};
pub use parameters::{Bucket, Parameters};
pub use profile::{Operation, Profile};
pub use rotate::{Bases, Changed, Turn};
pub use runner::{Runner, Wanted};
pub use sample::{Sampling, uniform};
pub use shape::Drawn;
pub use site::{NoSite, ROLES, Role, Site};
pub use spec::{BlockSpec, Spec};
pub use tap::{Point, Tap};
