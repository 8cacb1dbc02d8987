//! A vocabulary as a GGUF's metadata holds it (`tokenizer.ggml.*`).

use super::{
    Tokenizer,
    error::{Error, Result},
};
use crate::gguf;
use std::path::Path;

/// What a token is (`tokenizer.ggml.token_type`), with GGUF's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum TokenType {
    /// A piece of text.
    Normal = 1,
    /// What stands for text that no token has.
    Unknown = 2,
    /// A special token, never made of a user's text.
    Control = 3,
    /// An added token that is found in texts before merging.
    UserDefined = 4,
    /// A row that nothing uses.
    Unused = 5,
    /// One byte, spelled `<0x0A>`.
    Byte = 6,
}

impl TokenType {
    /// The type of GGUF's number.
    pub fn of(number: i32) -> Option<TokenType> {
        use TokenType::*;
        let all = [Normal, Unknown, Control, UserDefined, Unused, Byte];
        all.into_iter().find(|t| *t as i32 == number)
    }
}

/// The vocabulary part of a GGUF's metadata.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocab {
    /// The kind of merging: `llama` (SentencePiece) or `gpt2` (byte-level).
    pub model: String,
    /// How texts are cut before byte-level merges (`gpt-2`, `llama-bpe`, `qwen2` ...).
    pub pre: Option<String>,
    /// The tokens by id.
    pub tokens: Vec<String>,
    /// The score of each token; the higher is merged first.
    pub scores: Option<Vec<f32>>,
    /// The type of each token, see [`TokenType`]; all normal where there is none.
    pub token_type: Option<Vec<i32>>,
    /// The merges, `left right`, most urgent first.
    pub merges: Option<Vec<String>>,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// The token that ends a text.
    pub eos: Option<u32>,
    /// The token for unknown characters.
    pub unk: Option<u32>,
    /// The token that fills up batches.
    pub pad: Option<u32>,
    /// Whether BOS is added; by kind where it is not said.
    pub add_bos: Option<bool>,
    /// Whether EOS is added; not, where it is not said.
    pub add_eos: Option<bool>,
    /// Whether a text gets a space before it; yes for `llama` where it is not said.
    pub add_space_prefix: Option<bool>,
    /// Whether special tokens swallow the spaces behind them. No GGUF key says so: llama.cpp goes by the file's name
    /// for it, and so does who fills this in.
    pub specials_strip_right: bool,
    /// The chat template.
    pub chat_template: Option<String>,
}

const KEY: &str = "tokenizer.ggml.";

impl GgufVocab {
    /// Reads a GGUF's vocabulary.
    ///
    /// # Errors
    /// If a key is missing or of another type.
    pub fn read(file: &gguf::File) -> Result<GgufVocab> {
        let key = |name: &str| format!("{KEY}{name}");
        let text = |name: &str| Ok::<_, Error>(file.text(&key(name))?.map(str::to_string));
        let Some(model) = text("model")? else {
            return Err(missing(file, "model"));
        };
        let Some(tokens) = file.texts(&key("tokens"))? else {
            return Err(missing(file, "tokens"));
        };
        let id = |name: &str| -> Result<Option<u32>> {
            let count = file.count(&key(name))?;
            // llama.cpp ignores an id outside of the vocabulary; many files have one.
            Ok(count.and_then(|id| u32::try_from(id).ok().filter(|id| (*id as usize) < tokens.len())))
        };
        let scores = numbers(file, &key("scores"))?;
        let types = numbers(file, &key("token_type"))?;
        Ok(GgufVocab {
            pre: text("pre")?,
            scores: scores.map(|list| list.into_iter().map(|x| x as f32).collect()),
            token_type: types.map(|list| list.into_iter().map(|x| x as i32).collect()),
            merges: file.texts(&key("merges"))?,
            bos: id("bos_token_id")?,
            eos: id("eos_token_id")?,
            unk: id("unknown_token_id")?,
            pad: id("padding_token_id")?,
            add_bos: file.flag(&key("add_bos_token"))?,
            add_eos: file.flag(&key("add_eos_token"))?,
            add_space_prefix: file.flag(&key("add_space_prefix"))?,
            specials_strip_right: file.text("general.name")?.is_some_and(strips_right),
            chat_template: file.text("tokenizer.chat_template")?.map(str::to_string),
            model,
            tokens,
        })
    }

