//! A tokenizer.json as a GGUF's vocabulary, or the reason why llama.cpp would give other ids.
//!
//! Three kinds can be stored: byte-level merges whose cutting has a name (`gpt2`); SentencePiece-like merges, whose
//! order becomes scores (`llama`), held to llama.cpp's merging rule on many texts before they are given out; and
//! vocabularies of single ASCII characters (`gpt2` without merges).

use super::{
    Error, GgufVocab, Result, TokenType, Tokenizer,
    check_file::{merge_pair, plain},
    pre_name::{self, GPT2},
    spm::Merger,
};
use serde_json::{Map, Value};
use std::{collections::HashMap, path::Path};

/// Texts on which a conversion to scores is compared with the tokenizer.
const TRIALS: usize = 4_000;

/// Stores a tokenizer as a GGUF's metadata, as llama.cpp's `convert_hf_to_gguf.py` does.
///
/// # Errors
/// [`Error::NotRepresentable`] with the reason where llama.cpp would give other ids.
pub fn to_gguf(tokenizer: &Tokenizer) -> Result<GgufVocab> {
    let json = crate::json::parse(Path::new("tokenizer.json"), tokenizer.json().as_bytes())?;
    let model = json.get("model").and_then(Value::as_object);
    let Some(model) = model.filter(|m| is_bpe(m)) else {
        let kind = json["model"].get("type").map(plain).unwrap_or_default();
        return Err(cannot(format!("its model is {kind}, and only BPE vocabularies have an exact equal there")));
    };
    let mut vocab = tokens(tokenizer, &json);
    match shape(&json)? {
        Shape::ByteLevel(regexes) => byte_level(&mut vocab, model, &regexes)?,
        Shape::SentencePiece { prefix } => {
            sentence_piece(&mut vocab, model, prefix)?;
            compare(&vocab, tokenizer, prefix)?;
        }
        Shape::Characters => characters(&mut vocab, model)?,
    }
    Ok(vocab)
}

fn cannot(reason: impl Into<String>) -> Error {
    Error::NotRepresentable { reason: reason.into() }
}

fn is_bpe(model: &Map<String, Value>) -> bool {
    match model.get("type") {
        Some(kind) => kind == "BPE",
        None => model.contains_key("merges"),
    }
}

/// What goes around the merges.
enum Shape {
    /// Bytes spelled as characters, cut by expressions.
    ByteLevel(Vec<String>),
    /// Spaces spelled `▁`, with or without one in front.
    SentencePiece { prefix: bool },
    /// Nothing.
    Characters,
}

/// The steps of a `Sequence`, or a single step; none for null.
fn steps<'v>(value: Option<&'v Value>, key: &str) -> Vec<&'v Value> {
    match value {
        None | Some(Value::Null) => Vec::new(),
        Some(step) => match step.get(key).and_then(Value::as_array) {
            Some(list) => list.iter().flat_map(|part| steps(Some(part), key)).collect(),
            None => vec![step],
        },
    }
}

fn kind(step: &Value) -> &str {
    step.get("type").and_then(Value::as_str).unwrap_or("")
}

fn flag(step: &Value, key: &str, default: bool) -> bool {
    step.get(key).and_then(Value::as_bool).unwrap_or(default)
}

fn shape(json: &Value) -> Result<Shape> {
    let normalizers = steps(json.get("normalizer"), "normalizers");
    let cuts = steps(json.get("pre_tokenizer"), "pretokenizers");
    if cuts.iter().any(|step| kind(step) == "ByteLevel") {
        // llama.cpp normalizes nothing; composed text, which is nearly all text, is the same either way.
        if let Some(step) = normalizers.iter().find(|step| kind(step) != "NFC") {
            return Err(cannot(format!("llama.cpp has no normalizer `{}` for byte-level vocabularies", kind(step))));
        }
        return expressions(&cuts).map(Shape::ByteLevel);
    }
    if normalizers.is_empty() && cuts.is_empty() {
        return Ok(Shape::Characters);
    }
    sentence_piece_shape(&normalizers, &cuts)
}

/// The expressions that cut a text before its bytes are spelled.
fn expressions(cuts: &[&Value]) -> Result<Vec<String>> {
    let mut out = Vec::new();
    for step in cuts {
        match kind(step) {
            "ByteLevel" => {
                if flag(step, "add_prefix_space", true) {
                    return Err(cannot(
                        "it puts a space before each text (ByteLevel.add_prefix_space), which llama.cpp does not",
                    ));
                }
                if flag(step, "use_regex", true) {
                    out.push(GPT2.to_string());
                }
            }
            "Digits" if flag(step, "individual_digits", false) => out.push(r"\p{N}".into()),
            "Split" if !flag(step, "invert", false) || out.is_empty() => {
                let regex = step.get("pattern").and_then(|p| p.get("Regex"));
                match regex.and_then(Value::as_str) {
                    Some(regex) => out.push(regex.to_string()),
                    None => return Err(cannot("its pre_tokenizer splits at a fixed text")),
                }
            }
            other => return Err(cannot(format!("llama.cpp has no pre-tokenizer `{other}`"))),
        }
    }
    Ok(out)
}

