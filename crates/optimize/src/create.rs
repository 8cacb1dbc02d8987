//! A model from nothing: its shape, its tokenizer and what it is taught, as one file says.

use crate::{
    Error, Result, data, journal,
    lesson::{Settings, Texts},
    progress::Progress,
    teach::{self, Place, Taught},
};
use formats::{atomic, tokenizer};
use model::{Config, Gpt, Model, save};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::{
    fs,
    path::{Path, PathBuf},
};
use train::ranks;

/// What `planish train CONFIG.toml` reads.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Creation {
    /// The shape, in the words of `config.json`; the vocabulary comes from the tokenizer.
    pub model: Map<String, Value>,
    /// The tokenizer.
    #[serde(default)]
    pub tokenizer: Words,
    /// The texts.
    #[serde(default)]
    pub data: Sources,
    /// How it is taught.
    #[serde(default)]
    pub training: Settings,
}

/// Where the tokenizer comes from: one of both.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Words {
    /// A byte-level BPE of so many tokens, learned from the text.
    pub vocab: Option<usize>,
    /// A directory that has one.
    pub from: Option<PathBuf>,
}

/// Where texts come from; paths are relative to the file that names them.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sources {
    /// What is learned: a text (UTF-8), or tokens (`.u16`).
    pub train: Option<PathBuf>,
    /// What is measured; a twentieth of the documents where none is given.
    pub validation: Option<PathBuf>,
    /// What separates documents.
    pub separator: String,
}

impl Default for Sources {
    fn default() -> Sources {
        Sources { train: None, validation: None, separator: data::SEPARATOR.into() }
    }
}

impl Creation {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, or says what cannot be; the error names the field.
    pub fn read(path: &Path) -> Result<Creation> {
        let text = data::read_text(path)?;
        let bad = |reason: String| Error::Data { path: path.into(), reason };
        let mut creation: Creation = toml::from_str(&text).map_err(|e| bad(e.to_string()))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let Creation { tokenizer, data, .. } = &mut creation;
        let paths = [data.train.as_mut(), data.validation.as_mut(), tokenizer.from.as_mut()];
        paths.into_iter().flatten().for_each(|p| *p = folder.join(&*p));
        Ok(creation)
    }
}

/// Makes a model and teaches it.
///
/// # Errors
/// As [`teach::run`], and if the shape is of no known family.
pub fn run(creation: &Creation, path: &Path, seed: u64, place: &Place, bar: &dyn Progress) -> Result<Taught> {
    let bad = |reason: &str| Err(Error::Data { path: path.into(), reason: reason.into() });
    let Some(train) = creation.data.train.clone() else {
        return bad("names no text to learn: give --data FILE, or `train = FILE` in [data]");
    };
    let start = journal::beside(&place.out, "start");
    let words = match (&creation.tokenizer.from, creation.tokenizer.vocab) {
        (Some(from), None) => Origin::Taken(from.clone()),
        (None, Some(vocab)) => Origin::Learned(vocab, text(&train)?),
        _ => {
            return bad(
                "takes one tokenizer: `vocab = 4096` in [tokenizer] to learn one, or `from = DIR` (--tokenizer DIR)",
            );
        }
    };
    let ranks = ranks::of_process();
    ranks::decided(&*ranks, || born(creation, &words, path, seed, &start, bar).map(|()| Vec::new()))?;
    drop(words);
    let gpt = Gpt::open(&start)?;
    let texts =
        Texts { data: train, validation: creation.data.validation.clone(), separator: creation.data.separator.clone() };
    let lesson = creation.training.lesson(texts, gpt.model.spec.context, seed)?;
    let taught = teach::run(&gpt, None, &lesson, place, bar)?;
    drop(gpt);
    // Every rank has opened it by now.
    if ranks.rank() == 0 {
        unmake(&start)?;
    }
    Ok(taught)
}

/// Removes the directory where a model began, its key last: what a kill leaves is empty or still known as ours.
fn unmake(start: &Path) -> Result<()> {
    let remove = || -> std::io::Result<()> {
        let key = start.join("key");
        for entry in fs::read_dir(start)? {
            let path = entry?.path();
            if path != key {
                fs::remove_file(path)?;
            }
        }
        if key.exists() {
            fs::remove_file(key)?;
        }
        fs::remove_dir(start)
    };
    Ok(remove().map_err(formats::Error::io(start, "remove it"))?)
}

