//! Families as data: how a configuration reads, and how files store each site.
//!
//! One file per family and one line in [`FAMILIES`]. Only this folder holds the tensor names of Hugging Face
//! and GGUF files; the same tables serve loading and saving.

mod gemma;
mod gemma_gguf;
mod gguf_keys;
mod gpt2;
mod gpt_neox;
mod llama;
mod mistral;
mod phi3;
mod qwen;
mod rope;
mod rope_gguf;
pub(crate) mod stored;
mod window;

pub use gguf_keys::{GgufKey, Kind};
pub use stored::{Layout, Part, Stored};

use crate::{Config, Error, Result, Spec};
use formats::gguf;
use serde_json::{Map, Value};

/// One family of GPTs.
pub struct Family {
    /// Its name in reports.
    pub name: &'static str,
    /// Values of `architectures[0]` or `model_type` in `config.json` that it serves.
    pub architectures: &'static [&'static str],
    /// A JSON object of what transformers assumes for fields that a `config.json` leaves out.
    pub assumed: &'static str,
    /// Reads a configuration.
    pub spec: fn(&Config) -> Result<Spec>,
    /// How Hugging Face files store its sites.
    pub stored: &'static [Stored],
    /// How GGUF files describe it; `None` where llama.cpp does not compute this family.
    pub gguf: Option<GgufFamily>,
}

/// A family as GGUF files hold it.
pub struct GgufFamily {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Metadata keys and the configuration fields they stand for.
    pub keys: &'static [GgufKey],
    /// How GGUF files store its sites.
    pub stored: &'static [Stored],
    /// Fields of the configuration that no key carries, for a model that is read from GGUF.
    pub defaults: &'static str,
    /// Why llama.cpp would not compute this very model, if it would not.
    pub refuses: fn(&Spec, &Config) -> Option<String>,
    /// Fields that take more than a key to read, such as rotary scaling.
    pub read_more: fn(&gguf::File, &mut Map<String, Value>) -> Result<()>,
    /// Metadata and tensors that take more than a field to write.
    pub write_more: fn(&Config, &Spec, &mut gguf::Writer<'_>) -> Result<()>,
}

/// Every family, one line each.
pub static FAMILIES: &[&Family] = &[
    &llama::LLAMA,
    &mistral::MISTRAL,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &phi3::PHI3,
    &gpt2::GPT2,
    &gpt_neox::GPT_NEOX,
];

/// The family that serves a configuration.
///
/// # Errors
/// If none does; the message lists what there is.
pub fn find(config: &Config) -> Result<&'static Family> {
    let architecture = config.architecture()?;
    FAMILIES.iter().copied().find(|f| f.architectures.contains(&architecture)).ok_or_else(|| Error::UnknownFamily {
        path: config.path().into(),
        architecture: architecture.into(),
        known: known(),
    })
}

/// The families whose GGUF architecture has that name; several may share one.
pub fn of_gguf(architecture: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|f| f.gguf.as_ref().is_some_and(|g| g.architecture == architecture))
}

/// The names of all architectures, for messages.
pub fn known() -> String {
    let names: Vec<_> = FAMILIES.iter().map(|f| f.architectures[0]).collect();
    names.join(", ")
}