/// `Prepend` and `Replace`, or `Metaspace`, in the spellings that converters of SentencePiece models write.
fn sentence_piece_shape(normalizers: &[&Value], cuts: &[&Value]) -> Result<Shape> {
    let mut prefix = false;
    let mut spaces = false;
    for step in normalizers {
        let from = step.get("pattern").and_then(|p| p.get("String"));
        let to = step.get("content");
        match kind(step) {
            "Prepend" if step.get("prepend").is_some_and(|p| p == "▁") => prefix = true,
            "Replace" if from.is_some_and(|f| f == " ") && to.is_some_and(|t| t == "▁") => {
                spaces = true;
            }
            other => {
                return Err(cannot(format!(
                    "llama.cpp has no such normalizer `{other}` for SentencePiece vocabularies"
                )));
            }
        }
    }
    for step in cuts {
        let scheme = step.get("prepend_scheme").and_then(Value::as_str);
        match kind(step) {
            "Metaspace" if step.get("replacement").is_some_and(|r| r == "▁") => {
                spaces = true;
                prefix |= scheme.unwrap_or("always") != "never";
            }
            // Gemma's cut at spaces does nothing once they are `▁`.
            "Split" if step.get("pattern").and_then(|p| p.get("String")).is_some_and(|s| s == " ") => {}
            other => return Err(cannot(format!("llama.cpp has no pre-tokenizer `{other}`"))),
        }
    }
    if !spaces {
        return Err(cannot("it does not spell spaces as `▁`, and llama.cpp does"));
    }
    Ok(Shape::SentencePiece { prefix })
}

/// Tokens and types, special tokens and flags: what all kinds share.
fn tokens(tokenizer: &Tokenizer, json: &Value) -> GgufVocab {
    let n = tokenizer.vocab_size();
    let mut vocab = GgufVocab { tokens: Vec::with_capacity(n), ..GgufVocab::default() };
    let added = tokenizer.library.get_added_tokens_decoder();
    let unknown = json["model"].get("unk_token").and_then(Value::as_str);
    let fallback = flag(&json["model"], "byte_fallback", false);
    let mut types = Vec::with_capacity(n);
    for id in 0..n as u32 {
        let Some(token) = tokenizer.token_of(id) else {
            vocab.tokens.push(format!("[PAD{id}]"));
            types.push(TokenType::Unused as i32);
            continue;
        };
        let kind = match added.get(&id) {
            _ if unknown == Some(token.as_str()) => TokenType::Unknown,
            Some(token) if token.special => TokenType::Control,
            Some(_) => TokenType::UserDefined,
            None if fallback && byte_of(&token).is_some() => TokenType::Byte,
            None => TokenType::Normal,
        };
        types.push(kind as i32);
        vocab.tokens.push(token);
    }
    let id = |token: &Option<String>| token.as_ref().and_then(|t| tokenizer.id_of(t));
    vocab.token_type = Some(types);
    vocab.bos = tokenizer.bos();
    vocab.eos = tokenizer.eos();
    vocab.unk = unknown.and_then(|t| tokenizer.id_of(t)).or_else(|| id(&tokenizer.settings.unk));
    vocab.pad = id(&tokenizer.settings.pad);
    vocab.add_bos = Some(tokenizer.adds_bos());
    vocab.add_eos = Some(tokenizer.adds_eos());
    vocab.chat_template = tokenizer.chat_template().map(str::to_string);
    vocab
}

/// The byte of a `<0x0A>` token.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let digits = digits.get(..2).filter(|d| d.len() == digits.len())?;
    u8::from_str_radix(digits, 16).ok()
}

fn merge_list(model: &Map<String, Value>) -> impl Iterator<Item = (&str, &str)> {
    let merges = model.get("merges").and_then(Value::as_array);
    merges.into_iter().flatten().filter_map(merge_pair)
}

