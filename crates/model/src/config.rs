//! `config.json` with typed access: every complaint names the file and the field.

use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// A model's configuration in the fields of Hugging Face's `config.json`, whatever file it came from.
#[derive(Clone, Debug)]
pub struct Config {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Config {
    /// Wraps the fields read from `path`.
    pub fn new(path: &Path, fields: Map<String, Value>) -> Config {
        Config { path: path.into(), fields }
    }

    /// Where it was read.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All fields.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// All fields, to be changed.
    pub fn fields_mut(&mut self) -> &mut Map<String, Value> {
        &mut self.fields
    }

    /// The same with the fields of a JSON object where they are absent; `null` is not absent.
    ///
    /// # Errors
    /// If `fields` is no JSON object.
    pub fn assuming(&self, fields: &str) -> Result<Config> {
        let assumed: Map<String, Value> = serde_json::from_str(fields)
            .map_err(|e| Error::Asked(format!("the assumed fields {fields} are malformed: {e}")))?;
        let mut config = self.clone();
        for (field, value) in assumed {
            config.fields.entry(field).or_insert(value);
        }
        Ok(config)
    }

    /// An error about a field.
    pub fn error(&self, field: &str, reason: impl Into<String>) -> Error {
        Error::Config { path: self.path.clone(), field: field.into(), reason: reason.into() }
    }

    /// A field; absent and `null` are the same.
    pub fn get(&self, field: &str) -> Option<&Value> {
        let mut value = self.fields.get(field.split('.').next()?)?;
        for part in field.split('.').skip(1) {
            value = value.get(part)?;
        }
        (!value.is_null()).then_some(value)
    }

    /// A size: a whole number from 1 to 2^31.
    pub fn size(&self, field: &str) -> Result<usize> {
        self.size_or_none(field)?.ok_or_else(|| self.error(field, "is missing; it must be a whole number from 1 on"))
    }

    /// A size that may be absent.
    pub fn size_or_none(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (1..=1 << 31).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.error(field, format!("is {value}; it must be a whole number from 1 on"))),
        }
    }

    /// A size with a default.
    pub fn size_or(&self, field: &str, default: usize) -> Result<usize> {
        Ok(self.size_or_none(field)?.unwrap_or(default))
    }

    /// A finite number that may be absent.
    pub fn number_or_none(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(self.error(field, format!("is {value}; it must be a number"))),
        }
    }

    /// A finite number with a default.
    pub fn number_or(&self, field: &str, default: f64) -> Result<f64> {
        Ok(self.number_or_none(field)?.unwrap_or(default))
    }

    /// A switch with a default.
    pub fn flag_or(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(value) => Err(self.error(field, format!("is {value}; it must be true or false"))),
        }
    }

    /// A text with a default.
    pub fn text_or<'a>(&'a self, field: &str, default: &'a str) -> Result<&'a str> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::String(s)) => Ok(s),
            Some(value) => Err(self.error(field, format!("is {value}; it must be a text"))),
        }
    }

    /// A text that may be absent.
    pub fn text_or_none(&self, field: &str) -> Result<Option<&str>> {
        if self.get(field).is_some() { self.text_or(field, "").map(Some) } else { Ok(None) }
    }

    /// A list of numbers that may be absent.
    pub fn numbers(&self, field: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let list = value.as_array().and_then(|a| a.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>());
        list.map(Some).ok_or_else(|| self.error(field, "must be a list of numbers"))
    }

    /// The architecture: the first of `architectures`, or what `model_type` stands for.
    pub fn architecture(&self) -> Result<&str> {
        match self.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str) {
            Some(name) => Ok(name),
            None => self.text_or("model_type", "").and_then(|name| {
                let missing = "is missing; it names the model's class, for example [\"LlamaForCausalLM\"]";
                if name.is_empty() { Err(self.error("architectures", missing)) } else { Ok(name) }
            }),
        }
    }
}
