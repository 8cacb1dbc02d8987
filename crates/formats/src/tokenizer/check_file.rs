//! The wall in front of the tokenizer library: everything in a tokenizer.json that makes it panic, abort, allocate
//! without bound or give other ids than the file says is refused here, by name.
//!
//! It is not a second parser: what the library refuses well by itself is left to it.

use super::{
    check_steps,
    error::{Error, Result},
};
use serde_json::{Map, Value};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

/// Ids up to this are taken whatever the number of tokens; it bounds the holes of a small vocabulary.
const FREE_IDS: u64 = 65_536;
/// No vocabulary has more tokens.
const MAX_ID: u64 = 1 << 24;

/// What the checks learn on their way.
pub(super) struct Checked {
    /// The most by which the normalizers multiply a text's bytes.
    pub growth: u64,
}

/// The place of a complaint: a file and the vocabulary's ids by token, which later parts refer to.
pub(super) struct Place {
    pub path: PathBuf,
    pub ids: HashMap<String, u32>,
}

impl Place {
    /// A complaint on a field.
    pub fn bad(&self, field: impl Into<String>, problem: impl Into<String>, remedy: &str) -> Error {
        Error::Field { path: self.path.clone(), field: field.into(), problem: problem.into(), remedy: remedy.into() }
    }

    /// A complaint on a field of the wrong type.
    pub fn wrong_type(&self, field: impl Into<String>, wanted: &str) -> Error {
        self.bad(field, format!("is not {wanted}"), "save the tokenizer again with a current `tokenizers`")
    }

    /// A field's object.
    pub fn object<'v>(&self, value: &'v Value, field: &str) -> Result<&'v Map<String, Value>> {
        value.as_object().ok_or_else(|| self.wrong_type(field, "an object"))
    }

    /// A field's list.
    pub fn list<'v>(&self, map: &'v Map<String, Value>, at: &str, key: &str) -> Result<&'v [Value]> {
        match map.get(key) {
            Some(Value::Array(list)) => Ok(list),
            _ => Err(self.wrong_type(format!("{at}.{key}"), "a list")),
        }
    }

    /// An id that is in the vocabulary, added tokens included.
    pub fn known_id(&self, value: &Value, field: &str) -> Result<u32> {
        let id = value.as_u64().ok_or_else(|| self.wrong_type(field, "a token id"))?;
        if !self.ids.values().any(|have| u64::from(*have) == id) {
            return Err(self.bad(
                field,
                format!("is {id}, which no token has"),
                "give it the id of a token in model.vocab or added_tokens",
            ));
        }
        Ok(id as u32)
    }
}

/// Checks a tokenizer.json and takes out its padding and truncation, which are a batch's business and not a
/// vocabulary's.
pub(super) fn check(json: &mut Value, path: &Path) -> Result<Checked> {
    let mut place = Place { path: path.into(), ids: HashMap::new() };
    let Some(top) = json.as_object_mut() else {
        return Err(place.wrong_type("the outermost value", "an object"));
    };
    top.remove("padding");
    top.remove("truncation");
    if let Some(version) = top.get("version")
        && version != "1.0"
    {
        return Err(Error::Unsupported {
            path: path.into(),
            field: "version".into(),
            value: plain(version),
            supported: "1.0".into(),
        });
    }
    let Some(Value::Object(model)) = top.get_mut("model") else {
        return Err(place.bad(
            "model",
            "is missing or no object",
            "this may be another JSON file: a tokenizer.json has a `model`",
        ));
    };
    check_model(model, &mut place)?;
    check_added_tokens(top.get("added_tokens"), &mut place)?;
    let step = |key: &str| top.get(key).filter(|v| !v.is_null());
    let mut growth = 1;
    if let Some(value) = step("normalizer") {
        growth = check_steps::normalizer(value, "normalizer", &place)?;
    }
    if let Some(value) = step("pre_tokenizer") {
        check_steps::pre_tokenizer(value, "pre_tokenizer", &place)?;
    }
    if let Some(value) = step("post_processor") {
        check_steps::post_processor(value, "post_processor", &place)?;
    }
    if let Some(value) = step("decoder") {
        check_steps::decoder(value, "decoder", &place)?;
    }
    Ok(Checked { growth })
}

/// A value as a user would write it: strings without quotes, all cut to a line.
pub(super) fn plain(value: &Value) -> String {
    let text = match value {
        Value::String(s) => s.escape_debug().to_string(),
        other => other.to_string(),
    };
    text.chars().take(80).collect()
}

