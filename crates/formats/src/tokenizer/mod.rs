//! Text to ids and back.
//!
//! The work is done by the Hugging Face `tokenizers` library, behind a wall of checks (see `check_file`); a GGUF's
//! vocabulary is rebuilt as a tokenizer.json and takes the same way. This module knows no model: which token a model
//! starts with is only what the tokenizer's own files say.

mod check_file;
mod check_steps;
mod config;
mod error;
mod from_gguf;
mod gguf_vocab;
mod learn;
mod only;
mod pre_name;
mod read;
mod spm;
mod stream;
mod surface;
mod to_gguf;

pub use error::{Error, Result};
pub use from_gguf::from_gguf;
pub use gguf_vocab::{GgufVocab, TokenType};
pub use learn::{ENDS, learn_bpe};
pub use only::renumber;
pub use stream::DecodeStream;
pub use to_gguf::to_gguf;

use config::Settings;
use serde_json::{Map, Value, json};
use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};
use tokenizers::{
    AddedToken, AddedVocabulary, Model, OffsetReferential, OffsetType, PostProcessorWrapper, PreTokenizer,
};

/// The most bytes that normalizing one text may reach.
const MAX_NORMALIZED_BYTES: u64 = 4 << 30;

/// A vocabulary with all that turns text into ids and back.
#[derive(Clone)]
pub struct Tokenizer {
    library: tokenizers::Tokenizer,
    /// The added tokens with those that are special not looked for in texts.
    plain: AddedVocabulary,
    settings: Settings,
    bos: Option<u32>,
    eos: Option<u32>,
    adds_bos: bool,
    adds_eos: bool,
    vocab_size: usize,
    growth: u64,
    json: String,
    config: Map<String, Value>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("adds_bos", &self.adds_bos)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` with `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`,
    /// where there are such, from a directory.
    ///
    /// # Errors
    /// If a file cannot be read, is not what its name says, or is malformed; the error names the field.
    pub fn from_dir(dir: &Path) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        let Some((text, json)) = read::json(&path)? else {
            return Err(Error::Field {
                path: dir.into(),
                field: "tokenizer.json".into(),
                problem: "is missing in this directory".into(),
                remedy: "copy it from the model's source; a tokenizer.model alone becomes one with \
                         transformers' `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`"
                    .into(),
            });
        };
        let config = optional_object(&dir.join("tokenizer_config.json"))?;
        let specials = optional_object(&dir.join("special_tokens_map.json"))?;
        let mut settings = Settings::read(&config, &specials);
        if let Some(template) = read::text(&dir.join("chat_template.jinja"))? {
            settings.chat_template = Some(template);
        }
        Self::build(text, json, config, settings, &path)
    }

    /// Takes a tokenizer.json that was read from `path`, without any configuration.
    ///
    /// # Errors
    /// If it is malformed; the error names the field.
    pub fn from_json(json: Value, path: &Path) -> Result<Tokenizer> {
        Self::from_parts(json, Map::new(), path)
    }

    /// Takes a tokenizer.json and a tokenizer_config.json.
    ///
    /// # Errors
    /// As [`Tokenizer::from_json`].
    pub fn from_parts(json: Value, config: Map<String, Value>, path: &Path) -> Result<Tokenizer> {
        let settings = Settings::read(&config, &Map::new());
        let text = json.to_string();
        Self::build(text, json, config, settings, path)
    }

    /// Rebuilds the tokenizer of a GGUF that was read from `path`.
    ///
    /// # Errors
    /// If the metadata contradicts itself, or names a kind that is not supported.
    pub fn from_gguf(vocab: &GgufVocab, path: &Path) -> Result<Tokenizer> {
        from_gguf(vocab, path)
    }

    fn build(
        text: String,
        mut json: Value,
        config: Map<String, Value>,
        settings: Settings,
        path: &Path,
    ) -> Result<Tokenizer> {
        let checked = check_file::check(&mut json, path)?;
        let mut library = load(json, path)?;
        apply_settings(&mut library, &settings, path)?;
        let id = |token: &Option<String>| token.as_ref().and_then(|t| library.token_to_id(t));
        let (bos, eos) = (id(&settings.bos), id(&settings.eos));
        let mut plain = library.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        // A vocabulary may have holes; embeddings are indexed by id, so the largest id counts.
        let vocab = library.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |id| *id as usize + 1);
        let mut tokenizer = Tokenizer {
            library,
            plain,
            settings,
            bos,
            eos,
            adds_bos: false,
            adds_eos: false,
            vocab_size,
            growth: checked.growth,
            json: text,
            config,
        };
        // The truth about what is added is what is added, whichever of the ways to say it a file takes.
        let around = tokenizer.encode("", true)?;
        tokenizer.adds_bos = bos.is_some() && around.first() == bos.as_ref();
        let last = around.len() > usize::from(tokenizer.adds_bos);
        tokenizer.adds_eos = last && eos.is_some() && around.last() == eos.as_ref();
        Ok(tokenizer)
    }

    /// The ids of a text; the texts of special tokens in it become those tokens, as in transformers.
    ///
    /// `add_special` adds what the post-processor adds (BOS, EOS).
    ///
    /// # Errors
    /// If the text has a character that the vocabulary lacks and no unknown token stands for it, or is too long.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.check_length(text)?;
        guard("encode the text", || {
            let encoding = self.library.encode_fast(text, add_special)?;
            Ok(encoding.get_ids().to_vec())
        })
    }

    /// The ids of a text in which the texts of special tokens are only text; nothing is added.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.check_length(text)?;
        guard("encode the text", || {
            let normalizer = self.library.get_normalizer();
            let mut pieces = self.plain.extract_and_normalize(normalizer, text);
            if let Some(pre) = self.library.get_pre_tokenizer() {
                pre.pre_tokenize(&mut pieces)?;
            }
            let model = self.library.get_model();
            model.tokenize_in_pretokenized(&mut pieces, None)?;
            let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::None);
            let tokens = splits.iter().filter_map(|(_, _, tokens)| tokens.as_ref());
            Ok(tokens.flatten().map(|token| token.id).collect())
        })
    }

    /// The text of ids; with `skip_special` without that of special tokens. Ids that no token has are left out.
    ///
    /// # Errors
    /// If the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guard("decode the ids", || self.library.decode(ids, skip_special))
    }

    /// A decoder that takes ids one at a time.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// The token that begins a text, if the files name one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, if the files name one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether encoding a text puts BOS before it.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Whether encoding a text puts EOS behind it.
    pub fn adds_eos(&self) -> bool {
        self.adds_eos
    }

    /// One more than the largest id, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its own spelling (`Ġthe`, `▁the`, `<|eot_id|>`).
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.library.token_to_id(token)
    }

    /// The own spelling of a token.
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.library.id_to_token(id)
    }

    /// The tokenizer.json, as it was read or rebuilt.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// The tokenizer_config.json's object, as it was read or rebuilt; empty where there was none.
    pub fn config_json(&self) -> &Map<String, Value> {
        &self.config
    }

    /// The chat template, if the files have one; of several the one named `default`.
    pub fn chat_template(&self) -> Option<&str> {
        self.settings.chat_template.as_deref()
    }

    fn check_length(&self, text: &str) -> Result<()> {
        if (text.len() as u64).saturating_mul(self.growth) > MAX_NORMALIZED_BYTES {
            return Err(Error::Text {
                doing: "encode the text",
                problem: format!("{} bytes are too many at once; cut it", text.len()),
            });
        }
        Ok(())
    }
}

fn optional_object(path: &Path) -> Result<Map<String, Value>> {
    match read::json(path)? {
        None => Ok(Map::new()),
        Some((_, Value::Object(map))) => Ok(map),
        Some(_) => Err(Error::Field {
            path: path.into(),
            field: "the outermost value".into(),
            problem: "is not an object".into(),
            remedy: "download the file again".into(),
        }),
    }
}

type LibraryResult<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Runs the library, which panics on some of what it should refuse, so that a panic is an error like any other.
///
/// This is the second wall: the checks let nothing through that is known to panic. The library keeps nothing of a
/// call but a cache that it takes and gives back whole, so a caught panic leaves it usable.
fn guard<T>(doing: &'static str, run: impl FnOnce() -> LibraryResult<T>) -> Result<T> {
    let problem = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(e)) => e.to_string(),
        Err(_) => "the tokenizer library stopped; please report this file".into(),
    };
    Err(Error::Text { doing, problem })
}

fn load(json: Value, path: &Path) -> Result<tokenizers::Tokenizer> {
    let loaded = guard("load", || Ok(serde_json::from_value(json)?));
    loaded.map_err(|e| Error::Library {
        path: path.into(),
        problem: match e {
            Error::Text { problem, .. } => problem,
            other => other.to_string(),
        },
    })
}

/// Does to the loaded tokenizer what transformers does with the configuration beside it.
fn apply_settings(library: &mut tokenizers::Tokenizer, settings: &Settings, path: &Path) -> Result<()> {
    let refused = |problem: String| Error::Library { path: path.into(), problem };
    let specials = settings.specials.iter();
    let specials: Vec<AddedToken> = specials
        .filter(|token| !library.get_added_vocabulary().get_vocab().contains_key(*token))
        .map(|token| AddedToken::from(token.as_str(), true).normalized(false))
        .collect();
    if !specials.is_empty() {
        library.add_special_tokens(specials).map_err(|e| refused(e.to_string()))?;
    }
    if settings.add_bos.is_none() && settings.add_eos.is_none() {
        return Ok(());
    }
    let wanted = |token: &Option<String>, on: Option<bool>| {
        let token = token.clone().filter(|_| on == Some(true))?;
        let id = library.token_to_id(&token)?;
        Some((token, id))
    };
    let bos = wanted(&settings.bos, settings.add_bos);
    let eos = wanted(&settings.eos, settings.add_eos);
    let template = template_json(bos.as_ref(), eos.as_ref());
    let template: PostProcessorWrapper = serde_json::from_value(template).map_err(|e| refused(e.to_string()))?;
    library.with_post_processor(Some(template));
    Ok(())
}

/// A post-processor that puts tokens, each with its id, before and behind a text.
fn template_json(before: Option<&(String, u32)>, behind: Option<&(String, u32)>) -> Value {
    let special = |(token, _): &(String, u32), type_id: u32| json!({"SpecialToken": {"id": token, "type_id": type_id}});
    let one = |sequence: &str, type_id: u32| {
        let mut pieces: Vec<Value> = Vec::new();
        pieces.extend(before.map(|t| special(t, type_id)));
        pieces.push(json!({"Sequence": {"id": sequence, "type_id": type_id}}));
        pieces.extend(behind.map(|t| special(t, type_id)));
        pieces
    };
    let mut pair = one("A", 0);
    pair.extend(one("B", 1));
    let specials: Map<String, Value> = [before, behind]
        .into_iter()
        .flatten()
        .map(|(token, id)| {
            let entry = json!({"id": token, "ids": [id], "tokens": [token]});
            (token.clone(), entry)
        })
        .collect();
    json!({
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": pair,
        "special_tokens": specials,
    })
}
