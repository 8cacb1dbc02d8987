//! `planish quantize`: a recipe of one step.

use super::{floor, job, open, overrides, print_json};
use crate::{
    args::{Common, Quantize},
    show::{self, Bar},
};
use anyhow::{Context, Result, bail};
use model::Gpt;
use optimize::{
    artefact::Target,
    optimize::{Goal, Size, optimize as find},
    plan::{self, Preview},
    recipe::{Recipe, Step},
};
use serde_json::json;
use std::{collections::BTreeMap, path::Path};
use tensor::{
    Storage,
    grid::{Grid, Zero},
};

/// Quantizes a model.
pub fn run(args: &Quantize, common: &Common) -> Result<u8> {
    let average = args.storage.is_none() && args.bits.fract() != 0.0;
    let methods: Vec<&str> = args.method.split(',').map(str::trim).collect();
    let (last, before) = methods.split_last().context("--method names none")?;
    let mut recipe = Recipe::one(last, Storage::F32, common.seed);
    recipe.floor = floor(&args.floor)?;
    recipe.activations = args.activations.clone();
    let step = &mut recipe.steps[0];
    step.storage = if average { "keep".into() } else { storage(args)? };
    step.sites = overrides(&args.overrides)?;
    step.sites.extend(args.skips.iter().map(|sites| (sites.trim().to_string(), "keep".to_string())));
    options(step, args)?;
    prepend(&mut recipe, before)?;
    if average {
        return to_an_average(args, recipe, common);
    }
    if args.dry_run {
        recipe.format = args.writing.format.clone();
        recipe.stats = args.data.stats.clone();
        let gpt = open(&args.model)?;
        let target = target(args, &recipe)?;
        let built = recipe.build(&gpt.model)?;
        target.check(&gpt.model, &built)?;
        return preview(&gpt, &recipe, None, common);
    }
    job::run(&args.model, &args.data, recipe, &args.writing, common)
}

/// The name of the storage that is asked for.
fn storage(args: &Quantize) -> Result<String> {
    if let Some(name) = &args.storage {
        return Ok(name.clone());
    }
    let zero = match (args.asymmetric, args.zero_point) {
        (true, _) => Zero::Minimum,
        (_, true) => Zero::Point,
        _ => Zero::Middle,
    };
    let grid = (2.0..=8.0).contains(&args.bits).then(|| Grid::int(args.bits as u8, args.group, zero)).flatten();
    let grid = grid.with_context(|| {
        format!(
            "--bits {} --group {}: bits are 2 to 8, groups multiples of 8 from 8 to 1024, or 0 for one scale a row \
             (which has no minimum)",
            args.bits, args.group
        )
    })?;
    Ok(grid.name())
}

/// The method's options.
fn options(step: &mut Step, args: &Quantize) -> Result<()> {
    step.options.extend(super::options(&args.options)?);
    if let Some(damping) = args.damping {
        step.options.insert("damping".into(), damping.into());
    }
    if args.activation_order {
        step.options.insert("activation_order".into(), true.into());
    }
    Ok(())
}

/// Puts methods before the one that rounds, each with the options that begin with its name.
fn prepend(recipe: &mut Recipe, methods: &[&str]) -> Result<()> {
    for name in methods.iter().rev() {
        let options = match recipe.steps.last_mut().and_then(|step| step.options.remove(*name)) {
            None => toml::Table::new(),
            Some(toml::Value::Table(options)) => options,
            Some(_) => bail!("--option {name}: an option of {name} reads like {name}.NAME=VALUE"),
        };
        let plan = (optimize::methods::find(name)?.build)(options.clone())?;
        let storage = plan.storage_before_others().with_context(|| {
            format!("--method {name}: it rounds, so it comes last; rotate, smoothquant and distill go before others")
        })?;
        let step = Step { method: name.to_string(), storage: storage.into(), sites: BTreeMap::new(), options };
        recipe.steps.insert(0, step);
    }
    Ok(())
}

/// For whom the result is written.
fn target(args: &Quantize, recipe: &Recipe) -> Result<Target> {
    Ok(Target::of_recipe(recipe, args.writing.out.as_deref().unwrap_or(Path::new("out")))?)
}

/// Gives each matrix what it needs, so that the whole model has so many bits per weight on average.
fn to_an_average(args: &Quantize, mut recipe: Recipe, common: &Common) -> Result<u8> {
    if !(1.5..=16.0).contains(&args.bits) {
        bail!("--bits {}: an average lies between 1.5 and 16 bits", args.bits);
    }
    if recipe.steps.last().is_some_and(|step| !step.sites.is_empty()) {
        bail!(
            "--bits {}: an average is found over all matrices; leave out --override and --skip, or name a storage",
            args.bits
        );
    }
    let gpt = open(&args.model)?;
    let goal = Goal {
        size: Some(Size::Bytes((args.bits * gpt.model.parameters() as f64 / 8.0) as usize)),
        floor: recipe.floor.clone(),
        speed: None,
    };
    job::fill(&mut recipe, &gpt, &args.data);
    recipe.format = args.writing.format.clone();
    let bar = Bar::new();
    let data = job::load_data(&gpt, &args.model, &recipe, &bar)?;
    if args.dry_run {
        let plan = plan::plan(&gpt, recipe.clone(), &goal, &data, target(args, &recipe)?, &bar)?;
        drop(bar);
        return preview(&gpt, &plan.recipe, None, common);
    }
    let settings = job::settings(&args.writing, &args.model, common)?;
    let outcome = find(&gpt, recipe, &goal, &data, &settings, &bar)?;
    drop(bar);
    job::show_outcome(&outcome, common)
}

/// Shows what each matrix would become, with a note on what became of the model before.
pub fn preview(gpt: &Gpt, recipe: &Recipe, note: Option<String>, common: &Common) -> Result<u8> {
    let mut p: Preview = plan::preview(gpt, recipe)?;
    p.notes.extend(note);
    if common.json {
        print_json(&json!(p))?;
        return Ok(0);
    }
    let mut rows = vec![vec!["site".to_string(), "shape".into(), "now".into(), "becomes".into(), "bytes".into()]];
    for s in &p.sites {
        let shape = format!("{} x {}", s.shape[0], s.shape[1]);
        rows.push(vec![s.site.clone(), shape, s.now.clone(), s.becomes.clone(), s.bytes.to_string()]);
    }
    show::table(&rows);
    sayln!("");
    sayln!("size: {} ({:.3} bits per weight)", show::size(p.size_bytes as u64), p.bits_per_weight);
    sayln!("a token reads: {}", show::size(p.bytes_per_token as u64));
    sayln!("disk: {}", show::size(p.disk_bytes));
    sayln!("peak memory: {}", show::size(p.peak_ram_bytes));
    p.notes.iter().for_each(|n| sayln!("note: {n}"));
    Ok(0)
}
