//! A tokenizer of only some of its tokens: the others are gone from the vocabulary, from its merges and from all that
//! numbers tokens.
//!
//! A merge that is never made in a text can go without another way of cutting it: at each step the most urgent merge is
//! made, which is one that stays. So what stays is every token that is asked for, all tokens that one of them may be
//! merged of, and every merge between those. Pieces of a unigram model that are on no best path can go as well.

use super::{Error, Result, Tokenizer};
use serde_json::{Map, Value};
use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

impl Tokenizer {
    /// The tokenizer of those tokens that are wanted (by id), of what they are merged of, and of what any text may need: special and
    /// added tokens, and single bytes where the vocabulary has them. They keep their order.
    ///
    /// Returns the earlier id of each token as well. `path` is named in errors.
    ///
    /// # Errors
    /// If the vocabulary is of another kind than BPE or unigram.
    pub fn only(&self, wanted: &dyn Fn(u32) -> bool, path: &Path) -> Result<(Tokenizer, Vec<u32>)> {
        let refuse = |field: &str, problem: &str| Error::Field {
            path: path.into(),
            field: field.into(),
            problem: problem.into(),
            remedy: "save the tokenizer again with a current `tokenizers`".into(),
        };
        let mut json: Value = serde_json::from_str(&self.json).map_err(|e| refuse("tokenizer.json", &e.to_string()))?;
        let ids = self.library.get_vocab(true);
        let mut stay: BTreeSet<u32> = ids.values().copied().filter(|id| wanted(*id)).collect();
        stay.extend(self.any_text_needs(&json, &ids));
        let kind = json["model"]["type"].as_str().unwrap_or("BPE").to_string();
        match kind.as_str() {
            "BPE" => {
                let merges =
                    merges(&json["model"], &ids).ok_or_else(|| refuse("model.merges", "is no list of pairs"))?;
                close(&mut stay, &merges);
                if let Some(list) = json["model"]["merges"].as_array_mut() {
                    let mut between =
                        merges.iter().map(|merge| merge.is_some_and(|m| m.iter().all(|id| stay.contains(id))));
                    list.retain(|_| between.next() == Some(true));
                }
            }
            "Unigram" => {}
            other => {
                return Err(Error::Unsupported {
                    path: path.into(),
                    field: "model.type".into(),
                    value: other.into(),
                    supported: "BPE, Unigram".into(),
                });
            }
        }
        let kept: Vec<u32> = stay.into_iter().collect();
        let now = |id: u32| kept.binary_search(&id).ok().map(|at| at as u32);
        renumber_model(&mut json["model"], &now);
        renumber_others(&mut json, &now);
        let mut config = self.config.clone();
        if let Some(Value::Object(tokens)) = config.get_mut("added_tokens_decoder") {
            let moved = |(id, token): (String, Value)| Some((now(id.parse().ok()?)?.to_string(), token));
            *tokens = std::mem::take(tokens).into_iter().filter_map(moved).collect();
        }
        let made = Tokenizer::build(json.to_string(), json, config, self.settings.clone(), path)?;
        for (token, id) in &ids {
            if now(*id).is_some_and(|now| made.id_of(token) != Some(now)) {
                return Err(refuse(
                    "added_tokens",
                    &format!("gives {token:?} a number that depends on what is left out"),
                ));
            }
        }
        Ok((made, kept))
    }

    /// Tokens that stay whatever is wanted.
    fn any_text_needs(&self, json: &Value, ids: &HashMap<String, u32>) -> Vec<u32> {
        let added = json["added_tokens"].as_array().into_iter().flatten();
        let mut stay: Vec<u32> = added.filter_map(|token| token["id"].as_u64()).map(|id| id as u32).collect();
        stay.extend([self.bos, self.eos].into_iter().flatten());
        // Those that the configuration adds.
        stay.extend(self.library.get_added_vocabulary().get_vocab().values());
        stay.extend(["unk_token", "unk_id"].into_iter().filter_map(|field| match &json["model"][field] {
            Value::String(token) => ids.get(token).copied(),
            id => id.as_u64().map(|id| id as u32),
        }));
        let bytes = ["pre_tokenizer", "decoder"].iter().any(|step| json[*step].to_string().contains("\"ByteLevel\""));
        let byte = |token: &str| token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
        let alone = |token: &str| bytes && token.chars().count() == 1;
        stay.extend(ids.iter().filter(|(token, _)| byte(token) || alone(token)).map(|(_, id)| *id));
        stay
    }
}

