//! The built-in sample GPT and the story grammar that it was trained on.
#![forbid(unsafe_code)]
