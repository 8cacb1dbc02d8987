//! Quantization-aware training: the model learns from the original while it runs on its codes.

use super::{Method, Plan};
use crate::heal::Healing;

/// The method.
pub static QAT: Method = Method {
    name: "qat",
    about: "Trains values and scales on what their codes stand for, to say what the original says.",
    paper: "arXiv 1902.08153 (learned scales), 1308.3432 (straight through)",
    cost: "steps x batch x context tokens of training; 24 bytes a parameter and both models",
    build: |o| Ok(Plan::Learned(Box::new(Healing::read("qat", o)?))),
};