    /// Adds the metadata to a file that is written, in the order of llama.cpp's converter.
    pub fn write(&self, out: &mut gguf::Writer<'_>) {
        let texts = |list: &[String]| gguf::Value::from(list.iter().collect::<gguf::Texts>());
        let mut set = |name: &str, value: Option<gguf::Value>| {
            if let Some(value) = value {
                out.set(format!("{KEY}{name}"), value);
            }
        };
        set("model", Some(self.model.as_str().into()));
        set("pre", self.pre.as_deref().map(Into::into));
        set("tokens", Some(texts(&self.tokens)));
        set("scores", self.scores.clone().map(Into::into));
        set("token_type", self.token_type.clone().map(Into::into));
        set("merges", self.merges.as_deref().map(texts));
        set("bos_token_id", self.bos.map(Into::into));
        set("eos_token_id", self.eos.map(Into::into));
        set("unknown_token_id", self.unk.map(Into::into));
        set("padding_token_id", self.pad.map(Into::into));
        set("add_bos_token", self.add_bos.map(Into::into));
        set("add_eos_token", self.add_eos.map(Into::into));
        set("add_space_prefix", self.add_space_prefix.map(Into::into));
        if let Some(template) = &self.chat_template {
            out.set("tokenizer.chat_template", template.as_str());
        }
    }

    /// A tokenizer as a GGUF holds it, with as many tokens as the model's embedding has rows.
    ///
    /// # Errors
    /// As [`super::to_gguf`], and if there are fewer rows than tokens.
    pub fn of(tokenizer: &Tokenizer, rows: usize) -> Result<GgufVocab> {
        let mut vocab = super::to_gguf(tokenizer)?;
        if vocab.tokens.len() > rows {
            return Err(Error::NotRepresentable {
                reason: format!("it has {} tokens and the model's embedding has {rows} rows", vocab.tokens.len()),
            });
        }
        vocab.pad_to(rows);
        Ok(vocab)
    }

    /// Adds unused tokens until there are as many as a model's embedding has rows.
    pub fn pad_to(&mut self, rows: usize) {
        for id in self.tokens.len()..rows {
            self.tokens.push(format!("[PAD{id}]"));
            if let Some(scores) = &mut self.scores {
                scores.push(-10_000.0);
            }
            if let Some(types) = &mut self.token_type {
                types.push(TokenType::Unused as i32);
            }
        }
    }

    /// What a program that runs this vocabulary does otherwise than the tokenizer it was made of.
    pub fn caveats(&self) -> Vec<String> {
        let mut out = Vec::new();
        if self.model == "llama" && !self.tokens.iter().any(|t| t == "<0x0A>") {
            out.push("the vocabulary has no byte tokens: llama.cpp stops on a character that no token has".into());
        }
        if self.eos.is_none() {
            let default = if self.model == "llama" { 2 } else { 11 };
            out.push(format!("the tokenizer names no end of text: llama.cpp takes token {default} for it"));
        }
        out
    }

    /// The type of a token.
    pub(super) fn type_of(&self, id: usize) -> TokenType {
        let types = self.token_type.as_ref();
        let number = types.and_then(|types| types.get(id)).copied();
        number.and_then(TokenType::of).unwrap_or(TokenType::Normal)
    }

    /// Checks lengths and ids against each other.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        let bad =
            |field: &str, problem: String| Err(complaint(path, field, problem, "convert the model to GGUF again"));
        let n = self.tokens.len();
        if n == 0 || n >= 1 << 24 {
            return bad("tokens", format!("has {n} entries"));
        }
        let lengths =
            [("scores", self.scores.as_ref().map(Vec::len)), ("token_type", self.token_type.as_ref().map(Vec::len))];
        for (field, len) in lengths {
            if let Some(len) = len
                && len != n
            {
                return bad(field, format!("has {len} entries for {n} tokens"));
            }
        }
        if let Some(scores) = &self.scores
            && let Some(at) = scores.iter().position(|s| s.is_nan())
        {
            return bad(&format!("scores[{at}]"), "is not a number".into());
        }
        let ids = [
            ("bos_token_id", self.bos),
            ("eos_token_id", self.eos),
            ("unknown_token_id", self.unk),
            ("padding_token_id", self.pad),
        ];
        for (field, id) in ids {
            if let Some(id) = id
                && id as usize >= n
            {
                return bad(field, format!("is {id} and there are {n} tokens"));
            }
        }
        Ok(())
    }
}

/// A complaint on a field of the metadata.
pub(super) fn complaint(path: &Path, field: &str, problem: String, remedy: &str) -> Error {
    Error::Field { path: path.into(), field: format!("{KEY}{field}"), problem, remedy: remedy.into() }
}

fn missing(file: &gguf::File, field: &str) -> Error {
    Error::Field {
        path: file.path().into(),
        field: format!("{KEY}{field}"),
        problem: "is missing".into(),
        remedy: "this GGUF has no tokenizer; convert the model again with its tokenizer files".into(),
    }
}

fn numbers(file: &gguf::File, key: &str) -> Result<Option<Vec<f64>>> {
    let Some(list) = file.list(key)? else {
        return Ok(None);
    };
    match list.to_f64() {
        Some(list) => Ok(Some(list)),
        None => Err(crate::Error::field(file.path(), key, "is not a list of numbers").into()),
    }
}

/// llama.cpp's rule, which goes by `general.name`.
fn strips_right(name: &str) -> bool {
    let name = name.to_lowercase();
    name.contains("phi-3") || name.contains("phi3")
}
