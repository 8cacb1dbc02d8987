//! One file per command: arguments in, a call out, something good to look at.

mod audit;
mod bench;
mod calibrate;
mod chat;
mod cluster;
mod distill;
mod doctor;
mod evaluate;
mod export;
mod factorize;
mod finetune;
mod generate;
mod inspect;
mod job;
mod methods;
mod optimize;
mod prune;
mod quantize;
mod reduce;
mod train;
mod verify;

use crate::args::{Attached, Cli, Command, Floors, Model};
use ::optimize::{builtin, recipe::Floor};
use anyhow::{Context, Result, bail};
use model::Gpt;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use tensor::ops::KeyValue;

/// Gives a model a chat template in place of its own.
fn converse_by(gpt: &mut Gpt, template: Option<&Path>) -> Result<()> {
    if let Some(path) = template {
        gpt.template = Some(std::fs::read_to_string(path).map_err(formats::Error::io(path, "read it"))?);
    }
    Ok(())
}

/// Runs a command; returns the exit code.
///
/// # Errors
/// Whatever ends the command early.
pub fn run(cli: Cli) -> Result<u8> {
    let common = &cli.common;
    match &cli.command {
        Command::Optimize(a) => optimize::optimize(a, common),
        Command::Plan(a) => optimize::plan(a, common),
        Command::Run(a) => job::replay(a, common),
        Command::Inspect(a) => inspect::run(a, common),
        Command::Quantize(a) => quantize::run(a, common),
        Command::Prune(a) => prune::run(a, common),
        Command::Factorize(a) => factorize::run(a, common),
        Command::Cluster(a) => cluster::run(a, common),
        Command::Calibrate(a) => calibrate::run(a, common),
        Command::Evaluate(a) => evaluate::run(a, common),
        Command::Export(a) => export::run(a, common),
        Command::Generate(a) => generate::run(a, common),
        Command::Chat(a) => chat::run(a, common),
        Command::Audit(a) => audit::run(a, common),
        Command::Bench(a) => bench::run(a, common),
        Command::Finetune(a) => finetune::run(a, common),
        Command::Distill(a) => distill::run(a, common),
        Command::Train(a) => train::run(a, common),
        Command::Verify(a) => verify::run(a, common),
        Command::Doctor => doctor::run(common),
        Command::Methods => methods::run(common),
    }
}

/// Sets up threads, kernels, other ranks and the answer to Ctrl-C.
///
/// # Errors
/// If the number of threads or the instruction set is none that this machine has, or the other ranks cannot be reached.
pub fn prepare(cli: &Cli) -> Result<()> {
    let threads = cli.common.threads;
    if let Some(n) = threads.filter(|n| *n == 0 || *n > 1024) {
        bail!("--threads takes a number from 1 to 1024, not {n}");
    }
    tensor::kernels::check_isa().map_err(anyhow::Error::msg)?;
    // The second Ctrl-C ends the program at once; what is journaled is safe either way.
    let mut pressed = false;
    ctrlc::set_handler(move || {
        if std::mem::replace(&mut pressed, true) {
            std::process::exit(130);
        }
        ::optimize::progress::interrupt();
    })
    .context("cannot watch for interrupts")?;
    let own = crate::ranks::start(&cli.command)?;
    if let Some(n) = threads.or(own) {
        tensor::threads::set(n);
    }
    Ok(())
}

/// Where a model lies: as asked, or the built-in sample.
fn place(model: &Model) -> Result<PathBuf> {
    Ok(match &model.model {
        Some(path) => path.clone(),
        None => builtin::unpack()?,
    })
}

/// Opens a model, or the built-in sample.
fn open(model: &Model) -> Result<Gpt> {
    Ok(Gpt::open(&place(model)?)?)
}

/// Opens a model that runs as asked, with its adapters: see [`prepare_model`].
fn open_to_run(path: &Path, attached: &Attached, exact: bool, kv: Option<&str>) -> Result<Gpt> {
    let kv = key_value(kv)?;
    Ok(Gpt::open_and(path, |model| {
        attach(model, attached)?;
        prepare_model(model, exact, kv)
    })?
    .0)
}

