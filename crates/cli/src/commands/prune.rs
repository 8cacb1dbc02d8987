//! `planish prune`: takes values, neurons, heads, layers, channels or tokens out of a model.

use super::{fraction, open, reduce};
use crate::args::{Common, Prune};
use anyhow::{Context, Result, bail};
use model::{Gpt, Role, Site};
use optimize::{
    methods::prune,
    recipe::{Step, select},
};
use std::collections::{BTreeMap, BTreeSet};
use tensor::{Pattern, Sparse, Storage};

/// Prunes a model.
pub fn run(args: &Prune, common: &Common) -> Result<u8> {
    let usual = prune::usual(&args.pattern);
    let usual = usual.with_context(|| {
        format!("--pattern {:?}: there are {}", args.pattern, prune::patterns().collect::<Vec<_>>().join(", "))
    })?;
    let method = args.method.clone().unwrap_or_else(|| usual.into());
    let asked = args.sparsity.as_deref().map(|sparsity| fraction(sparsity, "--sparsity")).transpose()?;
    if args.pattern.contains(':') && asked.is_some() {
        bail!("--pattern {} says how much is removed; leave out --sparsity", args.pattern);
    }
    let gpt = open(&args.model)?;
    let mut steps = Vec::new();
    for sparsity in rounds(args, asked)? {
        let mut options = toml::Table::new();
        options.insert("pattern".into(), args.pattern.clone().into());
        if let Some(sparsity) = sparsity.filter(|_| !args.pattern.contains(':')) {
            options.insert("sparsity".into(), sparsity.into());
        }
        let mut step = Step { method: method.clone(), storage: "keep".into(), sites: BTreeMap::new(), options };
        match prune::values_of(&args.pattern, sparsity.unwrap_or(prune::USUAL)) {
            Some(pattern) => of_values(args, &gpt, pattern, &mut step)?,
            None => of_structure(args, &gpt, &mut step)?,
        }
        steps.push(step);
    }
    reduce::run(&args.model, steps, &args.reduce, common)
}

/// What goes in each round: of values how many are gone after it, of all else the part that goes of what is left.
fn rounds(args: &Prune, asked: Option<f64>) -> Result<Vec<Option<f64>>> {
    if args.rounds == 1 {
        return Ok(vec![asked]);
    }
    if args.pattern.contains(':') || args.pattern == "vocabulary" || args.reduce.heal.is_none() {
        bail!("--rounds is for a share that grows, such as --sparsity 50%, with --heal TOKENS to learn again between");
    }
    let power = match args.schedule.as_str() {
        "linear" => 1.0,
        "cubic" => 3.0,
        other => {
            let power = other.parse::<f64>().ok().filter(|power| (0.1..=10.0).contains(power));
            power.with_context(|| format!("--schedule {other:?}: linear, cubic or the exponent of a polynomial"))?
        }
    };
    let all = asked.unwrap_or(prune::USUAL);
    let at = |round: u32| all * (1.0 - (1.0 - f64::from(round) / f64::from(args.rounds)).powf(power));
    let values = prune::values_of(&args.pattern, all).is_some();
    // As many digits as a pattern's name has.
    let rounded = |share: f64| (1000.0 * share).round() / 1000.0;
    let round = |n: u32| if values { rounded(at(n)) } else { 1.0 - (1.0 - at(n)) / (1.0 - at(n - 1)) };
    Ok((1..=args.rounds).map(|n| Some(round(n))).collect())
}

/// Every matrix of the blocks is stored with holes, or as it is asked for.
fn of_values(args: &Prune, gpt: &Gpt, pattern: Pattern, step: &mut Step) -> Result<()> {
    let spreads = matches!(pattern, Pattern::Share { .. }) && step.method != "magnitude";
    if let Some(rates) = args.rates.clone().or(spreads.then(|| "loss".into())) {
        step.options.insert("rates".into(), rates.into());
    }
    let spec = &gpt.model.spec;
    let mut stays = BTreeSet::new();
    for sites in &args.reduce.skips {
        stays.extend(select(sites.trim(), spec)?);
    }
    let all: Vec<Site> = spec.matrices().into_iter().filter(|site| site.layer.is_some()).collect();
    let treated = |site: &Site| !stays.contains(site) && site.layer.is_none_or(|layer| !args.keep.contains(&layer));
    let mut chosen: BTreeMap<Site, String> = BTreeMap::new();
    for site in all.iter().copied().filter(treated) {
        let values = match args.storage.as_deref() {
            Some(name) => Storage::parse(name)?,
            None => gpt.model.linear(site)?.weight.storage().dense(),
        };
        let storage = match (values, Sparse::new(values, pattern)) {
            (Storage::Sparse(_), _) => values,
            _ if args.dense => values,
            (_, Some(sparse)) => Storage::Sparse(sparse),
            (_, None) => bail!(
                "{site}: {values} cannot have holes; take --storage bf16, int4g64 or another of planish's own, or --dense for zeros in \
                 their place"
            ),
        };
        chosen.insert(site, storage.name());
    }
    // A role stands for all of its matrices where these become one storage.
    for (site, storage) in &chosen {
        let alike = all.iter().filter(|other| other.role == site.role).all(|other| chosen.get(other) == Some(storage));
        let name = if alike { site.role.name().to_string() } else { site.to_string() };
        step.sites.insert(name, storage.clone());
    }
    Ok(())
}

/// What reads neurons and heads is stored anew, as it is stored.
fn of_structure(args: &Prune, gpt: &Gpt, step: &mut Step) -> Result<()> {
    if args.storage.is_some() || args.dense || args.rates.is_some() {
        bail!("--storage, --dense and --rates are for patterns of single values; {} leave no holes", args.pattern);
    }
    if !args.keep.is_empty() {
        step.options.insert("keep".into(), args.keep.iter().map(|layer| i64::from(*layer)).collect::<Vec<_>>().into());
    }
    let reader = match args.pattern.as_str() {
        "neurons" => Role::Down,
        "heads" => Role::O,
        _ => return Ok(()),
    };
    let storage = gpt.model.linear(Site::of(0, reader))?.weight.storage();
    step.sites.insert(reader.name().to_string(), storage.name());
    Ok(())
}