/// Left, right and joined token of each merge, `None` where the vocabulary lacks one of them.
fn merges(model: &Value, ids: &HashMap<String, u32>) -> Option<Vec<Option<[u32; 3]>>> {
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    let one = |merge: &Value| -> Option<Option<[u32; 3]>> {
        let (left, right) = match merge {
            Value::String(text) => text.split_once(' ')?,
            pair => (pair[0].as_str()?, pair[1].as_str()?),
        };
        let joined = format!("{left}{}", right.strip_prefix(prefix).unwrap_or(right));
        let id = |token: &str| ids.get(token).copied();
        Some(id(left).zip(id(right)).zip(id(&joined)).map(|((left, right), joined)| [left, right, joined]))
    };
    model["merges"].as_array().map_or(Some(Vec::new()), |list| list.iter().map(one).collect())
}

/// Adds what tokens are merged of, and what that is merged of.
fn close(stay: &mut BTreeSet<u32>, merges: &[Option<[u32; 3]>]) {
    let mut parts: HashMap<u32, Vec<[u32; 2]>> = HashMap::new();
    for [left, right, joined] in merges.iter().flatten() {
        parts.entry(*joined).or_default().push([*left, *right]);
    }
    let mut open: Vec<u32> = stay.iter().copied().collect();
    while let Some(token) = open.pop() {
        let of = parts.get(&token).into_iter().flatten().flatten();
        open.extend(of.filter(|part| stay.insert(**part)));
    }
}

fn renumber_model(model: &mut Value, now: &dyn Fn(u32) -> Option<u32>) {
    match &mut model["vocab"] {
        Value::Object(vocab) => {
            let moved = |(token, id): (String, Value)| Some((token, now(id.as_u64()? as u32)?.into()));
            *vocab = std::mem::take(vocab).into_iter().filter_map(moved).collect();
        }
        Value::Array(pieces) => {
            let mut id = 0..;
            pieces.retain(|_| id.next().and_then(now).is_some());
        }
        _ => {}
    }
    if let Some(id) = model["unk_id"].as_u64().and_then(|id| now(id as u32)) {
        model["unk_id"] = id.into();
    }
}

/// Added tokens and what post-processors put around a text.
fn renumber_others(json: &mut Value, now: &dyn Fn(u32) -> Option<u32>) {
    let moved = |id: &Value| id.as_u64().and_then(|id| now(id as u32)).map(Value::from);
    // A field that is absent must not become null.
    for token in json.get_mut("added_tokens").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(id) = moved(&token["id"]) {
            token["id"] = id;
        }
    }
    let mut steps: Vec<&mut Value> = json.get_mut("post_processor").into_iter().collect();
    while let Some(step) = steps.pop() {
        let Value::Object(step) = step else { continue };
        for (field, value) in step {
            match (field.as_str(), value) {
                ("special_tokens", Value::Object(tokens)) => {
                    for id in tokens.values_mut().filter_map(|token| token["ids"].as_array_mut()).flatten() {
                        *id = moved(id).unwrap_or_else(|| id.take());
                    }
                }
                ("sep" | "cls", Value::Array(pair)) => {
                    if let Some(id) = pair.get(1).and_then(moved) {
                        pair[1] = id;
                    }
                }
                ("processors", Value::Array(more)) => steps.extend(more),
                _ => {}
            }
        }
    }
}

