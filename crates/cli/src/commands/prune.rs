//! `planish prune`: takes neurons, heads, layers or channels out of a model.

use super::{fraction, open, reduce};
use crate::args::{Common, Prune};
use anyhow::{Context, Result};
use model::{Role, Site};
use optimize::{methods::prune, recipe::Step};
use std::collections::BTreeMap;

/// Prunes a model.
pub fn run(args: &Prune, common: &Common) -> Result<u8> {
    let usual = prune::usual(&args.pattern);
    let usual = usual.with_context(|| {
        format!("--pattern {:?}: there are {}", args.pattern, prune::patterns().collect::<Vec<_>>().join(", "))
    })?;
    let mut options = toml::Table::new();
    options.insert("pattern".into(), args.pattern.clone().into());
    options.insert("sparsity".into(), fraction(&args.sparsity, "--sparsity")?.into());
    if !args.keep.is_empty() {
        options.insert("keep".into(), args.keep.iter().map(|layer| i64::from(*layer)).collect::<Vec<_>>().into());
    }
    // What reads neurons and heads is stored anew, as it is stored.
    let gpt = open(&args.model)?;
    let reader = match args.pattern.as_str() {
        "neurons" => Some(Role::Down),
        "heads" => Some(Role::O),
        _ => None,
    };
    let mut sites = BTreeMap::new();
    if let Some(role) = reader {
        let storage = gpt.model.linear(Site::of(0, role))?.weight.storage();
        sites.insert(role.name().to_string(), storage.name());
    }
    let method = args.method.clone().unwrap_or_else(|| usual.into());
    let step = Step { method, storage: "keep".into(), sites, options };
    reduce::run(&args.model, step, &args.reduce, common)
}
