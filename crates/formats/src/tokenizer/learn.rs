//! A tokenizer is learned from text: byte-level BPE (arXiv 1508.07909, on bytes as GPT-2 has it).

use super::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;
use tokenizers::{
    AddedToken, TokenizerBuilder,
    models::bpe::{BPE, BpeTrainer},
    normalizers::NFC,
    pre_tokenizers::byte_level::ByteLevel,
};

/// What a text begins and ends with.
pub const ENDS: [&str; 2] = ["<s>", "</s>"];

/// Learns a vocabulary of `size` tokens, those of [`ENDS`] and all 256 bytes included; returns a `tokenizer.json` and a
/// `tokenizer_config.json`. `path` is only what errors name.
///
/// # Errors
/// If the size has no room for the bytes, or the texts do not fill it.
pub fn learn_bpe<'a>(texts: impl Iterator<Item = &'a str> + Send, size: usize, path: &Path) -> Result<[Value; 2]> {
    let bad = |problem: String, remedy: &str| Error::Field {
        path: path.into(),
        field: "tokenizer.vocab".into(),
        problem,
        remedy: remedy.into(),
    };
    let least = 256 + ENDS.len();
    if !(least..=1 << 20).contains(&size) {
        return Err(bad(format!("is {size}"), "take a number from 258 to 1048576; 4096 suits a small model"));
    }
    let library = |e: tokenizers::Error| Error::Library { path: path.into(), problem: e.to_string() };
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(size)
        .special_tokens(ENDS.map(|token| AddedToken::from(token, true)).to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut learned = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<NFC>)
        .with_pre_tokenizer(Some(ByteLevel::new(false, true, true)))
        .with_post_processor(Some(ByteLevel::default()))
        .with_decoder(Some(ByteLevel::default()))
        .build()
        .map_err(library)?;
    learned.train(&mut trainer, texts).map_err(library)?;
    let held = learned.get_vocab_size(true);
    if held < size {
        return Err(bad(
            format!("is {size}, and the text has parts for {held} tokens only"),
            "take a smaller vocabulary or more text",
        ));
    }
    let text = learned.to_string(false).map_err(library)?;
    let mut json: Value =
        serde_json::from_str(&text).map_err(|e| Error::Library { path: path.into(), problem: e.to_string() })?;
    let [begin, end] = ENDS;
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin: {"id": begin, "ids": [0], "tokens": [begin]}},
    });
    let config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end});
    Ok([json, config])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Tokenizer;

    #[test]
    fn a_learned_tokenizer_keeps_every_text_and_is_the_same_each_time() {
        let words = ["plane", "planish", "plain", "sheet", "metal", "hammer", "smooth", "thin"];
        let text: Vec<String> = (0..900).map(|i| format!("{} {} {i}.", words[i % 8], words[i * 7 % 5])).collect();
        let learn = || learn_bpe(text.iter().map(String::as_str), 300, Path::new("config.toml")).unwrap();
        let [json, config] = learn();
        assert!(learn()[0] == json);
        let tokenizer =
            Tokenizer::from_parts(json, config.as_object().unwrap().clone(), Path::new("tokenizer.json")).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.bos(), tokenizer.eos()), (300, Some(0), Some(1)));
        assert!(tokenizer.adds_bos());
        for text in ["planish thin metal", "Ünïcode, 漢字 and\ttabs\n", ""] {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(ids[0], 0);
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
        assert!(tokenizer.encode("planish", false).unwrap().len() <= 3);
        let few = |size| learn_bpe(["a b c"].into_iter(), size, Path::new("config.toml")).unwrap_err().to_string();
        assert!(few(100).contains("tokenizer.vocab") && few(400).contains("smaller vocabulary"));
    }
}