/// Brings the fields of a configuration that hold ids (`eos_token_id`, alone or in lists) to new ids; those that are gone are left out.
pub fn renumber(fields: &mut Map<String, Value>, now: &dyn Fn(u32) -> Option<u32>) {
    let moved = |id: &Value| id.as_u64().and_then(|id| now(u32::try_from(id).ok()?)).map(Value::from);
    for (_, value) in fields.iter_mut().filter(|(name, _)| name.ends_with("_token_id")) {
        match value {
            Value::Array(ids) => *ids = ids.iter().filter_map(moved).collect(),
            Value::Number(_) => *value = moved(value).unwrap_or_default(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn made(model: Value) -> Tokenizer {
        let added = json!([{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}]);
        let post = json!({"type": "BertProcessing", "sep": ["<s>", 0], "cls": ["<s>", 0]});
        let json = json!({"version": "1.0", "added_tokens": added, "post_processor": post, "model": model});
        Tokenizer::from_json(json, Path::new("t.json")).unwrap()
    }

    fn spelled(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
        let ids = tokenizer.encode(text, false).unwrap();
        ids.iter().map(|id| tokenizer.token_of(*id).unwrap()).collect()
    }

    #[test]
    fn merges_stay_as_far_as_tokens_need_them() {
        let vocab = json!({"<s>": 0, "x": 1, "a": 2, "b": 3, "c": 4, "bc": 5, "ab": 6, "xx": 7, "abc": 8, "cc": 9});
        for merges in [
            json!(["x x", "b c", "a b", "a bc", "ab c", "c c"]),
            json!([["x", "x"], ["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"], ["c", "c"]]),
        ] {
            let old = made(json!({"type": "BPE", "vocab": vocab, "merges": merges}));
            let used = old.encode("abcc", false).unwrap();
            let (new, kept) = old.only(&|id| used.contains(&id), Path::new("t.json")).unwrap();
            // "abc" may be made of "a" and "bc", or of "ab" and "c".
            assert_eq!(kept, [0, 2, 3, 4, 5, 6, 8]);
            assert_eq!(spelled(&new, "abcc"), spelled(&old, "abcc"));
            assert_eq!((new.vocab_size(), new.id_of("abc"), new.id_of("xx")), (7, Some(6), None));
            let json: Value = serde_json::from_str(new.json()).unwrap();
            assert_eq!(json["model"]["merges"].as_array().unwrap().len(), 4);
        }
    }

    #[test]
    fn pieces_go_with_their_scores_and_what_stands_around_a_text_is_renumbered() {
        let vocab = json!([["<s>", 0.0], ["x", -1.0], ["<unk>", -9.0], ["a", -2.0], ["aa", -2.5], ["b", -3.0]]);
        let old = made(json!({"type": "Unigram", "unk_id": 2, "vocab": vocab}));
        let used = old.encode("aab", false).unwrap();
        let (new, kept) = old.only(&|id| used.contains(&id), Path::new("t.json")).unwrap();
        assert_eq!(kept, [0, 2, 4, 5]);
        assert_eq!(spelled(&new, "aab"), spelled(&old, "aab"));
        assert_eq!(new.encode("aab", true).unwrap(), [0, 2, 3, 0]);
        let words = json!({"type": "WordLevel", "unk_token": "x", "vocab": {"<s>": 0, "x": 1}});
        let e = made(words).only(&|_| true, Path::new("t.json")).unwrap_err().to_string();
        assert!(e.contains("BPE, Unigram"), "{e}");
    }

    #[test]
    fn fields_that_hold_ids_follow() {
        let mut fields =
            json!({"eos_token_id": [1, 5], "pad_token_id": 9, "vocab_size": 5}).as_object().unwrap().clone();
        renumber(&mut fields, &|id| (id < 9).then_some(id + 10));
        assert_eq!(Value::Object(fields), json!({"eos_token_id": [11, 15], "pad_token_id": null, "vocab_size": 5}));
    }
}
