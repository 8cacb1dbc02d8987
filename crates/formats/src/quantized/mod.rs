//! How other quantizers keep a matrix in safetensors: several tensors under one name, told of by
//! `quantization_config` of config.json. Read into planish's own storages bit for bit, and written from them.
//!
//! Formats: GPTQ (AutoGPTQ, GPTQModel; both forms of zero points), AWQ (the "gemm" layout) and compressed-tensors
//! (vLLM, llm-compressor). A matrix whose scales no storage of planish holds exactly (groups along another order of
//! columns, scales beyond 16-bit floats) is decoded into 32-bit floats, and the reader is told.

mod awq;
mod compressed;
mod gptq;
mod groups;

use crate::{
    Dtype, Error, Result,
    safetensors::{Archive, Entry, TensorView},
};
use serde_json::{Map, Value};
use std::path::Path;
use tensor::{
    Bytes, Rounding, Storage, Tensor, Weight,
    grid::{Grid, Zero},
};

/// A format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// GPTQ's files: codes of a column after each other in words of 32 bits.
    Gptq,
    /// AWQ's: codes of a row, eight to a word, in an order of their own.
    Awq,
    /// compressed-tensors: what vLLM and llm-compressor write.
    CompressedTensors,
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 3] = [Format::Gptq, Format::Awq, Format::CompressedTensors];

    /// Its name on the command line and in `quant_method`.
    pub fn name(self) -> &'static str {
        match self {
            Format::Gptq => "gptq",
            Format::Awq => "awq",
            Format::CompressedTensors => "compressed-tensors",
        }
    }

    /// The format of that name.
    pub fn parse(name: &str) -> Option<Format> {
        Format::ALL.into_iter().find(|f| f.name() == name)
    }

    /// Writes a matrix as this format keeps it, under a name without `.weight`; `plain_zeros` is that of the whole model
    /// ([`Format::plain_zeros`]). `Err` says what the format cannot hold.
    ///
    /// # Errors
    /// If the format has no such storage.
    pub fn entries(
        self,
        prefix: &str,
        weight: &Weight,
        plain_zeros: bool,
        rounding: Option<Rounding>,
    ) -> Result<Vec<Entry>, String> {
        if rounding.is_some() && self != Format::CompressedTensors {
            return Err(format!("{} does not tell its readers to round inputs; compressed-tensors does", self.name()));
        }
        match self {
            Format::Gptq => gptq::entries(prefix, weight, plain_zeros),
            Format::Awq => awq::entries(prefix, weight),
            Format::CompressedTensors => compressed::entries(prefix, weight, rounding),
        }
    }

    /// Has a model to be written in the version of the format that keeps zero points as they are? Where all are in the middle
    /// GPTQ's first version does, which more readers know.
    pub fn plain_zeros(self, mut storages: impl Iterator<Item = Storage>) -> bool {
        self == Format::Gptq && storages.any(|s| matches!(s, Storage::Grid(Grid::Int { zero: Zero::Point, .. })))
    }

    /// Why a matrix of that storage and shape cannot be written, if it cannot.
    pub fn refuses(self, storage: Storage, rows: usize, cols: usize) -> Option<String> {
        // A few rows tell as much as all: what counts is how many words they fill.
        let rows = if rows > 64 { 32 + rows % 32 } else { rows };
        match Weight::encode(&Tensor::zeros(rows, cols), storage, None) {
            Ok(weight) => self.entries("a", &weight, false, None).err(),
            Err(e) => Some(e.to_string()),
        }
    }

    /// `quantization_config` for matrices that were written: their names without `.weight` and how their inputs are rounded,
    /// and the names of matrices that stayed floats. `Err` says what the format cannot hold.
    ///
    /// # Errors
    /// If the format cannot tell of such a mixture.
    pub fn config(self, written: &[Written], floats: &[String]) -> Result<Value, String> {
        match self {
            Format::Gptq => gptq::config(written, floats, self.plain_zeros(written.iter().map(|w| w.weight.storage()))),
            Format::Awq => awq::config(written, floats),
            Format::CompressedTensors => compressed::config(written, floats),
        }
    }
}

/// A matrix that was written.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its name without `.weight`.
    pub name: String,
    /// It.
    pub weight: Weight,
    /// How its inputs are rounded.
    pub rounding: Option<Rounding>,
}

/// What a model's configuration says of its storage.
#[derive(Clone, Debug)]
pub struct Scheme {
    format: Format,
    /// GPTQ: are zero points stored less one?
    less_one: bool,
    /// compressed-tensors: how inputs are rounded, by the matrices that it concerns.
    inputs: Vec<compressed::Inputs>,
}

/// A matrix as it was read.
#[derive(Debug)]
pub struct Found {
    /// It, in one of planish's storages.
    pub weight: Weight,
    /// The tensors that it was made of.
    pub names: Vec<String>,
    /// Why it is no longer codes, where it is not.
    pub decoded: Option<String>,
    /// How its inputs are to be rounded.
    pub rounding: Option<Rounding>,
}