/// A string as it is shown in messages.
fn shown(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}

/// The model's type, written into it where an old file leaves it out.
fn model_type(model: &mut Map<String, Value>, place: &Place) -> Result<String> {
    const SUPPORTED: [&str; 4] = ["BPE", "Unigram", "WordPiece", "WordLevel"];
    let guess = || {
        let list = model.get("vocab").is_some_and(Value::is_array);
        match (list, model.contains_key("merges")) {
            (true, _) => "Unigram",
            (false, true) => "BPE",
            (false, false) if model.contains_key("max_input_chars_per_word") => "WordPiece",
            (false, false) => "WordLevel",
        }
    };
    let kind = match model.get("type") {
        None => guess().to_string(),
        Some(value) => plain(value),
    };
    if !SUPPORTED.contains(&kind.as_str()) {
        return Err(Error::Unsupported {
            path: place.path.clone(),
            field: "model.type".into(),
            value: kind,
            supported: SUPPORTED.join(", "),
        });
    }
    model.insert("type".into(), kind.clone().into());
    Ok(kind)
}

fn check_model(model: &mut Map<String, Value>, place: &mut Place) -> Result<()> {
    let kind = model_type(model, place)?;
    if kind == "Unigram" {
        return check_unigram(model, place);
    }
    check_vocabulary(model, place)?;
    match kind.as_str() {
        "BPE" => check_bpe(model, place),
        _ => check_unknown_token(model, place),
    }
}

/// `model.vocab` as an object from token to id: ids whole, unique, without a hole that no file explains.
fn check_vocabulary(model: &Map<String, Value>, place: &mut Place) -> Result<()> {
    let Some(Value::Object(vocab)) = model.get("vocab") else {
        return Err(place.wrong_type("model.vocab", "an object from token to id"));
    };
    let limit = (4 * vocab.len() as u64 + FREE_IDS).min(MAX_ID);
    let mut owners: HashMap<u64, &str> = HashMap::with_capacity(vocab.len());
    for (token, id) in vocab {
        let field = || format!("model.vocab[\"{}\"]", shown(token));
        let Some(id) = id.as_u64() else {
            return Err(place.wrong_type(field(), "a token id (a whole number, not negative)"));
        };
        if id >= limit {
            return Err(place.bad(
                field(),
                format!("is {id} in a vocabulary of {} tokens", vocab.len()),
                "ids count up from 0 without such a hole; mend the id",
            ));
        }
        if let Some(other) = owners.insert(id, token) {
            return Err(place.bad(
                field(),
                format!("is {id}, which is also the id of \"{}\"", shown(other)),
                "give each token an id of its own",
            ));
        }
        place.ids.insert(token.clone(), id as u32);
    }
    Ok(())
}

fn check_bpe(model: &Map<String, Value>, place: &Place) -> Result<()> {
    if let Some(dropout) = model.get("dropout").filter(|v| !v.is_null())
        && dropout.as_f64() != Some(0.0)
    {
        return Err(place.bad(
            "model.dropout",
            format!("is {}, which makes ids random", plain(dropout)),
            "set it to null: it belongs to training",
        ));
    }
    let prefix = match model.get("continuing_subword_prefix") {
        Some(Value::String(prefix)) => prefix.as_str(),
        _ => "",
    };
    for (index, merge) in place.list(model, "model", "merges")?.iter().enumerate() {
        check_merge(index, merge, prefix, place)?;
    }
    Ok(())
}

/// One merge: two tokens of the vocabulary whose join is a token too.
fn check_merge(index: usize, merge: &Value, prefix: &str, place: &Place) -> Result<()> {
    let field = || format!("model.merges[{index}]");
    if merge.as_str().is_some_and(|m| m.starts_with("#version")) {
        return Ok(());
    }
    let Some((left, right)) = merge_pair(merge) else {
        return Err(place.wrong_type(field(), "a pair of tokens (\"a b\" or [\"a\", \"b\"])"));
    };
    let lacking = |what: &str, token: &str| {
        place.bad(
            field(),
            format!("{what} \"{}\", which model.vocab lacks", shown(token)),
            "vocabulary and merges are of different tokenizers; take both from one",
        )
    };
    for part in [left, right] {
        if !place.ids.contains_key(part) {
            return Err(lacking("names", part));
        }
    }
    // The library cuts the prefix off without looking and panics where it is not there.
    let Some(tail) = right.get(prefix.len()..) else {
        return Err(place.bad(
            field(),
            "has a right part shorter than model.continuing_subword_prefix",
            "mend the prefix: byte-level and SentencePiece vocabularies have none",
        ));
    };
    let join = format!("{left}{tail}");
    if !place.ids.contains_key(&join) {
        return Err(lacking("makes", &join));
    }
    Ok(())
}

