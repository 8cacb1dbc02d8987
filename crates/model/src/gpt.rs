//! `Gpt`: a model together with its tokenizer and how it ends and frames a conversation.

use crate::{Error, Model, Result, load, source::Source};
use formats::{
    chat_template::{self, Message},
    quantized::Format,
    tokenizer::{GgufVocab, Tokenizer},
};
use serde_json::{Map, Value};
use std::{
    panic::resume_unwind,
    path::{Path, PathBuf},
};

/// Everything that a model's files hold.
#[derive(Clone)]
pub struct Gpt {
    /// The directory or GGUF file.
    pub path: PathBuf,
    /// The weights.
    pub model: Model,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Tokens that end a text.
    pub ends: Vec<u32>,
    /// Jinja template of a conversation, where the model has one.
    pub template: Option<String>,
    /// `generation_config.json`, where there is one.
    pub generation: Option<Map<String, Value>>,
    /// Every file that was read.
    pub files: Vec<PathBuf>,
    /// Tensors that no site holds.
    pub unused: Vec<String>,
    /// The other quantizer in whose format the matrices are stored.
    pub format: Option<Format>,
    /// Matrices that another quantizer stored and that are decoded, with the reason.
    pub decoded: Vec<String>,
    /// The id that each token has in the files, where only some of them are left ([`Gpt::of_tokens`]).
    pub kept: Option<Vec<u32>>,
}

impl Gpt {
    /// Opens a Hugging Face directory, planish's own artefact or a GGUF file.
    ///
    /// # Errors
    /// As [`load::open`], and if the tokenizer is missing or malformed.
    pub fn open(path: &Path) -> Result<Gpt> {
        Gpt::open_and(path, |_| Ok(())).map(|(gpt, ())| gpt)
    }

    /// Opens a model and makes it ready: `prepare` works on the weights while the tokenizer is read.
    ///
    /// # Errors
    /// As [`Gpt::open`], and those of `prepare`.
    pub fn open_and<T>(path: &Path, prepare: impl FnOnce(&mut Model) -> Result<T>) -> Result<(Gpt, T)> {
        let load::Opened { mut model, source, unused, format, decoded } = load::open(path)?;
        let (words, prepared) = std::thread::scope(|scope| {
            let words = scope.spawn(|| Words::read(&source, path));
            let prepared = prepare(&mut model);
            (words.join(), prepared)
        });
        let Words { tokenizer, template, generation } = words.unwrap_or_else(|panic| resume_unwind(panic))?;
        let mut files = source.files();
        if path.is_dir() {
            let beside = [
                "config.json",
                "generation_config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "chat_template.jinja",
            ];
            files.extend(beside.map(|n| path.join(n)).into_iter().filter(|p| p.is_file()));
        }
        let mut gpt = Gpt {
            path: path.into(),
            ends: Vec::new(),
            template,
            generation,
            files,
            unused,
            format,
            decoded,
            kept: None,
            model,
            tokenizer,
        };
        gpt.ends = gpt.end_tokens();
        Ok((gpt, prepared?))
    }

    fn end_tokens(&self) -> Vec<u32> {
        let ids = |v: Option<&Value>| -> Vec<u32> {
            match v {
                Some(Value::Array(a)) => a.iter().filter_map(Value::as_u64).map(|id| id as u32).collect(),
                Some(v) => v.as_u64().map(|id| id as u32).into_iter().collect(),
                None => Vec::new(),
            }
        };
        let mut ends = ids(self.generation.as_ref().and_then(|g| g.get("eos_token_id")));
        if ends.is_empty() {
            ends = ids(self.model.config.get("eos_token_id"));
        }
        ends.extend(self.tokenizer.eos());
        ends.sort_unstable();
        ends.dedup();
        ends
    }

    /// The chat template, where it is another than that of the model's files.
    pub fn given_template(&self) -> Option<&str> {
        self.template.as_deref().filter(|template| self.tokenizer.chat_template() != Some(*template))
    }

    /// Writes a conversation as the model was trained to read it and cuts it into tokens.
    ///
    /// # Errors
    /// If the model has no chat template or it fails.
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        // The template writes the special tokens itself.
        Ok(self.tokenizer.encode(&self.conversation(messages, true)?, false)?)
    }

    /// Writes a conversation as the model was trained to read it, with or without the words that open an answer.
    ///
    /// # Errors
    /// As [`Gpt::chat_prompt`].
    pub fn conversation(&self, messages: &[Message], open: bool) -> Result<String> {
        let template = self.template.as_deref().ok_or_else(|| {
            Error::Asked(format!(
                "{} has no chat template: it was not trained to converse. Use `planish generate`, or give one: \
                 --template FILE, or chat_template.jinja beside its config.json",
                self.path.display()
            ))
        })?;
        let name = |id: Option<u32>| id.and_then(|id| self.tokenizer.token_of(id)).unwrap_or_default();
        let (bos, eos) = (name(self.tokenizer.bos()), name(self.tokenizer.eos()));
        Ok(chat_template::render(template, messages, &bos, &eos, open)?)
    }
}

/// What a model's files hold beside its weights.
struct Words {
    tokenizer: Tokenizer,
    template: Option<String>,
    generation: Option<Map<String, Value>>,
}

impl Words {
    fn read(source: &Source, path: &Path) -> Result<Words> {
        match source {
            Source::Gguf(file) => {
                let vocab = GgufVocab::read(file)?;
                let tokenizer = Tokenizer::from_gguf(&vocab, path)?;
                Ok(Words { tokenizer, template: vocab.chat_template, generation: None })
            }
            Source::Safetensors(_) => {
                let tokenizer = Tokenizer::from_dir(path)?;
                let template = tokenizer.chat_template().map(String::from);
                let generation = path.join("generation_config.json");
                let generation =
                    if generation.is_file() { Some(formats::json::read_object(&generation)?) } else { None };
                Ok(Words { tokenizer, template, generation })
            }
        }
    }
}
