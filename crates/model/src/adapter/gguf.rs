//! Adapters as llama.cpp reads them: a GGUF file of pairs `NAME.lora_a` and `NAME.lora_b`.

use super::{Adapter, Adapters, modules::Module};
use crate::{Error, Model, Result, source::Source};
use formats::gguf::{File, GgmlType, Value, Writer};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};
use tensor::{Bytes, Storage, Tensor, Weight};

const DOWN: &str = "lora_a";
const UP: &str = "lora_b";
const ALPHA: &str = "adapter.lora.alpha";

/// Reads a file.
pub(super) fn read(model: &Model, path: &Path) -> Result<Adapters> {
    let file = File::open(path)?;
    let bad = |key: &str, reason: String| Error::Format(formats::Error::field(path, key, reason));
    for (key, want) in [("general.type", "adapter"), ("adapter.type", "lora")] {
        let is = file.text(key)?.unwrap_or("missing");
        if is != want {
            return Err(bad(key, format!("is {is:?} and not {want:?}: the file holds no LoRA adapter")));
        }
    }
    let architecture = file.text("general.architecture")?.unwrap_or("").to_string();
    let gguf = model.family.gguf.as_ref().filter(|g| g.architecture == architecture);
    let Some(gguf) = gguf else {
        return Err(bad("general.architecture", format!("is {architecture:?}; the model is of {}", model.family.name)));
    };
    let alpha = file.number(ALPHA)?.unwrap_or(0.0);
    let source = Source::Gguf(file);
    let mut left: BTreeSet<String> = source.names().into_iter().collect();
    let mut adapters = Adapters::new();
    for module in Module::all(model, gguf.stored) {
        let names = [DOWN, UP].map(|end| format!("{}.weight.{end}", module.name()));
        if !left.contains(&names[0]) && !left.contains(&names[1]) {
            continue;
        }
        let [down, up] = [floats(&source, &names[0])?, floats(&source, &names[1])?];
        names.iter().for_each(|n| _ = left.remove(n));
        if down.rows() == 0 || up.cols() != down.rows() {
            let reason = format!("is of rank {}, and its pair of rank {}", up.cols(), down.rows());
            return Err(source.error(&names[1], reason));
        }
        // Without an alpha llama.cpp multiplies by 1.
        let scale = if alpha == 0.0 { 1.0 } else { alpha / down.rows() as f64 };
        let adapter = Adapter { down, up, scale: scale as f32, magnitude: None };
        adapters.extend(module.split(adapter).map_err(|reason| source.error(&names[1], reason))?);
    }
    match left.first() {
        None => Ok(adapters),
        Some(name) => Err(source.error(name, "adapts no linear matrix of this model's blocks; merge it first")),
    }
}

fn floats(source: &Source, name: &str) -> Result<Tensor> {
    let raw = source.raw(name)?;
    let [rows, cols] = raw.shape[..] else {
        return Err(source.error(name, format!("has shape {:?}; an adapter's have two dimensions", raw.shape)));
    };
    let weight = Weight::new(raw.storage, rows, cols, raw.bytes);
    weight.map(|w| w.to_tensor()).map_err(|e| source.error(name, e.to_string()))
}

/// Writes a file, its numbers in 32-bit floats.
///
/// # Errors
/// If llama.cpp does not compute such an adapter, or the file cannot be written.
pub fn write(model: &Model, adapters: &Adapters, path: &Path) -> Result<()> {
    let Some(gguf) = model.family.gguf.as_ref() else {
        return Err(Error::Asked(format!("llama.cpp does not compute the family {}", model.family.name)));
    };
    if let Some((site, _)) = adapters.iter().find(|(_, a)| a.magnitude.is_some()) {
        let reason = "has magnitudes (DoRA), which llama.cpp does not compute; export with --merge";
        return Err(Error::Site { site: *site, reason: reason.into() });
    }
    let mut joined = BTreeMap::new();
    for module in Module::all(model, gguf.stored) {
        joined.extend(module.join(model, adapters)?.map(|adapter| (module.name(), adapter)));
    }
    let Some(first) = joined.values().next() else {
        return Err(Error::Asked("there is no adapter to write".into()));
    };
    let alpha = match first.scale * first.rank() as f32 {
        0.0 => 1.0,
        alpha => alpha,
    };
    let mut out = Writer::new();
    out.set("general.architecture", Value::String(gguf.architecture.into()));
    out.set("general.type", Value::String("adapter".into()));
    out.set("adapter.type", Value::String("lora".into()));
    out.set(ALPHA, Value::F32(alpha));
    let kind = GgmlType::of(Storage::F32).ok_or_else(|| Error::Asked("GGUF has no 32-bit floats".into()))?;
    for (name, adapter) in &joined {
        // One alpha serves all: what another scale or rank asks for goes into `B`.
        let factor = adapter.scale * adapter.rank() as f32 / alpha;
        let scaled: Vec<f32> = adapter.up.as_slice().iter().map(|b| b * factor).collect();
        let down = Bytes::from_f32(adapter.down.as_slice().to_vec());
        let up = Bytes::from_f32(scaled);
        let shape = |x: &Tensor| vec![x.rows(), x.cols()];
        out.tensor(format!("{name}.weight.{DOWN}"), shape(&adapter.down), kind, Box::new(move || Ok(down.clone())));
        out.tensor(format!("{name}.weight.{UP}"), shape(&adapter.up), kind, Box::new(move || Ok(up.clone())));
    }
    Ok(out.write(path)?)
}