/// Both halves of a merge, in the old (`"a b"`) or the new (`["a", "b"]`) spelling.
pub(super) fn merge_pair(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(text) => {
            let (left, right) = text.split_once(' ')?;
            (!right.contains(' ')).then_some((left, right))
        }
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(left), Value::String(right)] => Some((left, right)),
            _ => None,
        },
        _ => None,
    }
}

fn check_unknown_token(model: &Map<String, Value>, place: &Place) -> Result<()> {
    match model.get("unk_token") {
        Some(Value::String(unk)) if place.ids.contains_key(unk) => Ok(()),
        _ => Err(place.bad(
            "model.unk_token",
            "is not a token of model.vocab",
            "name the token that stands for unknown words",
        )),
    }
}

/// Unigram: a list of token and log probability.
fn check_unigram(model: &Map<String, Value>, place: &mut Place) -> Result<()> {
    let vocab = place.list(model, "model", "vocab")?;
    if vocab.is_empty() || vocab.len() as u64 > MAX_ID {
        let problem = format!("has {} tokens", vocab.len());
        return Err(place.bad("model.vocab", problem, "download the file again"));
    }
    let mut ids = HashMap::with_capacity(vocab.len());
    for (index, entry) in vocab.iter().enumerate() {
        let field = format!("model.vocab[{index}]");
        let pair = match entry.as_array().map(Vec::as_slice) {
            Some([Value::String(token), score]) => score.as_f64().map(|s| (token, s)),
            _ => None,
        };
        let Some((token, score)) = pair else {
            return Err(place.wrong_type(field, "a pair of token and score"));
        };
        if !score.is_finite() {
            return Err(place.bad(field, "has a score that is not finite", "mend the score"));
        }
        ids.insert(token.clone(), index as u32);
    }
    let known = |id: &Value| id.as_u64().is_some_and(|id| id < vocab.len() as u64);
    if let Some(id) = model.get("unk_id").filter(|v| !v.is_null())
        && !known(id)
    {
        return Err(place.bad(
            "model.unk_id",
            format!("is {}, which no token has", plain(id)),
            "give the place of the unknown token in model.vocab, or null",
        ));
    }
    place.ids = ids;
    Ok(())
}

/// Added tokens: not empty, unique, and with the id that the library will give them (it ignores the file's).
fn check_added_tokens(tokens: Option<&Value>, place: &mut Place) -> Result<()> {
    let tokens = match tokens {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(tokens)) => tokens,
        Some(_) => return Err(place.wrong_type("added_tokens", "a list")),
    };
    let mut next = place.ids.len() as u64;
    let mut owners: HashMap<u64, &str> = HashMap::new();
    for (index, token) in tokens.iter().enumerate() {
        let field = |key: &str| format!("added_tokens[{index}].{key}");
        let Some(Value::String(content)) = token.get("content") else {
            return Err(place.wrong_type(field("content"), "a string"));
        };
        if content.is_empty() {
            let remedy = "remove the token or give it its text";
            return Err(place.bad(field("content"), "is empty", remedy));
        }
        let Some(id) = token.get("id").and_then(Value::as_u64) else {
            return Err(place.wrong_type(field("id"), "a token id"));
        };
        if let Some(other) = owners.insert(id, content)
            && other != content
        {
            return Err(place.bad(
                field("id"),
                format!("is {id}, which is also the id of \"{}\"", shown(other)),
                "give each token an id of its own",
            ));
        }
        let given = match place.ids.get(content) {
            Some(id) => u64::from(*id),
            None => {
                next += 1;
                next - 1
            }
        };
        if given != id {
            let token = shown(content);
            return Err(place.bad(
                field("id"),
                format!("is {id} and \"{token}\" gets id {given} by the rest of the file"),
                "added tokens follow the vocabulary without a hole, in the order of their ids",
            ));
        }
        place.ids.insert(content.clone(), given as u32);
    }
    Ok(())
}