/// Lets a model's adapters take part.
fn attach(model: &mut ::model::Model, attached: &Attached) -> Result<(), ::model::Error> {
    let sets = attached.adapters.iter().map(|path| ::model::adapter::load(model, path));
    let sets = sets.collect::<Result<Vec<_>, _>>()?;
    model.attach(&sets)
}

/// Makes a model run as asked: fast unless `exact`; returns the sites whose codes become 16-bit floats for it.
fn prepare_model(
    model: &mut ::model::Model,
    exact: bool,
    kv: Option<KeyValue>,
) -> Result<Vec<::model::Site>, ::model::Error> {
    let slow = if exact { Vec::new() } else { model.pack()? };
    model.key_value = kv.unwrap_or(model.key_value);
    Ok(slow)
}

/// The format of keys and values that was asked for.
fn key_value(name: Option<&str>) -> Result<Option<KeyValue>> {
    let Some(name) = name else { return Ok(None) };
    let known = KeyValue::ALL.into_iter().find(|f| f.name() == name);
    known.map(Some).with_context(|| format!("--kv takes f32, bf16, int8 or int4, not {name:?}"))
}

/// Prints a value as one line of JSON.
fn print_json(value: &impl Serialize) -> Result<()> {
    sayln!("{}", serde_json::to_string(value).context("cannot write JSON")?);
    Ok(())
}

/// The quality that was asked for.
fn floor(asked: &Floors) -> Result<Floor> {
    let max_loss = asked.max_loss.as_deref().map(|text| fraction(text, "--max-loss")).transpose()?;
    Ok(Floor { max_loss, max_kl: asked.max_kl })
}

/// A percentage: `1%` or `0.01`.
fn fraction(text: &str, name: &str) -> Result<f64> {
    let (number, scale) = text.strip_suffix('%').map_or((text, 1.0), |n| (n, 0.01));
    match number.trim().parse::<f64>() {
        Ok(x) if x > 0.0 && x.is_finite() => Ok(x * scale),
        _ => bail!("{name} takes a percentage such as 1%, not {text:?}"),
    }
}

/// A size in bytes: `400MB`, `2GiB`, `100000`.
fn bytes(text: &str, name: &str) -> Result<u64> {
    let at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let unit = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" | "k" => 1e3,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        "kib" => 1024.0,
        "mib" => 1_048_576.0,
        "gib" => 1_073_741_824.0,
        _ => bail!("{name} takes a size such as 30%, 400MB or 2GiB, not {text:?}"),
    };
    match number.trim().parse::<f64>() {
        Ok(x) if x > 0.0 && x.is_finite() => Ok((x * unit) as u64),
        _ => bail!("{name} takes a size such as 30%, 400MB or 2GiB, not {text:?}"),
    }
}

/// Storages of single sites: `head=q6_k`, `layers 0,1: 6 bits`.
fn overrides(texts: &[String]) -> Result<BTreeMap<String, String>> {
    let each = texts.iter().map(|text| {
        let (sites, storage) =
            text.rsplit_once(['=', ':']).with_context(|| format!("--override {text:?} has no `=` and no `:`"))?;
        Ok((sites.trim().into(), storage.trim().into()))
    });
    each.collect()
}

/// Options of methods, as in a recipe.
fn options(texts: &[String]) -> Result<toml::Table> {
    let mut all = toml::Table::new();
    for text in texts {
        let option: toml::Table = toml::from_str(text).map_err(|e| {
            anyhow::anyhow!(
                "--option {text:?} is not `name = value` ({}); texts stand in quotes: 'schedule=\"linear\"'",
                e.message()
            )
        })?;
        for (name, value) in option {
            match (all.get_mut(&name), value) {
                // `distill.lr` and `distill.steps` are one table.
                (Some(toml::Value::Table(held)), toml::Value::Table(more)) => held.extend(more),
                (_, value) => {
                    all.insert(name, value);
                }
            }
        }
    }
    Ok(all)
}
