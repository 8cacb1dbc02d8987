//! Adapters as PEFT keeps them: a directory of `adapter_config.json` and `adapter_model.safetensors`.

use super::{Adapter, Adapters, modules::Module};
use crate::{Config, Error, Model, Result, source::Source};
use formats::{
    Dtype,
    safetensors::{self, Archive, Entry},
};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, path::Path};
use tensor::{Bytes, Tensor, Weight};

/// The configuration of an adapter.
pub const CONFIG: &str = "adapter_config.json";
/// Its weights.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before the names of a model's modules.
const PREFIX: &str = "base_model.model.";
const DOWN: &str = "lora_A.weight";
const UP: &str = "lora_B.weight";
const MAGNITUDE: &str = "lora_magnitude_vector";

/// Reads a directory.
pub(super) fn read(model: &Model, dir: &Path) -> Result<Adapters> {
    let path = dir.join(CONFIG);
    if !path.is_file() {
        let reason = format!("has no {CONFIG}; an adapter is a PEFT directory, or a GGUF file of one");
        return Err(Error::NoModel { path: dir.into(), reason });
    }
    let config = Config::new(&path, formats::json::read_object(&path)?);
    refuse(&config)?;
    let weights = dir.join(WEIGHTS);
    if !weights.is_file() && dir.join("adapter_model.bin").is_file() {
        let remedy = "save the adapter again with save_pretrained(..., safe_serialization=True)";
        return Err(formats::Error::unsupported(dir, WEIGHTS, "is not there, only adapter_model.bin", remedy).into());
    }
    let source = Source::Safetensors(Archive::open(&weights)?);
    let modules = named(model);
    let mut found: BTreeMap<String, Parts> = BTreeMap::new();
    for name in source.names() {
        let bad = |reason: &str| source.error(&name, reason);
        let (module, part) = cut(&name).ok_or_else(|| {
            bad("is no A, B or magnitude of LoRA's linear modules, the only adapters that planish computes")
        })?;
        if !modules.contains_key(module) {
            return Err(bad(
                "belongs to no linear module of this model's blocks; the adapter is of another model, or of \
                            embeddings or the head, which planish does not adapt: merge it with PEFT's merge_and_unload",
            ));
        }
        let parts = found.entry(module.into()).or_default();
        let place = [&mut parts.down, &mut parts.up, &mut parts.magnitude];
        if place[part].replace(floats(&source, &name)?).is_some() {
            return Err(bad("stands twice"));
        }
    }
    let mut adapters = Adapters::new();
    for (name, parts) in found {
        let bad = |reason: String| source.error(&format!("{PREFIX}{name}"), reason);
        let adapter = parts.adapter(&config, &name).map_err(|e| match e {
            Fault::Tensor(reason) => bad(reason),
            Fault::Config(e) => *e,
        })?;
        if let Some(module) = modules.get(&name) {
            adapters.extend(module.split(adapter).map_err(|reason| bad(format!("{reason}; it is of another model")))?);
        }
    }
    Ok(adapters)
}

/// Modules by their names, and by those that base checkpoints have, without the first part.
fn named(model: &Model) -> BTreeMap<String, Module> {
    let mut all = BTreeMap::new();
    for module in Module::all(model, model.family.stored) {
        let name = module.name();
        all.extend(name.split_once('.').map(|(_, short)| (short.to_string(), module.clone())));
        all.insert(name, module);
    }
    all
}

/// The module that a tensor is of, and which part of its adapter it is.
fn cut(name: &str) -> Option<(&str, usize)> {
    let name = name.strip_prefix(PREFIX)?;
    let parts = [(DOWN, 0), (UP, 1), (MAGNITUDE, 2), ("lora_magnitude_vector.weight", 2)];
    parts.iter().find_map(|(end, part)| Some((name.strip_suffix(end)?.strip_suffix('.')?, *part)))
}

