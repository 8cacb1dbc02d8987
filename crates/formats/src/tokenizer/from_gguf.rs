//! A GGUF's vocabulary rebuilt as a tokenizer.json that gives the same ids.
//!
//! `llama` vocabularies (SentencePiece) have scores and no merges: a pair may merge if its join is a token, the higher
//! score first. Listing every such pair by falling score says the same in merges. `gpt2` vocabularies have their merges
//! and a name for how texts are cut.

use super::{
    Error, GgufVocab, Result, TokenType, Tokenizer,
    gguf_vocab::complaint,
    pre_name::{self, byte_level},
    template_json,
};
use serde_json::{Map, Value, json};
use std::{cmp::Ordering, collections::HashMap, path::Path};

/// The most work that listing pairs may take, in bytes compared; the largest real vocabularies take 40 million.
const MAX_PAIR_WORK: usize = 400_000_000;

/// Rebuilds the tokenizer of a GGUF that was read from `path`.
///
/// # Errors
/// If the metadata contradicts itself, or names a kind that is not supported.
pub fn from_gguf(vocab: &GgufVocab, path: &Path) -> Result<Tokenizer> {
    vocab.check(path)?;
    let ids = ids(vocab, path)?;
    let (model, mut top, default_bos) = match vocab.model.as_str() {
        "llama" => {
            let merges = merges_of_scores(vocab, &ids, path)?;
            (sentence_piece_model(vocab, merges), sentence_piece_steps(vocab), true)
        }
        "gpt2" => byte_level_parts(vocab, path)?,
        other => {
            return Err(Error::Unsupported {
                path: path.into(),
                field: "tokenizer.ggml.model".into(),
                value: other.escape_debug().to_string(),
                supported: "llama, gpt2".into(),
            });
        }
    };
    let named = |id: Option<u32>| id.map(|id| (vocab.tokens[id as usize].clone(), id));
    let bos = named(vocab.bos).filter(|_| vocab.add_bos.unwrap_or(default_bos));
    let eos = named(vocab.eos).filter(|_| vocab.add_eos.unwrap_or(false));
    if bos.is_some() || eos.is_some() {
        top.insert("post_processor".into(), template_json(bos.as_ref(), eos.as_ref()));
    }
    top.insert("version".into(), "1.0".into());
    top.insert("added_tokens".into(), added_tokens(vocab));
    top.insert("model".into(), model);
    Tokenizer::from_parts(Value::Object(top), config(vocab), path)
}

/// Ids by token; two equal tokens would leave one without a way to be written.
fn ids<'v>(vocab: &'v GgufVocab, path: &Path) -> Result<HashMap<&'v str, u32>> {
    let mut ids = HashMap::with_capacity(vocab.tokens.len());
    for (id, token) in vocab.tokens.iter().enumerate() {
        if let Some(other) = ids.insert(token.as_str(), id as u32) {
            return Err(complaint(
                path,
                &format!("tokens[{id}]"),
                format!("is \"{}\", which token {other} is already", token.escape_debug()),
                "give each token a text of its own",
            ));
        }
    }
    Ok(ids)
}

fn vocabulary(vocab: &GgufVocab) -> Value {
    let entries = vocab.tokens.iter().enumerate();
    Value::Object(entries.map(|(id, token)| (token.clone(), id.into())).collect())
}

fn sentence_piece_model(vocab: &GgufVocab, merges: Vec<[&str; 2]>) -> Value {
    let unknown = (0..vocab.tokens.len()).find(|id| vocab.type_of(*id) == TokenType::Unknown);
    let unknown = vocab.unk.map(|id| id as usize).or(unknown);
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": unknown.map(|id| &vocab.tokens[id]),
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": true,
        "byte_fallback": vocab.tokens.iter().any(|t| t == "<0x0A>"),
        "ignore_merges": false,
        "vocab": vocabulary(vocab),
        "merges": merges,
    })
}