/// Where a tokenizer comes from.
enum Origin {
    /// From a directory.
    Taken(PathBuf),
    /// So many tokens from this text.
    Learned(usize, String),
}

/// The text that a tokenizer is learned from.
fn text(path: &Path) -> Result<String> {
    if path.extension().is_some_and(|e| e == "u16") {
        let reason = "holds tokens: say which tokenizer made them with --tokenizer DIR or `from = DIR` in [tokenizer]";
        return Err(Error::Data { path: path.into(), reason: reason.into() });
    }
    Ok(data::read_text(path)?)
}

/// Writes the model that has learned nothing yet, unless it lies there from an interrupted run.
fn born(creation: &Creation, origin: &Origin, path: &Path, seed: u64, start: &Path, bar: &dyn Progress) -> Result<()> {
    let mut hasher = blake3::Hasher::new();
    let about = (&creation.model, creation.tokenizer.vocab, seed);
    hasher.update(serde_json::to_string(&about).map_err(|e| Error::Asked(e.to_string()))?.as_bytes());
    match origin {
        Origin::Taken(dir) => {
            let file = dir.join("tokenizer.json");
            hasher.update(&fs::read(&file).map_err(formats::Error::io(&file, "read it"))?);
        }
        Origin::Learned(_, text) => _ = hasher.update(text.as_bytes()),
    }
    let key = hasher.finalize().to_hex().to_string();
    let key_file = start.join("key");
    if fs::read_to_string(&key_file).is_ok_and(|found| found == key) {
        return Ok(());
    }
    if start.exists() {
        // Nothing is taken away that another hand put there.
        let empty = fs::read_dir(start).is_ok_and(|mut names| names.next().is_none());
        if !key_file.is_file() && !empty {
            let words = "is in the way: the model that is to learn begins there. Move it away, or give another --out";
            return Err(Error::Asked(format!("{} {words}", start.display())));
        }
        unmake(start)?;
    }
    fs::create_dir_all(start).map_err(formats::Error::io(start, "make it"))?;
    // Written in place, as a file beside it would make the directory another hand's if a kill came before its renaming.
    fs::write(&key_file, b"unfinished").map_err(formats::Error::io(&key_file, "write it"))?;
    match origin {
        Origin::Learned(vocab, text) => {
            bar.note(&format!("learning a tokenizer of {vocab} tokens"));
            let parts = text.split(creation.data.separator.as_str());
            let [tokenizer, config] = tokenizer::learn_bpe(parts, *vocab, path)?;
            for (name, json) in [("tokenizer.json", tokenizer), ("tokenizer_config.json", config)] {
                let text = serde_json::to_string(&json).map_err(|e| Error::Asked(e.to_string()))?;
                atomic::write_bytes(&start.join(name), text.as_bytes())?;
            }
        }
        Origin::Taken(dir) => {
            for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"] {
                let from = dir.join(name);
                if from.is_file() {
                    fs::copy(&from, start.join(name)).map_err(formats::Error::io(&from, "copy it"))?;
                }
            }
        }
    }
    let words = tokenizer::Tokenizer::from_dir(start)?;
    let mut fields = creation.model.clone();
    let numbers = [
        ("vocab_size", Some(words.vocab_size() as u64)),
        ("bos_token_id", words.bos().map(u64::from)),
        ("eos_token_id", words.eos().map(u64::from)),
    ];
    for (field, value) in numbers {
        fields.entry(field).or_insert(value.map_or(Value::Null, Value::from));
    }
    let model = Model::fresh(Config::new(path, fields), seed)?;
    if model.spec.vocab < words.vocab_size() {
        let reason = format!("is {}, and the tokenizer has {} tokens", model.spec.vocab, words.vocab_size());
        return Err(Error::Model(model::Error::Config { path: path.into(), field: "vocab_size".into(), reason }));
    }
    save::directory(&model, start)?;
    // The key comes last: a directory with another one is not whole.
    Ok(atomic::write_bytes(&key_file, key.as_bytes())?)
}
