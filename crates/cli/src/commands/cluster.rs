//! `planish cluster`: gives each matrix levels of its own.

use super::reduce;
use crate::args::{Cluster, Common};
use anyhow::{Result, bail};
use optimize::recipe::Step;
use std::collections::BTreeMap;
use tensor::Storage;

/// Clusters the values of a model.
pub fn run(args: &Cluster, common: &Common) -> Result<u8> {
    if args.entropy_code && args.reduce.writing.format.as_deref().is_some_and(|format| format != "rans") {
        bail!("--entropy-code writes a directory of planish's own; leave out --format");
    }
    let group = if args.group == 0 { String::new() } else { format!("g{}", args.group) };
    let storage = format!("palette{}{group}", args.bits);
    Storage::parse(&storage)?;
    let step = Step { method: args.method.clone(), storage, sites: BTreeMap::new(), options: toml::Table::new() };
    let mut reduce = args.reduce.clone();
    if args.entropy_code {
        reduce.writing.format = Some("rans".into());
    }
    reduce::run(&args.model, vec![step], &reduce, common)
}