fn floats(source: &Source, name: &str) -> Result<Tensor> {
    let raw = source.raw(name)?;
    let [rows, cols] = match raw.shape[..] {
        [rows, cols] => [rows, cols],
        [rows] => [rows, 1],
        _ => return Err(source.error(name, format!("has shape {:?}; an adapter's have two dimensions", raw.shape))),
    };
    let weight = Weight::new(raw.storage, rows, cols, raw.bytes);
    weight.map(|w| w.to_tensor()).map_err(|e| source.error(name, e.to_string()))
}

/// Refuses by name what would compute something else than a linear change.
fn refuse(config: &Config) -> Result<()> {
    let kind = config.text_or("peft_type", "")?;
    if kind != "LORA" {
        return Err(config.error("peft_type", format!("is {kind:?}; planish reads LORA")));
    }
    let bias = config.text_or("bias", "none")?;
    if bias != "none" {
        return Err(
            config.error("bias", format!("is {bias:?}; planish reads adapters that leave biases alone: \"none\""))
        );
    }
    let others = [
        "layer_replication",
        "lora_bias",
        "use_qalora",
        "alora_invocation_tokens",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
        "trainable_token_indices",
        "target_parameters",
        "modules_to_save",
    ];
    let asked = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    };
    if let Some(field) = others.into_iter().find(|f| config.get(f).is_some_and(asked)) {
        return Err(config.error(field, "is set, which planish does not compute; merge the adapter with PEFT first"));
    }
    // These begin from another base than the model's files: what they add is not what was learned.
    match config.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => Ok(()),
        Some(Value::String(name)) if ["gaussian", "eva", "orthogonal"].contains(&name.to_lowercase().as_str()) => {
            Ok(())
        }
        Some(other) => Err(config.error(
            "init_lora_weights",
            format!(
                "is {other}, which changes the base as well; save the adapter with \
                 path_initial_model_for_weight_conversion, which makes it a plain one"
            ),
        )),
    }
}

/// The tensors of a module.
#[derive(Default)]
struct Parts {
    down: Option<Tensor>,
    up: Option<Tensor>,
    magnitude: Option<Tensor>,
}

enum Fault {
    Tensor(String),
    Config(Box<Error>),
}

impl From<Error> for Fault {
    fn from(e: Error) -> Fault {
        Fault::Config(Box::new(e))
    }
}

impl Parts {
    fn adapter(self, config: &Config, module: &str) -> Result<Adapter, Fault> {
        let says = |reason: &str| Fault::Tensor(reason.into());
        let down = self.down.ok_or_else(|| says("has no lora_A; the file is incomplete"))?;
        let up = self.up.ok_or_else(|| says("has no lora_B; the file is incomplete"))?;
        let (rank, asked) = (down.rows(), config.size("r")?);
        if rank == 0 || up.cols() != rank {
            return Err(Fault::Tensor(format!("has a lora_A of rank {rank} and a lora_B of rank {}", up.cols())));
        }
        if rank != pattern(config, "rank_pattern", module)?.unwrap_or(asked as f64) as usize {
            return Err(Fault::Tensor(format!("is of rank {rank} where {CONFIG} says otherwise")));
        }
        let dora = config.flag_or("use_dora", false)?;
        if dora != self.magnitude.is_some() {
            return Err(says("does not have the magnitudes that use_dora tells of"));
        }
        let alpha = match pattern(config, "alpha_pattern", module)? {
            Some(alpha) => alpha,
            None => config.number_or("lora_alpha", 8.0)?,
        };
        let rank = rank as f64;
        let scale = if config.flag_or("use_rslora", false)? { alpha / rank.sqrt() } else { alpha / rank };
        Ok(Adapter { down, up, scale: scale as f32, magnitude: self.magnitude.map(Tensor::into_vec) })
    }
}

/// What a table of patterns says of a module: the first whose name is the end of the module's.
fn pattern(config: &Config, field: &str, module: &str) -> Result<Option<f64>> {
    let Some(patterns) = config.get(field) else { return Ok(None) };
    let patterns = patterns.as_object().ok_or_else(|| config.error(field, "must be a table of numbers"))?;
    for (key, value) in patterns {
        let name = key.replace("\\.", ".");
        let (name, whole) = name.strip_prefix('^').map_or((name.as_str(), false), |n| (n, true));
        if !name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) {
            return Err(config.error(field, format!("has {key:?}, a pattern and not the name of a module")));
        }
        let ends = module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.') && !whole);
        if ends {
            let number = value.as_f64().filter(|v| v.is_finite());
            return number.map(Some).ok_or_else(|| config.error(field, format!("gives {key:?} the value {value}")));
        }
    }
    Ok(None)
}

