//! `planish optimize` and `planish plan`.

use super::{bytes, fraction, job, open, print_json};
use crate::{
    args::{self, Common, Optimize, PlanArgs},
    show::{self, Bar},
};
use anyhow::{Context, Result};
use optimize::{
    artefact::Target,
    optimize::{Goal, Size, Speed, optimize as find},
    plan,
    recipe::Floor,
};
use std::path::Path;

/// The default target, where none is given.
const DEFAULT_SIZE: &str = "30%";
const DEFAULT_LOSS: &str = "2%";

/// Finds and makes the best model that meets a target.
pub fn optimize(args: &Optimize, common: &Common) -> Result<u8> {
    let gpt = open(&args.model)?;
    let goal = goal(&args.target)?;
    let mut recipe = goal.recipe(common.seed, args.data.stats.as_deref())?;
    job::fill(&mut recipe, &gpt, &args.data);
    recipe.format = args.writing.format.clone();
    let bar = Bar::new();
    let data = job::load_data(&gpt, &args.model, &recipe, &bar)?;
    let settings = job::settings(&args.writing, &args.model, common)?;
    let outcome = find(&gpt, recipe, &goal, &data, &settings, &bar)?;
    drop(bar);
    job::show_outcome(&outcome, common)
}

/// Shows what `optimize` would do and writes its recipe.
pub fn plan(args: &PlanArgs, common: &Common) -> Result<u8> {
    let gpt = open(&args.model)?;
    let goal = goal(&args.target)?;
    let mut recipe = goal.recipe(common.seed, args.data.stats.as_deref())?;
    job::fill(&mut recipe, &gpt, &args.data);
    recipe.format = args.writing.format.clone();
    let bar = Bar::new();
    let data = job::load_data(&gpt, &args.model, &recipe, &bar)?;
    let target = Target::of_recipe(&recipe, args.writing.out.as_deref().unwrap_or(Path::new("out")))?;
    let plan = plan::plan(&gpt, recipe, &goal, &data, target, &bar)?;
    drop(bar);
    let text = plan.recipe.to_text()?;
    formats::atomic::write_bytes(&args.recipe, text.as_bytes())?;
    if common.json {
        print_json(&plan.estimate)?;
        return Ok(0);
    }
    let e = &plan.estimate;
    show::table(&[
        vec!["size".into(), show::size(e.size_bytes as u64), format!("{:.1} % of 16-bit", 100.0 * e.share_of_16_bit)],
        vec!["expected KL, nats".into(), format!("{:.5}", e.expected_kl)],
        vec!["peak memory".into(), show::size(e.peak_ram_bytes)],
        vec!["disk".into(), show::size(e.disk_bytes)],
        vec!["time".into(), format!("{:.0} s", e.seconds)],
    ]);
    for (storage, sites) in &e.storages {
        sayln!("{storage}: {sites} sites");
    }
    sayln!("{}: the recipe; `planish run` carries it out", args.recipe.display());
    Ok(0)
}

fn goal(t: &args::Target) -> Result<Goal> {
    let none = t.max_size.is_none() && t.max_loss.is_none() && t.max_kl.is_none() && t.min_speed.is_none();
    let text = |given: &Option<String>, default: &str| given.clone().or_else(|| none.then(|| default.to_string()));
    let size = |s: &str| -> Result<Size> {
        match s.strip_suffix('%') {
            Some(_) => Ok(Size::Share(fraction(s, "--max-size")?)),
            None => Ok(Size::Bytes(bytes(s, "--max-size")? as usize)),
        }
    };
    let speed = |s: &str| -> Result<Speed> {
        let wrong = || format!("--min-speed takes 2x or 40tok/s, not {s:?}");
        match (s.strip_suffix('x'), s.strip_suffix("tok/s")) {
            (Some(n), _) => Ok(Speed::Ratio(n.trim().parse().with_context(wrong)?)),
            (_, Some(n)) => Ok(Speed::TokensPerSecond(n.trim().parse().with_context(wrong)?)),
            _ => anyhow::bail!("{}", wrong()),
        }
    };
    let loss = text(&t.max_loss, DEFAULT_LOSS);
    Ok(Goal {
        size: text(&t.max_size, DEFAULT_SIZE).as_deref().map(size).transpose()?,
        floor: Floor { max_loss: loss.as_deref().map(|l| fraction(l, "--max-loss")).transpose()?, max_kl: t.max_kl },
        speed: t.min_speed.as_deref().map(speed).transpose()?,
    })
}
