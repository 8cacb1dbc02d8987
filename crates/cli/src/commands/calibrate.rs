//! `planish calibrate`: statistics of the inputs of matrices, gathered once for any number of jobs.

use super::{bytes, job, open, print_json};
use crate::{
    args::{Calibrate, Common},
    show::{self, Bar},
};
use anyhow::Result;
use optimize::{
    artefact,
    recipe::Recipe,
    stats::{self, Gathered, Kind},
};
use serde_json::json;
use tensor::Storage;

/// Gathers statistics and writes them.
pub fn run(args: &Calibrate, common: &Common) -> Result<u8> {
    let kind = Kind::of(&args.out)?;
    artefact::check_free(&args.out, args.overwrite)?;
    let gpt = open(&args.model)?;
    // What `--stats` with the same words would gather.
    let mut recipe = Recipe::one(kind.method(), Storage::F32, common.seed);
    job::fill_text(&mut recipe, &args.text);
    let limit = common.max_ram.as_deref().map(|t| bytes(t, "--max-ram")).transpose()?;
    stats::check_memory(&gpt.model.spec, kind, limit)?;
    let bar = Bar::new();
    let data = job::load_data(&gpt, &args.model, &recipe, &bar)?;
    let done: Gathered = stats::calibrate(&gpt, &recipe, &data, args.whole, &args.out, &bar)?;
    drop(bar);
    if common.json {
        print_json(&json!({
            "out": args.out, "tokens": done.tokens, "sequences": done.sequences, "inputs": done.inputs,
            "file_bytes": done.file_bytes, "data": data.about,
        }))?;
        return Ok(0);
    }
    sayln!(
        "{}: {}; statistics of {} inputs over {} tokens in {} sequences ({})",
        args.out.display(),
        show::size(done.file_bytes),
        done.inputs,
        done.tokens,
        done.sequences,
        data.about
    );
    sayln!("`planish quantize --method {} --stats {}` uses them", kind.method(), args.out.display());
    Ok(0)
}