impl Scheme {
    /// Reads `quantization_config`.
    ///
    /// # Errors
    /// If planish does not read such files; the message names what it reads.
    pub fn read(path: &Path, config: &Map<String, Value>) -> Result<Scheme> {
        let text = |key: &str| config.get(key).and_then(Value::as_str);
        let method = text("quant_method").unwrap_or("unknown");
        let remedy = "give the unquantized model";
        let Some(format) = Format::parse(method) else {
            let reason = format!("says {method:?}; planish reads gptq, awq and compressed-tensors");
            return Err(Error::unsupported(path, "quantization_config", reason, remedy));
        };
        if format == Format::Awq && text("version").is_some_and(|v| !v.eq_ignore_ascii_case("gemm")) {
            let reason = format!("says version {:?}; planish reads the \"gemm\" layout", text("version").unwrap_or(""));
            return Err(Error::unsupported(path, "quantization_config", reason, remedy));
        }
        // Version 1 of the files keeps zero points less one, whatever wrote them.
        let less_one = text("checkpoint_format") != Some("gptq_v2");
        let inputs = match format {
            Format::CompressedTensors => compressed::inputs(path, config)?,
            _ => Vec::new(),
        };
        Ok(Scheme { format, less_one, inputs })
    }

    /// The format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The matrix under a name without `.weight`; `None` where it is stored as plain floats, or not at all.
    ///
    /// # Errors
    /// If its tensors do not fit each other.
    pub fn matrix(&self, archive: &Archive, prefix: &str) -> Result<Option<Found>> {
        let parts = Parts { archive, prefix };
        match self.format {
            Format::Gptq => gptq::matrix(&parts, self.less_one),
            Format::Awq => awq::matrix(&parts),
            Format::CompressedTensors => compressed::matrix(&parts, &self.inputs),
        }
    }
}

/// The tensors of one matrix.
struct Parts<'a> {
    archive: &'a Archive,
    prefix: &'a str,
}

impl Parts<'_> {
    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.prefix)
    }

    fn get(&self, part: &str) -> Option<&TensorView> {
        self.archive.get(&self.name(part))
    }

    fn need(&self, part: &str) -> Result<&TensorView> {
        self.get(part).ok_or_else(|| self.error(part, "is missing; download the model again"))
    }

    fn error(&self, part: &str, reason: impl AsRef<str>) -> Error {
        Error::field(self.archive.path(), self.name(part), reason)
    }

    /// A tensor of two dimensions and one element type.
    fn matrix(&self, part: &str, dtype: Dtype) -> Result<(&TensorView, [usize; 2])> {
        let view = self.need(part)?;
        if view.dtype != dtype {
            return Err(self.error(part, format!("is {}; it must be {}", view.dtype.name(), dtype.name())));
        }
        match view.shape[..] {
            [rows, cols] => Ok((view, [rows, cols])),
            _ => Err(self.error(part, format!("has shape {:?}; it must have two dimensions", view.shape))),
        }
    }

    /// Refuses a tensor of another shape.
    fn check(&self, part: &str, view: &TensorView, shape: &[usize]) -> Result<()> {
        if view.shape == shape {
            return Ok(());
        }
        Err(self.error(part, format!("has shape {:?} where the others ask for {shape:?}", view.shape)))
    }

    /// The values of a float tensor.
    fn floats(&self, part: &str) -> Result<(Vec<f32>, &[usize])> {
        let view = self.need(part)?;
        let two = |f: fn(u16) -> f32| {
            view.bytes.chunks_exact(2).map(|b| f(u16::from_le_bytes([b[0], b[1]]))).collect::<Vec<f32>>()
        };
        let values = match view.dtype {
            Dtype::F32 => words(&view.bytes).map(f32::from_bits).collect(),
            Dtype::F16 => two(|b| half::f16::from_bits(b).to_f32()),
            Dtype::Bf16 => two(|b| f32::from_bits(u32::from(b) << 16)),
            other => return Err(self.error(part, format!("is {}; scales are F32, F16 or BF16", other.name()))),
        };
        match values.iter().position(|v: &f32| !v.is_finite()) {
            Some(at) => Err(self.error(part, format!("holds {} at place {at}; the model is damaged", values[at]))),
            None => Ok((values, &view.shape)),
        }
    }

    /// What was read, and what it was made of.
    fn found(&self, matrix: (Weight, Option<String>), parts: &[&str]) -> Found {
        let names = parts.iter().filter(|p| self.get(p).is_some()).map(|p| self.name(p)).collect();
        Found { weight: matrix.0, names, decoded: matrix.1, rounding: None }
    }
}

/// Little-endian words of 32 bits.
fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b))
}

/// A tensor of words.
fn int32(name: String, shape: Vec<usize>, words: impl Iterator<Item = u32>) -> Entry {
    Entry { name, dtype: Dtype::I32, shape, bytes: Bytes::from_vec(words.flat_map(u32::to_le_bytes).collect()) }
}

/// A tensor of 16-bit floats.
fn halves(name: String, shape: Vec<usize>, values: impl Iterator<Item = f32>) -> Entry {
    let bytes = values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect();
    Entry { name, dtype: Dtype::F16, shape, bytes: Bytes::from_vec(bytes) }
}
