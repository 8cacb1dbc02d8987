//! What the commands that take numbers of a model away have in common: a recipe of a step, and one that heals.

use super::{floor, job, open, options, quantize};
use crate::{
    args::{Common, Model, Reduce},
    show::Bar,
};
use anyhow::{Context, Result, bail};
use model::Gpt;
use optimize::{
    artefact::Target,
    methods::{self, prune},
    recipe::{Recipe, Step},
};
use std::{collections::BTreeMap, path::Path};

/// Sequences of a healing step, and their longest length.
const BATCH: u64 = 8;
const CONTEXT: usize = 256;

/// Runs steps of a method over the model, heals it after each where that is asked, and writes the result.
pub fn run(model: &Model, steps: Vec<Step>, args: &Reduce, common: &Common) -> Result<u8> {
    let gpt = open(model)?;
    let mut recipe = Recipe { steps: Vec::new(), ..Recipe::one("rtn", tensor::Storage::F32, common.seed) };
    recipe.floor = floor(&args.floor)?;
    let mut given = options(&args.options)?;
    let healing = match given.remove("distill") {
        None => toml::Table::new(),
        Some(toml::Value::Table(table)) => table,
        Some(_) => bail!("an option of what heals reads like distill.lr=3e-4"),
    };
    if args.heal.is_none() && !healing.is_empty() {
        bail!("--option distill...: nothing heals without --heal TOKENS");
    }
    let rounds = steps.len();
    for mut step in steps {
        step.sites.extend(args.skips.iter().map(|sites| (sites.trim().to_string(), "keep".to_string())));
        step.options.extend(given.clone());
        recipe.steps.push(step);
        if let Some(tokens) = &args.heal {
            recipe.steps.push(heals(tokens, rounds, healing.clone(), &gpt)?);
        }
    }
    recipe.format.clone_from(&args.writing.format);
    if args.dry_run {
        let built = recipe.build(&gpt.model)?;
        Target::of_recipe(&recipe, args.writing.out.as_deref().unwrap_or(Path::new("out")))?
            .check(&gpt.model, &built)?;
        job::fill(&mut recipe, &gpt, &args.data);
        if recipe.vocabulary()?.is_some() {
            let bar = Bar::new();
            let data = job::load_data(&gpt, model, &recipe, &bar)?;
            let reduced = prune::reduced(&gpt, &recipe, &data, &bar)?;
            drop(bar);
            let note = reduced.as_ref().map(|reduced| reduced.told.clone());
            return quantize::preview(reduced.as_ref().map_or(&gpt, |reduced| &reduced.gpt), &recipe, note, common);
        }
        return quantize::preview(&gpt, &recipe, None, common);
    }
    job::run(model, &args.data, recipe, &args.writing, common)
}

/// The step that teaches its part of so many tokens.
fn heals(tokens: &str, rounds: usize, mut options: toml::Table, gpt: &Gpt) -> Result<Step> {
    let (number, unit) = tokens.split_at(tokens.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(tokens.len()));
    let unit = match unit {
        "" => 1.0,
        "k" | "K" => 1e3,
        "m" | "M" => 1e6,
        _ => bail!("--heal takes a number of tokens such as 500k or 2M, not {tokens:?}"),
    };
    let count = number.parse::<f64>().ok().map(|n| n * unit).filter(|n| *n >= 1.0 && *n < 1e15);
    let count = count.with_context(|| format!("--heal takes a number of tokens such as 500k or 2M, not {tokens:?}"))?;
    let said = |options: &toml::Table, name: &str| options.get(name).and_then(toml::Value::as_integer);
    let batch = said(&options, "batch").map_or(BATCH, |n| n.max(1) as u64);
    let context = said(&options, "context").map_or(CONTEXT.min(gpt.model.spec.context) as u64, |n| n.max(1) as u64);
    let steps = (count / rounds.max(1) as f64 / (batch * context) as f64).ceil() as i64;
    for (name, value) in [("steps", steps), ("batch", batch as i64), ("context", context as i64)] {
        options.entry(name).or_insert(value.into());
    }
    // What is read of the text is decided by the data, of which there may be less than that: it is then read again.
    options.entry("lr").or_insert(3e-4.into());
    Ok(Step { method: methods::HEALS.into(), storage: "keep".into(), sites: BTreeMap::new(), options })
}
