//! `planish factorize`: each matrix of the blocks becomes the product of two thin ones.

use super::{fraction, open, reduce};
use crate::args::{Common, Factorize};
use anyhow::Result;
use model::{Role, Site};
use optimize::recipe::Step;
use std::collections::BTreeMap;
use tensor::Storage;

/// Factorizes a model.
pub fn run(args: &Factorize, common: &Common) -> Result<u8> {
    let gpt = open(&args.model)?;
    let storage = match &args.storage {
        Some(name) => Storage::parse(name)?,
        None => gpt.model.linear(Site::of(0, Role::Down))?.weight.storage(),
    };
    let mut options = toml::Table::new();
    options.insert("parameters".into(), fraction(&args.parameters, "--parameters")?.into());
    // What is looked up, and what makes the logits, is no matrix of a block.
    let edges = gpt.model.spec.matrices().into_iter().filter(|site| site.layer.is_none());
    let sites: BTreeMap<String, String> = edges.map(|site| (site.to_string(), "keep".to_string())).collect();
    let step = Step { method: args.method.clone(), storage: storage.name(), sites, options };
    reduce::run(&args.model, vec![step], &args.reduce, common)
}
