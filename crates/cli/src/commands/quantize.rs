//! `planish quantize`: a recipe of one step.

use super::{fraction, job, overrides};
use crate::args::{Common, Quantize};
use anyhow::{Context, Result, anyhow};
use optimize::recipe::{Floor, Recipe};
use tensor::{Storage, grid::Grid};

/// Quantizes a model.
pub fn run(args: &Quantize, common: &Common) -> Result<u8> {
    let storage = match &args.storage {
        Some(name) => Storage::parse(name).map_err(optimize::Error::from)?,
        None => Storage::Grid(Grid::int(args.bits, args.group, args.asymmetric).with_context(|| {
            format!(
                "--bits {} --group {}: bits are 2 to 8, groups multiples of 8 from 8 to 1024",
                args.bits, args.group
            )
        })?),
    };
    let mut recipe = Recipe::one(&args.method, storage, common.seed);
    recipe.floor = Floor {
        max_loss: args.max_loss.as_deref().map(|t| fraction(t, "--max-loss")).transpose()?,
        max_kl: args.max_kl,
    };
    let step = &mut recipe.steps[0];
    step.sites = overrides(&args.overrides)?;
    for text in &args.options {
        let option: toml::Table = toml::from_str(text).map_err(|e| {
            anyhow!(
                "--option {text:?} is not `name = value` ({}); texts stand in quotes: 'schedule=\"linear\"'",
                e.message()
            )
        })?;
        step.options.extend(option);
    }
    if let Some(damping) = args.damping {
        step.options.insert("damping".into(), damping.into());
    }
    if args.activation_order {
        step.options.insert("activation_order".into(), true.into());
    }
    job::run(&args.model, &args.data, recipe, &args.writing, common)
}
