//! JSONL and Parquet: a document to a line or a row, as data sets for fine-tuning are published.
//!
//! `{"text": ...}` is learned whole; of `{"prompt": ..., "completion": ...}` and `{"messages": [{"role": ..., "content":
//! ...}]}` only what the assistant says is.

use crate::{
    Error, Result,
    data::{Document, percentile, read_text},
};
use formats::chat_template::Message;
use model::Gpt;
use serde::Deserialize;
use std::path::Path;

/// A line; fields that it has beside these are of no matter.
#[derive(Deserialize)]
struct Line {
    text: Option<String>,
    prompt: Option<String>,
    completion: Option<String>,
    messages: Option<Vec<Message>>,
}

/// The fields of a line.
const FIELDS: [&str; 4] = ["text", "prompt", "completion", "messages"];

/// What documents are read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be learned: what a conversation's answers are must be clear.
    Learning,
    /// To be read as the model would, whole.
    Reading,
}

/// Reads the documents of a JSONL file.
///
/// # Errors
/// If it cannot be read, or a line is not what it should be; the error names the line.
pub fn documents(path: &Path, gpt: &Gpt, purpose: Purpose) -> Result<Vec<Document>> {
    let text = read_text(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parsed = lines.map(|(number, line)| (format!("line {}", number + 1), serde_json::from_str(line), line.into()));
    collect(path, gpt, purpose, parsed)
}

/// Reads the documents of a Parquet file, which has the fields of a line as columns.
///
/// # Errors
/// As [`documents`]; the error names the row.
pub fn table(path: &Path, gpt: &Gpt, purpose: Purpose) -> Result<Vec<Document>> {
    let rows = formats::parquet::rows(path, &FIELDS)?;
    let parsed = rows.into_iter().enumerate().map(|(number, row)| {
        let text = row.to_string();
        (format!("row {}", number + 1), serde_json::from_value(row), text)
    });
    collect(path, gpt, purpose, parsed)
}

/// The documents of lines: where each stands, what it says, and its text.
fn collect(
    path: &Path,
    gpt: &Gpt,
    purpose: Purpose,
    lines: impl Iterator<Item = (String, serde_json::Result<Line>, String)>,
) -> Result<Vec<Document>> {
    let mut all = Vec::new();
    for (place, line, text) in lines {
        let bad = |reason: String| Error::Data { path: path.into(), reason: format!("{place} {reason}") };
        let line = line.map_err(|e| bad(format!("is not what was expected: {e}")))?;
        let (ids, learned) = document(gpt, purpose, line).map_err(|e| match e {
            Error::Asked(reason) => bad(reason),
            other => other,
        })?;
        if ids.len() > 1 {
            all.push(Document { ids, bytes: 0, percentile: percentile(text.as_bytes()), learned });
        }
    }
    Ok(all)
}

fn document(gpt: &Gpt, purpose: Purpose, line: Line) -> Result<Marked> {
    match line {
        Line { messages: Some(messages), .. } if purpose == Purpose::Reading => {
            Ok((gpt.tokenizer.encode(&gpt.conversation(&messages, false)?, false)?, None))
        }
        Line { messages: Some(messages), .. } => conversation(gpt, &messages),
        Line { prompt: Some(prompt), completion: Some(completion), .. } => completed(gpt, &prompt, &completion),
        Line { text: Some(text), .. } => Ok((ended(gpt, gpt.tokenizer.encode(&text, true)?), None)),
        _ => {
            let known = "a \"text\", a \"prompt\" with its \"completion\", or \"messages\"";
            Err(Error::Asked(format!("has none of these: {known}")))
        }
    }
}

/// Tokens, and which of them are learned.
type Marked = (Vec<u32>, Option<Vec<bool>>);

/// With the token that ends a text, unless the tokenizer adds it.
fn ended(gpt: &Gpt, mut ids: Vec<u32>) -> Vec<u32> {
    ids.extend(gpt.tokenizer.eos().filter(|_| !gpt.tokenizer.adds_eos()));
    ids
}

fn completed(gpt: &Gpt, prompt: &str, completion: &str) -> Result<Marked> {
    let mut ids = gpt.tokenizer.encode(prompt, true)?;
    if gpt.tokenizer.adds_eos() {
        // The text goes on.
        ids.pop();
    }
    let asked = ids.len();
    ids.extend(gpt.tokenizer.encode(completion, false)?);
    ids.extend(gpt.tokenizer.eos());
    let learned = (0..ids.len()).map(|i| i >= asked).collect();
    Ok((ids, Some(learned)))
}

/// What the assistant says is what its turn adds to the conversation before it. A token that joins the end of the question
/// with the beginning of the answer counts as the answer's.
fn conversation(gpt: &Gpt, messages: &[Message]) -> Result<Marked> {
    let encode = |text: &str| Ok::<_, Error>(gpt.tokenizer.encode(text, false)?);
    let whole = gpt.conversation(messages, false)?;
    let ids = encode(&whole)?;
    let mut learned = vec![false; ids.len()];
    for (i, _) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
        let (before, after) = (gpt.conversation(&messages[..i], true)?, gpt.conversation(&messages[..=i], false)?);
        if !after.starts_with(&before) || !whole.starts_with(&after) {
            return Err(Error::Asked(format!(
                "has an answer (message {}) that the chat template writes otherwise once the conversation goes on, so what \
                 is to be learned is not clear; cut the conversation after it",
                i + 1
            )));
        }
        let place = |text: &str| Ok::<_, Error>(encode(text)?.iter().zip(&ids).take_while(|(a, b)| a == b).count());
        learned[place(&before)?..place(&after)?].fill(true);
    }
    if !learned.contains(&true) {
        return Err(Error::Asked("has no message of the role \"assistant\" to learn".into()));
    }
    Ok((ids, Some(learned)))
}
