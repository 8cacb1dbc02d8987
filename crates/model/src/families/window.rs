//! Which blocks see only the last positions, from `layer_types` or the older fields that it replaced.

use crate::{Config, Result, Spec};
use formats::gguf;

/// The window of each of `layers` blocks: `width` where the block slides, `None` where it sees everything.
///
/// `layer_types` decides where a configuration has it, else `slides` does.
///
/// # Errors
/// If `layer_types` is malformed.
pub fn windows(
    config: &Config,
    layers: u16,
    width: Option<usize>,
    slides: impl Fn(u16) -> bool,
) -> Result<Vec<Option<usize>>> {
    Ok(sliding(config, layers, slides)?.into_iter().map(|slides| if slides { width } else { None }).collect())
}

/// Which of `layers` blocks slide.
///
/// # Errors
/// If `layer_types` is malformed.
pub fn sliding(config: &Config, layers: u16, slides: impl Fn(u16) -> bool) -> Result<Vec<bool>> {
    let Some(types) = config.get("layer_types") else { return Ok((0..layers).map(slides).collect()) };
    let kinds = types.as_array().filter(|t| t.len() == usize::from(layers));
    let kinds = kinds
        .ok_or_else(|| config.error("layer_types", format!("must list the kind of each of the {layers} blocks")))?;
    let kind = |k: &serde_json::Value| match k.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(config.error("layer_types", format!("holds {k}; planish knows full_attention and sliding_attention"))),
    };
    kinds.iter().map(kind).collect()
}

/// The fewest positions that a GGUF is worth writing for.
const LEAST_CONTEXT: usize = 1024;

/// The longest text that an engine without windows computes as the model means it.
pub fn windowless_context(spec: &Spec) -> usize {
    spec.blocks.iter().filter_map(|b| b.window).fold(spec.context, usize::min)
}

/// Why an engine without windows does not serve a model: its windows are too narrow to do without them.
pub fn too_narrow(spec: &Spec) -> Option<String> {
    let window = windowless_context(spec);
    (window < spec.context.min(LEAST_CONTEXT)).then(|| {
        format!(
            "llama.cpp computes this architecture without windows, and this model's blocks see only {window} positions"
        )
    })
}

/// States the context of [`windowless_context`] in a GGUF.
pub fn write_context(arch: &str, spec: &Spec, out: &mut gguf::Writer<'_>) {
    out.set(format!("{arch}.context_length"), gguf::Value::U32(windowless_context(spec) as u32));
}