/// Every pair of tokens whose join is a token, by falling score of the join.
fn merges_of_scores<'v>(vocab: &'v GgufVocab, ids: &HashMap<&str, u32>, path: &Path) -> Result<Vec<[&'v str; 2]>> {
    let Some(scores) = &vocab.scores else {
        return Err(complaint(
            path,
            "scores",
            "is missing".into(),
            "a `llama` vocabulary has a score for each token; convert the model again",
        ));
    };
    let mergeable = |id: usize| {
        use TokenType::*;
        matches!(vocab.type_of(id), Normal | UserDefined | Unused)
    };
    let mut work = 0;
    let mut pairs: Vec<(f32, usize, usize)> = Vec::new();
    for (id, token) in vocab.tokens.iter().enumerate().filter(|(id, _)| mergeable(*id)) {
        work += token.len() * token.len();
        if work > MAX_PAIR_WORK {
            return Err(complaint(
                path,
                &format!("tokens[{id}]"),
                format!("has {} bytes; tokens this long cannot be real", token.len()),
                "convert the model again",
            ));
        }
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            let known = |part: &str| ids.get(part).is_some_and(|id| mergeable(*id as usize));
            if known(left) && known(right) {
                pairs.push((scores[id], id, cut));
            }
        }
    }
    pairs.sort_by(|a, b| {
        let score = b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal);
        score.then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2))
    });
    let split = |(_, id, cut): &(f32, usize, usize)| {
        let (left, right) = vocab.tokens[*id].split_at(*cut);
        [left, right]
    };
    Ok(pairs.iter().map(split).collect())
}

/// Spaces are `▁` inside; a text, and what follows a special token, begins with one.
fn sentence_piece_steps(vocab: &GgufVocab) -> Map<String, Value> {
    let prefix = vocab.add_space_prefix.unwrap_or(true);
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", "▁")];
    let mut decoders = vec![replace("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let mut top = Map::new();
    top.insert("normalizer".into(), json!({"type": "Sequence", "normalizers": normalizers}));
    top.insert("decoder".into(), json!({"type": "Sequence", "decoders": decoders}));
    top
}

/// Model, steps and whether BOS is added by default.
fn byte_level_parts(vocab: &GgufVocab, path: &Path) -> Result<(Value, Map<String, Value>, bool)> {
    let Some(split) = pre_name::by_name(vocab.pre.as_deref()) else {
        return Err(Error::Unsupported {
            path: path.into(),
            field: "tokenizer.ggml.pre".into(),
            value: vocab.pre.as_deref().unwrap_or("").escape_debug().to_string(),
            supported: pre_name::names(),
        });
    };
    let Some(merges) = &vocab.merges else {
        return Err(complaint(
            path,
            "merges",
            "is missing".into(),
            "a `gpt2` vocabulary has merges; convert the model again",
        ));
    };
    let pairs: Vec<Value> = merges
        .iter()
        .map(|merge| match merge.split_once(' ') {
            Some((left, right)) => json!([left, right]),
            None => json!([merge]),
        })
        .collect();
    let model = json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": null,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": false,
        "byte_fallback": false,
        "ignore_merges": split.ignore_merges,
        "vocab": vocabulary(vocab),
        "merges": pairs,
    });
    let mut top = Map::new();
    top.insert("pre_tokenizer".into(), pre_name::to_json(split));
    top.insert("decoder".into(), byte_level(true));
    Ok((model, top, split.add_bos))
}

/// Tokens that are found in a text before merging.
fn added_tokens(vocab: &GgufVocab) -> Value {
    let mut list = Vec::new();
    for (id, token) in vocab.tokens.iter().enumerate() {
        let special = match vocab.type_of(id) {
            TokenType::Control | TokenType::Unknown => true,
            TokenType::UserDefined => false,
            _ => continue,
        };
        if token.is_empty() {
            continue;
        }
        list.push(json!({
            "id": id,
            "content": token,
            "single_word": false,
            "lstrip": false,
            "rstrip": vocab.specials_strip_right && special,
            "normalized": false,
            "special": special,
        }));
    }
    Value::Array(list)
}

fn config(vocab: &GgufVocab) -> Map<String, Value> {
    let mut config = Map::new();
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    let named =
        [("bos_token", vocab.bos), ("eos_token", vocab.eos), ("unk_token", vocab.unk), ("pad_token", vocab.pad)];
    for (key, id) in named {
        if let Some(id) = id {
            config.insert(key.into(), vocab.tokens[id as usize].clone().into());
        }
    }
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    if let Some(template) = &vocab.chat_template {
        config.insert("chat_template".into(), template.clone().into());
    }
    config
}
