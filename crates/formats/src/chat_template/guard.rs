//! What keeps a template's memory bounded: its joins are counted.
//!
//! Jinja's fuel bounds steps and not sizes: forty times `x = x ~ x` are few steps and a terabyte. So every operand in
//! front of `~`, `+` or a comma of a list, dictionary or call gets a filter that adds its size to a total; a value can
//! then at most be twice what was counted and read. Multiplication, which repeats texts, is refused.

use minijinja::{ErrorKind, Value, value::ValueKind};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The filter's name; no template has it.
pub(super) const FILTER: &str = "planish_counted";
/// The message by which an exhausted total is recognised.
pub(super) const TOO_MUCH: &str = "more memory than any real template";
/// Bytes that all counted values of one rendering may have together.
const MAX_TOTAL: usize = 96 << 20;
/// What a value in a list costs besides its text: steps rather than memory, since lists are joined lazily.
const VALUE: usize = 256;
/// How deep values may be nested.
const MAX_DEPTH: usize = 64;

/// The bytes counted so far.
#[derive(Debug, Default)]
pub(super) struct Meter(AtomicUsize);

type Result<T> = std::result::Result<T, minijinja::Error>;

fn too_much() -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, TOO_MUCH)
}

impl Meter {
    /// Counts a value and gives it back.
    pub fn pass(&self, value: Value) -> Result<Value> {
        self.count(&value)?;
        Ok(value)
    }

    /// Adds a value's size, written out.
    pub fn count(&self, value: &Value) -> Result<()> {
        self.walk(value, 0)
    }

    fn add(&self, bytes: usize) -> Result<()> {
        let before = self.0.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > MAX_TOTAL {
            // The counter must not wrap while an error travels up.
            self.0.store(MAX_TOTAL, Ordering::Relaxed);
            return Err(too_much());
        }
        Ok(())
    }

    fn walk(&self, value: &Value, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(too_much());
        }
        match value.kind() {
            ValueKind::String => self.add(value.as_str().map_or(0, str::len)),
            ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => {
                self.add(VALUE)?;
                let map = value.kind() == ValueKind::Map;
                for item in value.try_iter()? {
                    self.add(VALUE)?;
                    self.walk(&item, depth + 1)?;
                    if map {
                        self.walk(&value.get_item(&item)?, depth + 1)?;
                    }
                }
                Ok(())
            }
            _ => self.add(1),
        }
    }

    /// Joins a list's texts.
    pub fn join(&self, list: &Value, by: Option<&str>) -> Result<String> {
        let by = by.unwrap_or("");
        let mut out = String::new();
        for (index, item) in list.try_iter()?.enumerate() {
            self.add(by.len())?;
            self.count(&item)?;
            if index > 0 {
                out.push_str(by);
            }
            out.push_str(&item.to_string());
        }
        Ok(out)
    }

    /// Replaces every occurrence.
    pub fn replace(&self, text: &str, from: &str, to: &str) -> Result<String> {
        let places = text.matches(from).count();
        self.add(text.len().saturating_add(places.saturating_mul(to.len())))?;
        Ok(text.replace(from, to))
    }
}

/// A template with its joins counted.
pub(super) struct Guarded {
    /// The template to render.
    pub source: String,
    /// The longest piece of fixed text.
    pub longest_text: usize,
}

/// Inserts the filter, takes out the tags that only training needs, and refuses what cannot be bounded.
pub(super) fn guard(template: &str) -> std::result::Result<Guarded, String> {
    let mut source = String::with_capacity(template.len() * 2);
    let mut longest_text = 0;
    let mut rest = template;
    let mut raw = false;
    while let Some(at) = next_tag(rest) {
        let (text, tag) = rest.split_at(at);
        longest_text = longest_text.max(text.len());
        source.push_str(text);
        let kind = &tag[..2];
        let end = tag_end(tag).ok_or_else(|| format!("has a `{kind}` without its end"))?;
        let (tag, after) = tag.split_at(end);
        rest = after;
        let word = keyword(tag);
        match (kind, word) {
            ("{%", "raw") => raw = true,
            ("{%", "endraw") => raw = false,
            _ => {}
        }
        match (kind, word) {
            _ if raw || kind == "{#" => source.push_str(tag),
            // These mark the assistant's words for training; around them whitespace control is all that counts.
            ("{%", "generation" | "endgeneration") => {
                source.push_str(
                    &tag.replacen(word, "if true", usize::from(word == "generation")).replace("endgeneration", "endif"),
                );
            }
            _ => rewrite(tag, word, &mut source)?,
        }
    }
    longest_text = longest_text.max(rest.len());
    source.push_str(rest);
    Ok(Guarded { source, longest_text })
}

/// Where the next `{{`, `{%` or `{#` is.
fn next_tag(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    (0..bytes.len().saturating_sub(1)).find(|at| bytes[*at] == b'{' && matches!(bytes[at + 1], b'{' | b'%' | b'#'))
}

/// Where the tag that a text begins with ends; quoted texts may hold what looks like an end.
fn tag_end(tag: &str) -> Option<usize> {
    let close = match &tag[..2] {
        "{{" => "}}",
        "{%" => "%}",
        _ => return tag.find("#}").map(|at| at + 2),
    };
    let mut braces = 0usize;
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in tag.char_indices().skip(2) {
        match (quote, c) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), '\\') => escaped = true,
            (Some(q), c) if q == c => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, _) if braces == 0 && tag[at..].starts_with(close) => return Some(at + 2),
            (None, '{') => braces += 1,
            (None, '}') => braces = braces.saturating_sub(1),
            _ => {}
        }
    }
    None
}

/// The first word of a tag.
fn keyword(tag: &str) -> &str {
    let inner = tag[2..].trim_start_matches(['-', '+']).trim_start();
    let end = inner.find(|c: char| !c.is_alphanumeric() && c != '_');
    &inner[..end.unwrap_or(inner.len())]
}

/// Copies a tag with the filter behind every operand that a join follows.
fn rewrite(tag: &str, word: &str, out: &mut String) -> std::result::Result<(), String> {
    // In a loop's head, what stands before `in` are names and not operands; so are a macro's parameters.
    let names_until_in = word == "for" && tag.starts_with("{%");
    let names_only = matches!(word, "macro" | "call") && tag.starts_with("{%");
    let mut operands = !names_until_in;
    let mut brackets: Vec<char> = Vec::new();
    let mut quote = None;
    let mut escaped = false;
    let inner_end = tag.len() - 2;
    for (at, c) in tag.char_indices() {
        let inside = at > 2 && at < inner_end;
        // `{%+` and `+%}` are whitespace control.
        let control = at <= 2 || at + 1 == inner_end;
        match (quote, c) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), '\\') => escaped = true,
            (Some(q), c) if q == c => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, '(' | '[' | '{') if inside => brackets.push(c),
            (None, ')' | ']' | '}') if inside => {
                brackets.pop();
            }
            (None, '*') if inside => return Err("multiplies, which is not supported here".into()),
            (None, '~') if inside => join(out),
            (None, '+') if inside && !control => join(out),
            (None, ',') if operands && !names_only && !brackets.is_empty() => join(out),
            (None, ' ') if names_until_in && tag[at..].starts_with(" in ") => operands = true,
            _ => {}
        }
        out.push(c);
    }
    Ok(())
}

/// Puts the filter behind the operand that ends here; a comma behind a comma, which is a fault, stays one.
fn join(out: &mut String) {
    let kept = out.trim_end().len();
    let space = out.split_off(kept);
    out.push('|');
    out.push_str(FILTER);
    out.push_str(&space);
}
