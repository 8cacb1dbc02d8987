//! The plan of a job: its recipe, and what it will take, before it is done.

use crate::{
    Result, data, methods,
    optimize::{self, Goal},
    progress::Progress,
    recipe::{Built, Recipe},
    run::Data,
    walk,
};
use model::{Gpt, Model, Site};
use serde::Serialize;
use std::{collections::BTreeMap, time::Instant};
use tensor::Storage;

/// A recipe and what it will take.
pub struct Plan {
    /// The recipe.
    pub recipe: Recipe,
    /// What it will take.
    pub estimate: Estimate,
}

/// What a job will take.
#[derive(Clone, Debug, Serialize)]
pub struct Estimate {
    /// Tensor payload of the result.
    pub size_bytes: usize,
    /// That over 2 bytes per parameter.
    pub share_of_16_bit: f64,
    /// Sum of the sites' losses, each measured alone, in nats.
    pub expected_kl: f64,
    /// Most memory that `run` holds.
    pub peak_ram_bytes: u64,
    /// Free disk that it needs: the journal and the result.
    pub disk_bytes: u64,
    /// Seconds that `run` takes on this machine.
    pub seconds: f64,
    /// How many sites get each storage.
    pub storages: BTreeMap<String, usize>,
}

/// Solves for a goal and estimates what carrying it out will take.
///
/// # Errors
/// As [`optimize::choose`].
pub fn plan(gpt: &Gpt, recipe: Recipe, goal: &Goal, data: &Data, gguf: bool, progress: &dyn Progress) -> Result<Plan> {
    let solved = optimize::measure(gpt, &recipe, data, gguf, progress)?;
    let point = optimize::choose(gpt, &recipe, goal, data, &solved, progress)?;
    let recipe = optimize::with_choice(recipe, &point);
    let size = point.bytes + solved.fixed;
    let mut storages = BTreeMap::new();
    for storage in point.choice.values() {
        *storages.entry(storage.name()).or_insert(0) += 1;
    }
    let built = recipe.build(&gpt.model.spec)?;
    let memory = memory(gpt, data, &recipe, &built);
    let estimate = Estimate {
        size_bytes: size,
        share_of_16_bit: size as f64 / (2.0 * gpt.model.parameters() as f64),
        expected_kl: point.kl,
        peak_ram_bytes: memory.own + memory.mapped,
        disk_bytes: disk(&gpt.model, &built),
        seconds: seconds(gpt, data, &recipe, &point.choice)?,
        storages,
    };
    Ok(Plan { recipe, estimate })
}

/// Bytes of the result's matrices.
fn result(model: &Model, built: &[Built]) -> usize {
    let size = |(site, l): (&Site, &tensor::Linear)| {
        let storage = built.iter().rev().find_map(|b| b.choice.get(site)).copied();
        storage.map_or(l.weight.size_bytes(), |s| s.row_bytes(l.weight.cols()) * l.weight.rows())
    };
    model.linears.iter().map(size).sum()
}

/// The journal and the result, each with every matrix, and what lies beside them.
pub fn disk(model: &Model, built: &[Built]) -> u64 {
    // A step that teaches keeps a checkpoint and its successor, the best values and those that it ended with.
    let taught = built.iter().any(|b| matches!(b.plan, crate::Plan::Learned(_)));
    let taught = if taught { 4 * (2 * 3 + 1 + 1) * model.parameters() } else { 0 };
    (2 * result(model, built) + taught + (4 << 20)) as u64
}

/// Memory of a job.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Bytes that only this process holds: the result, the largest matrix with its second moments, the
    /// calibration data's activations, logits.
    pub own: u64,
    /// Bytes of mapped files, which the system takes back where memory is short.
    pub mapped: u64,
}

/// What carrying out `built` takes.
pub fn memory(gpt: &Gpt, data: &Data, recipe: &Recipe, built: &[Built]) -> Memory {
    let spec = &gpt.model.spec;
    let result = result(&gpt.model, built) as u64 + (2 << 20);
    let shapes: Vec<[usize; 2]> = spec.matrices().iter().filter_map(|s| spec.shape(*s)).collect();
    let largest = shapes.iter().map(|[r, c]| 4 * r * c).max().unwrap_or(0);
    let needs = built.iter().any(|b| b.plan.needs().gram);
    let taught =
        built.iter().map(|b| if let crate::Plan::Learned(healing) = &b.plan { healing.memory(&gpt.model) } else { 0 });
    let taught = taught.max().unwrap_or(0);
    let moments = if needs { shapes.iter().map(|[_, c]| 34 * c * c).max().unwrap_or(0) } else { 0 };
    let held: usize = data.split.calibration.iter().map(|d| d.ids.len()).sum();
    let tokens = if needs { held.min(recipe.calibration_tokens) } else { 1024 };
    let widest = shapes.iter().map(|[r, c]| if *r == spec.vocab { *c } else { r + c }).max().unwrap_or(0);
    let flows = 4 * tokens * (2 * spec.dim + widest);
    let logits = 4 * 512 * 3 * spec.vocab;
    let own = result + (taught + 2 * largest + moments + flows + logits + (48 << 20)) as u64;
    Memory { own, mapped: gpt.model.size_bytes() as u64 + result }
}

/// Times a part of the work on this machine and scales it up.
fn seconds(gpt: &Gpt, data: &Data, recipe: &Recipe, choice: &BTreeMap<Site, Storage>) -> Result<f64> {
    let calibration = data::take_tokens(&data.split.calibration, recipe.calibration_tokens, recipe.seed);
    let total: usize = calibration.iter().map(Vec::len).sum();
    let part = data::take_tokens(&data.split.calibration, (total / 4).max(512), recipe.seed);
    let timed: usize = part.iter().map(Vec::len).sum();
    let plan = (methods::find(&recipe.steps[0].method)?.build)(recipe.steps[0].options.clone())?;
    let method = plan.each_matrix()?;
    let begin = Instant::now();
    let stats = walk::statistics(&gpt.model, method.needs(), &part)?;
    // A tied head's statistics take one pass more than the walk itself.
    let passes = if gpt.model.spec.tied { 2.0 } else { 1.0 };
    let gather = begin.elapsed().as_secs_f64() * total as f64 / timed.max(1) as f64 * passes;
    let begin = Instant::now();
    for (site, storage) in choice {
        let stats = stats.get(site).cloned().unwrap_or_default();
        walk::rewrite_matrix(method, *site, &gpt.model.linear(*site)?.weight.to_tensor(), *storage, &stats)?;
    }
    let rewrite = begin.elapsed().as_secs_f64();
    let gate: usize = data.split.gate.iter().map(|d| d.ids.len()).sum();
    let score = gather / passes * 1.5 * gate as f64 / total.max(1) as f64;
    Ok(gather + rewrite + score + 1.0)
}