/// How a written adapter's scales are told.
struct Scales {
    rslora: bool,
}

impl Scales {
    fn alpha(&self, adapter: &Adapter) -> Value {
        let rank = adapter.rank() as f64;
        let alpha = f64::from(adapter.scale) * if self.rslora { rank.sqrt() } else { rank };
        let whole = alpha.round();
        // What was a whole number before it was divided in 32 bits is one again.
        if (alpha - whole).abs() < 1e-6 * whole { json!(whole as i64) } else { json!(alpha) }
    }
}

/// Writes a directory's two files; `base` names the model that the adapter is of.
///
/// # Errors
/// If sites that share a matrix of the files cannot share an adapter, or a file cannot be written.
pub fn write(model: &Model, adapters: &Adapters, rslora: bool, base: &str, dir: &Path) -> Result<()> {
    let scales = Scales { rslora };
    let modules = Module::all(model, model.family.stored);
    let mut joined: Vec<(&Module, Adapter)> = Vec::new();
    for module in &modules {
        joined.extend(module.join(model, adapters)?.map(|adapter| (module, adapter)));
    }
    let Some((_, usual)) = joined.iter().min_by_key(|(_, a)| a.rank()) else {
        return Err(Error::Asked("there is no adapter to write".into()));
    };
    let (rank, alpha, dora) = (usual.rank(), scales.alpha(usual), usual.magnitude.is_some());
    if let Some((module, _)) = joined.iter().find(|(_, a)| a.magnitude.is_some() != dora) {
        return Err(Error::Asked(format!("{}: PEFT has magnitudes for all modules or for none", module.name())));
    }
    let (mut ranks, mut alphas, mut targets) = (Map::new(), Map::new(), Vec::new());
    let mut entries = Vec::new();
    for (module, adapter) in &joined {
        let alike: Vec<&Adapter> =
            joined.iter().filter(|(m, _)| m.short_name() == module.short_name()).map(|(_, a)| a).collect();
        let everywhere = alike.len() == usize::from(model.spec.layers());
        let same = alike.iter().all(|a| a.rank() == adapter.rank() && a.scale == adapter.scale);
        let name = if everywhere && same { module.short_name().to_string() } else { module.name() };
        if adapter.rank() != rank {
            ranks.insert(name.clone(), json!(adapter.rank()));
        }
        if scales.alpha(adapter) != alpha {
            alphas.insert(name.clone(), scales.alpha(adapter));
        }
        if !targets.contains(&name) {
            targets.push(name);
        }
        let full = |part: &str| format!("{PREFIX}{}.{part}", module.name());
        let matrix = |x: &Tensor| (vec![x.rows(), x.cols()], x.as_slice().to_vec());
        let mut put = |name: String, (shape, values): (Vec<usize>, Vec<f32>)| {
            entries.push(Entry { name, dtype: Dtype::F32, shape, bytes: Bytes::from_f32(values) });
        };
        put(full(DOWN), matrix(&adapter.down));
        put(full(UP), matrix(&adapter.up));
        if let Some(magnitude) = &adapter.magnitude {
            put(full(MAGNITUDE), (vec![magnitude.len()], magnitude.clone()));
        }
    }
    safetensors::write(&dir.join(WEIGHTS), &entries, &[("format", "pt".to_string())])?;
    let config = json!({
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": joined.iter().any(|(module, _)| module.transposed),
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "alpha_pattern": alphas,
        "rank_pattern": ranks,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": dora,
        "use_rslora": rslora,
    });
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::Asked(e.to_string()))?;
    Ok(formats::atomic::write_bytes(&dir.join(CONFIG), (text + "\n").as_bytes())?)
}