fn byte_level(vocab: &mut GgufVocab, model: &Map<String, Value>, regexes: &[String]) -> Result<()> {
    let ignore = model.get("ignore_merges").and_then(Value::as_bool);
    let Some(name) = pre_name::by_regexes(regexes, ignore.unwrap_or(false)) else {
        return Err(cannot(format!(
            "no name that llama.cpp knows stands for its way to cut texts ({})",
            plain(&Value::from(regexes.join(" then ")))
        )));
    };
    vocab.model = "gpt2".into();
    vocab.pre = Some(name.into());
    let merges = merge_list(model).map(|(left, right)| format!("{left} {right}"));
    vocab.merges = Some(merges.collect());
    Ok(())
}

/// Scores by the place of a token's first merge. Tokens that no merge makes are the characters.
fn sentence_piece(vocab: &mut GgufVocab, model: &Map<String, Value>, prefix: bool) -> Result<()> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (left, right)) in merge_list(model).enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let last = ranks.len() as f32;
    let mut order: Vec<(usize, &str)> = ranks.iter().map(|(t, r)| (*r, t.as_str())).collect();
    order.sort_unstable();
    let places: HashMap<&str, usize> = order.iter().enumerate().map(|(i, (_, t))| (*t, i)).collect();
    let scores =
        vocab.tokens.iter().enumerate().map(|(id, token)| match (vocab.type_of(id), places.get(token.as_str())) {
            (_, Some(place)) => -(*place as f32),
            (TokenType::Normal, None) => -last,
            _ => 0.0,
        });
    vocab.scores = Some(scores.collect());
    vocab.model = "llama".into();
    vocab.pre = Some("default".into());
    vocab.add_space_prefix = Some(prefix);
    Ok(())
}

/// Holds the scores to the tokenizer: on texts made of the vocabulary's own pieces both give the same ids.
fn compare(vocab: &GgufVocab, tokenizer: &Tokenizer, prefix: bool) -> Result<()> {
    let scores = vocab.scores.as_deref().unwrap_or(&[]);
    let entries = vocab.tokens.iter().zip(scores).enumerate();
    let merger = Merger {
        tokens: entries.map(|(id, (t, s))| (t.as_str(), (id as u32, *s))).collect(),
        bytes: (0..=255u8).map(|b| tokenizer.id_of(&format!("<0x{b:02X}>"))).collect(),
    };
    let pieces: Vec<&str> = (0..vocab.tokens.len())
        .filter(|id| vocab.type_of(*id) == TokenType::Normal)
        .map(|id| vocab.tokens[id].as_str())
        .collect();
    if pieces.is_empty() {
        return Err(cannot("it has no token that is a piece of text"));
    }
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for trial in 0..TRIALS.max(pieces.len()) {
        let mut text = pieces[trial % pieces.len()].to_string();
        for _ in 0..trial % 4 {
            // A linear congruential generator: the same texts on every machine.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            text.push_str(pieces[(state >> 33) as usize % pieces.len()]);
        }
        let text = text.replace('▁', " ");
        let inner = format!("{}{text}", if prefix { " " } else { "" }).replace(' ', "▁");
        let (ours, theirs) = (tokenizer.encode_plain(&text)?, merger.encode(&inner));
        if theirs.as_ref() != Some(&ours) {
            return Err(cannot(format!(
                "by llama.cpp's rule \"{}\" would become {theirs:?} instead of {ours:?}",
                text.escape_debug()
            )));
        }
    }
    Ok(())
}

/// Single ASCII characters: their bytes are their tokens, spelled as the byte-level kind spells them.
fn characters(vocab: &mut GgufVocab, model: &Map<String, Value>) -> Result<()> {
    if merge_list(model).next().is_some() {
        return Err(cannot("it merges across spaces, which llama.cpp never does"));
    }
    if vocab.unk.is_some() {
        return Err(cannot("it has an unknown token for characters, and llama.cpp leaves such characters out"));
    }
    for id in 0..vocab.tokens.len() {
        if vocab.type_of(id) != TokenType::Normal {
            continue;
        }
        let token = &vocab.tokens[id];
        match token.as_bytes() {
            [byte] if byte.is_ascii() => vocab.tokens[id] = spelled(*byte).to_string(),
            _ => {
                return Err(cannot(format!(
                    "its token \"{}\" is not one ASCII character and no merge makes it",
                    token.escape_debug()
                )));
            }
        }
    }
    vocab.model = "gpt2".into();
    vocab.pre = Some("gpt-2".into());
    vocab.merges = Some(Vec::new());
    Ok(())
}

/// GPT-2's spelling of an ASCII byte: printable ones as they are, the others from U+0100 on, in order.
fn spelled(byte: u8) -> char {
    let code = match byte {
        b'!'..=b'~' => u32::from(byte),
        0..=b' ' => 0x100 + u32::from(byte),
        _ => 0x100 + 33,
    };
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}
