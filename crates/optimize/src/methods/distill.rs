//! Distillation from the original (arXiv 1503.02531): heals what an earlier step broke.

use super::{Method, Plan};
use crate::heal::Healing;

/// The method.
pub static DISTILL: Method = Method {
    name: "distill",
    about: "Teaches the model as it stands to say what the original says; storage = \"keep\".",
    paper: "arXiv 1503.02531",
    cost: "steps x batch x context tokens of training; 24 bytes a parameter and both models",
    build: |o| Ok(Plan::Learned(Box::new(Healing::read("distill", o)?))),
};
