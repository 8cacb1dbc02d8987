//! Chat templates: Jinja from a stranger's file, rendered as transformers does, within bounds.
//!
//! There is no loader, no file, no network; work is bounded by fuel, memory by counting what values are joined of
//! (see `guard`), output by a limit. A template that exceeds a bound is an error and never a wrong prompt.

mod guard;
mod python;

use guard::{Guarded, Meter};
use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use std::{io, sync::Arc};

/// Bytes that a template may have; the longest public ones have about 20,000.
const MAX_TEMPLATE: usize = 256 << 10;
/// Steps that a template may take: real ones take some thousands.
const MAX_FUEL: u64 = 2_000_000;
/// Bytes of fixed text that all steps together may write.
const MAX_FIXED: u64 = 256 << 20;
/// Bytes that it may write.
const MAX_OUTPUT: usize = 16 << 20;

/// Why a template fails.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is no valid Jinja, uses what is not supported, or raises an exception itself.
    #[error("chat_template: {0}; give another with --template, or use `generate`, which needs none")]
    Template(String),
    /// It takes more steps or memory than any real template.
    #[error(
        "chat_template: takes more steps or memory than any real template; give another with --template, or use `generate`, which needs none"
    )]
    TooMuch,
    /// It wrote more than a prompt can be.
    #[error("chat_template: writes more than 16 MiB; give another with --template, or a shorter conversation")]
    TooLong,
}

/// One turn of a conversation.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// Writes a conversation as the model was trained to read it.
///
/// `bos` and `eos` are the tokens' own spellings; `generation_prompt` opens the answer.
///
/// # Errors
/// If the template is malformed, raises an exception or exceeds its bounds.
pub fn render(
    template: &str,
    messages: &[Message],
    bos: &str,
    eos: &str,
    generation_prompt: bool,
) -> Result<String, Error> {
    let none = serde_json::Map::new();
    render_with(template, messages, bos, eos, generation_prompt, &none)
}

/// As [`render`], with more variables for the template (`enable_thinking`, `tools`, `documents` ...).
///
/// # Errors
/// As [`render`].
pub fn render_with(
    template: &str,
    messages: &[Message],
    bos: &str,
    eos: &str,
    generation_prompt: bool,
    extra: &serde_json::Map<String, serde_json::Value>,
) -> Result<String, Error> {
    if template.len() > MAX_TEMPLATE {
        return Err(Error::Template(format!("has {} bytes", template.len())));
    }
    let guarded = guard::guard(template).map_err(Error::Template)?;
    let meter = Arc::new(Meter::default());
    let env = environment(&guarded, &meter);
    let mut vars = serde_json::Map::new();
    for (key, value) in extra {
        vars.insert(key.clone(), value.clone());
    }
    vars.insert("bos_token".into(), bos.into());
    vars.insert("eos_token".into(), eos.into());
    vars.insert("add_generation_prompt".into(), generation_prompt.into());
    vars.insert("messages".into(), messages.iter().map(message_json).collect::<Vec<_>>().into());
    let mut out = Capped(Vec::new());
    let template = env.template_from_named_str("chat_template", &guarded.source).map_err(fail)?;
    template.render_captured_to(Value::from_serialize(&vars), &mut out).map_err(fail)?;
    String::from_utf8(out.0).map_err(|e| Error::Template(e.to_string()))
}

fn message_json(message: &Message) -> serde_json::Value {
    serde_json::json!({"role": message.role, "content": message.content})
}

fn fail(error: minijinja::Error) -> Error {
    match error.kind() {
        ErrorKind::OutOfFuel => return Error::TooMuch,
        ErrorKind::WriteFailure => return Error::TooLong,
        _ => {}
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    if text.contains(guard::TOO_MUCH) {
        return Error::TooMuch;
    }
    Error::Template(text)
}

/// Jinja as `transformers.apply_chat_template` sets it up, less what multiplies memory.
fn environment(guarded: &Guarded, meter: &Arc<Meter>) -> Environment<'static> {
    let mut env = Environment::new();
    let longest = guarded.longest_text.max(1) as u64;
    env.set_fuel(Some((MAX_FIXED / longest).min(MAX_FUEL)));
    env.set_recursion_limit(64);
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_unknown_method_callback(python::method);
    for filter in [
        "batch",
        "slice",
        "urlencode",
        "escape",
        "e",
        "format",
        "pprint",
        "sum",
        "groupby",
        "zip",
        "chain",
        "center",
        "wordwrap",
        "indent",
        "lines",
    ] {
        env.remove_filter(filter);
    }
    env.add_function("raise_exception", |message: String| {
        Err::<Value, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", |format: String| python::now(&format));
    let own = meter.clone();
    env.add_filter(guard::FILTER, move |value: Value| own.pass(value));
    let own = meter.clone();
    env.add_filter("tojson", move |value: Value, kwargs: minijinja::value::Kwargs| {
        own.count(&value)?;
        python::to_json(&value, &kwargs)
    });
    let own = meter.clone();
    env.add_filter("string", move |value: Value| {
        own.count(&value)?;
        Ok::<_, minijinja::Error>(value.to_string())
    });
    let own = meter.clone();
    env.add_filter("join", move |list: Value, by: Option<String>| own.join(&list, by.as_deref()));
    let own = meter.clone();
    env.add_filter("replace", move |text: String, from: String, to: String| own.replace(&text, &from, &to));
    let own = meter.clone();
    env.set_formatter(move |out, state, value| {
        own.count(value)?;
        minijinja::escape_formatter(out, state, value)
    });
    env
}

/// A writer that refuses what is more than a prompt can be.
struct Capped(Vec<u8>);

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
