//! The built-in sample GPT and the story grammar that it was trained on.
//!
//! The sample shows what planish does before a user has a model at hand; its README tells how it was made.
#![forbid(unsafe_code)]

mod random;
mod stories;
mod words;

pub use stories::{Story, score, story};

/// The sample's files, by name: a Hugging Face directory.
pub fn files() -> [(&'static str, &'static [u8]); 5] {
    [
        ("config.json", include_bytes!("../gpt/config.json")),
        ("generation_config.json", include_bytes!("../gpt/generation_config.json")),
        ("tokenizer.json", include_bytes!("../gpt/tokenizer.json")),
        ("tokenizer_config.json", include_bytes!("../gpt/tokenizer_config.json")),
        ("model.safetensors", include_bytes!("../gpt/model.safetensors")),
    ]
}
