//! The plan of a job: its recipe, and what it will take, before it is done.

use crate::{
    Needs, Result,
    artefact::Target,
    calibrate::reader,
    data,
    methods::Factors,
    optimize::{self, Goal, Turned},
    progress::{Progress, Silent},
    recipe::{Built, Recipe},
    run::{self, Data},
    stats, walk,
};
use model::{Gpt, Model, Role, Site};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};
use tensor::{Storage, Weight};

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
pub fn plan(
    gpt: &Gpt,
    recipe: Recipe,
    goal: &Goal,
    data: &Data,
    target: Target,
    progress: &dyn Progress,
) -> Result<Plan> {
    let begin = Instant::now();
    let turned = Turned::new(gpt, recipe, progress)?;
    let turning = begin.elapsed().as_secs_f64();
    let goal = goal.in_bytes(&gpt.model);
    let solved = optimize::measure(turned.of(gpt), &turned.rest, data, target, progress)?;
    let point = optimize::choose(turned.of(gpt), &turned.rest, &goal, data, &solved, progress)?;
    let seconds = turning + seconds(turned.of(gpt), data, &turned.rest, &point.choice)?;
    let recipe = turned.with_choice(&point);
    let size = point.bytes + solved.fixed;
    let mut storages = BTreeMap::new();
    for storage in point.choice.values() {
        *storages.entry(storage.name()).or_insert(0) += 1;
    }
    let built = recipe.build(&gpt.model)?;
    let memory = memory(gpt, data, &recipe, &built);
    let estimate = Estimate {
        size_bytes: size,
        share_of_16_bit: size as f64 / (2.0 * gpt.model.parameters() as f64),
        expected_kl: point.kl,
        peak_ram_bytes: memory.own + memory.mapped,
        disk_bytes: disk(&gpt.model, &built),
        seconds,
        storages,
    };
    Ok(Plan { recipe, estimate })
}

/// What a recipe makes of a model, without doing it.
#[derive(Clone, Debug, Serialize)]
pub struct Preview {
    /// Every matrix.
    pub sites: Vec<Becomes>,
    /// Tensor payload of the result.
    pub size_bytes: usize,
    /// Mean bits per parameter.
    pub bits_per_weight: f64,
    /// Stored bytes of the weights that decoding a token reads: all products, and one row of each table.
    pub bytes_per_token: usize,
    /// Free disk that it needs: the journal and the result.
    pub disk_bytes: u64,
    /// Most memory that it takes, with all the calibration tokens that it may see.
    pub peak_ram_bytes: u64,
    /// Matrices that are not stored as asked.
    pub notes: Vec<String>,
}

/// What one matrix becomes.
#[derive(Clone, Debug, Serialize)]
pub struct Becomes {
    /// The site.
    pub site: String,
    /// Outputs and inputs, afterwards.
    pub shape: [usize; 2],
    /// Its storage.
    pub now: String,
    /// Its storage afterwards.
    pub becomes: String,
    /// Its bytes afterwards.
    pub bytes: usize,
}

/// What a recipe would make of a model.
///
/// # Errors
/// As [`Recipe::build`].
pub fn preview(gpt: &Gpt, recipe: &Recipe) -> Result<Preview> {
    let shaped = run::shape(gpt, recipe)?;
    let gpt = shaped.as_ref().unwrap_or(gpt);
    let built = recipe.build(&gpt.model)?;
    recipe.stats.as_ref().map_or(Ok(()), |path| stats::check(path, &built))?;
    let one = |(site, l): (&Site, &tensor::Linear)| {
        let (form, shape) = (Form::of(*site, &l.weight, &built), shape_after(*site, &l.weight, &built)?);
        let (now, becomes) = (l.weight.name(), form.name());
        Some(Becomes { site: site.to_string(), shape, now, becomes, bytes: form.bytes(shape) })
    };
    let sites: Vec<Becomes> = gpt.model.linears.iter().filter_map(one).collect();
    let head = gpt.model.spec.resolve(Site::HEAD);
    let read = |(site, l): (&Site, &tensor::Linear)| {
        let [rows, cols] = shape_after(*site, &l.weight, &built)?;
        let looked_up = *site != head && matches!(site.role, Role::Embed | Role::Position);
        Some(Form::of(*site, &l.weight, &built).bytes([rows, cols]) / if looked_up { rows.max(1) } else { 1 })
    };
    let bytes_per_token = gpt.model.linears.iter().filter_map(read).sum();
    let fixed = gpt.model.size_bytes() - gpt.model.matrix_bytes();
    let size_bytes = sites.iter().map(|s| s.bytes).sum::<usize>() + fixed;
    let notes = built.iter().flat_map(|b| &b.fallbacks);
    let fallbacks = notes.map(|(site, asked)| format!("{site}: a row does not divide into blocks of {asked}"));
    let notes = fallbacks.chain(of_no_use(gpt, &built)).collect();
    let memory = memory_of(gpt, recipe.calibration_tokens, recipe, &built);
    Ok(Preview {
        size_bytes,
        bytes_per_token,
        bits_per_weight: 8.0 * size_bytes as f64 / gpt.model.parameters().max(1) as f64,
        disk_bytes: disk(&gpt.model, &built),
        peak_ram_bytes: memory.own + memory.mapped,
        notes,
        sites,
    })
}

/// Storages whose pattern takes about as much room as it leaves out: a token reads as much as without it, and its values have to be
/// put in their places besides.
fn of_no_use(gpt: &Gpt, built: &[Built]) -> BTreeSet<String> {
    let note = |(site, l): (&Site, &tensor::Linear)| {
        let Form::Whole(storage @ Storage::Sparse(sparse)) = Form::of(*site, &l.weight, built) else { return None };
        let [_, cols] = shape_after(*site, &l.weight, built)?;
        let (own, whole) = (storage.row_bytes(cols), sparse.values().row_bytes(cols));
        (20 * own >= 19 * whole).then(|| {
            let share = 100 * own / whole.max(1);
            format!(
                "{storage} takes {share} % of the bytes of {}: it decodes no faster; leave out more",
                sparse.values()
            )
        })
    };
    gpt.model.linears.iter().filter_map(note).collect()
}

/// What steps make of a matrix.
#[derive(Clone, Copy)]
enum Form {
    Whole(Storage),
    Factored(Factors),
}

impl Form {
    fn of(site: Site, weight: &Weight, built: &[Built]) -> Form {
        let shape = [weight.rows(), weight.cols()];
        let mut form = match weight.low_rank() {
            None => Form::Whole(weight.storage()),
            Some(low) => {
                let (rank, storage) = (low.rank(), low.down().storage());
                Form::Factored(Factors { rank, storage, rest: low.rest().map(Weight::storage) })
            }
        };
        for (step, storage) in built.iter().filter_map(|b| Some((b, *b.choice.get(&site)?))) {
            let method = step.plan.each_matrix().ok();
            form = match (method.and_then(|m| m.factors(site, shape, storage)), form) {
                (Some(factors), _) => Form::Factored(factors),
                (None, Form::Factored(old)) if method.is_some_and(|m| !m.changes_floats()) => match old.rest {
                    Some(_) => Form::Factored(Factors { rest: Some(storage), ..old }),
                    None => Form::Factored(Factors { storage, ..old }),
                },
                _ => Form::Whole(storage),
            };
        }
        form
    }

    fn name(self) -> String {
        match self {
            Form::Whole(storage) => storage.name(),
            Form::Factored(Factors { rank, storage, rest }) => {
                let rest = rest.map(|rest| format!("{rest} + ")).unwrap_or_default();
                format!("{rest}rank {rank} of {storage}")
            }
        }
    }

    fn bytes(self, [rows, cols]: [usize; 2]) -> usize {
        match self {
            Form::Whole(storage) => storage.row_bytes(cols) * rows,
            Form::Factored(factors) => factors.bytes([rows, cols]),
        }
    }
}

/// Bytes of the result's matrices.
fn result(model: &Model, built: &[Built]) -> usize {
    let size = |(site, l): (&Site, &tensor::Linear)| {
        Some(Form::of(*site, &l.weight, built).bytes(shape_after(*site, &l.weight, built)?))
    };
    model.linears.iter().filter_map(size).sum()
}

/// The shape that a matrix has after the steps; none where it is gone.
fn shape_after(site: Site, weight: &Weight, built: &[Built]) -> Option<[usize; 2]> {
    match built.iter().rev().find_map(|b| b.cut_to.as_ref()) {
        Some(spec) => spec.shape(site),
        None => Some([weight.rows(), weight.cols()]),
    }
}

/// The journal and the result, each with every matrix, and what lies beside them.
pub fn disk(model: &Model, built: &[Built]) -> u64 {
    // A step that teaches keeps a checkpoint and its successor, the best values and those that it ended with.
    let taught = built.iter().any(|b| matches!(b.plan, crate::Plan::Learned(_)));
    let taught = if taught { 4 * (2 * 3 + 1 + 1) * model.parameters() } else { 0 };
    (2 * result(model, built) + rotated(model, built) + taught + (4 << 20)) as u64
}

/// The journal's matrices in another basis, which are 32-bit floats.
fn rotated(model: &Model, built: &[Built]) -> usize {
    if built.iter().any(|b| matches!(b.plan, crate::Plan::Rotated(_))) { 4 * model.parameters() } else { 0 }
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
    memory_of(gpt, data.split.calibration.iter().map(|d| d.ids.len()).sum(), recipe, built)
}

/// What carrying out `built` takes with so many tokens of calibration text.
fn memory_of(gpt: &Gpt, held: usize, recipe: &Recipe, built: &[Built]) -> Memory {
    let spec = &gpt.model.spec;
    let result = result(&gpt.model, built) as u64 + (2 << 20);
    let shapes: Vec<[usize; 2]> = spec.matrices().iter().filter_map(|s| spec.shape(*s)).collect();
    let largest = shapes.iter().map(|[r, c]| 4 * r * c).max().unwrap_or(0);
    let needs = built.iter().any(|b| b.plan.needs().gram);
    let missing = recipe.stats.as_ref().filter(|path| !path.exists()).and_then(|path| stats::Kind::of(path).ok());
    let gathered = missing.map_or(0, |kind| stats::memory(spec, kind));
    // The original's flows, moments and what is solved with them stand beside the model's own.
    let shifted = built.iter().any(|b| b.plan.needs().shift);
    let beside = built.iter().any(|b| b.plan.needs().original());
    let longest = held.min(spec.context);
    let block = built.iter().filter_map(|b| b.plan.each_block()).map(|b| b.memory(spec, longest)).max();
    // With what goes into a block, beside the flows.
    let block = block.map_or(0, |own| own + 4 * held.min(recipe.calibration_tokens) * spec.dim);
    let taught = built.iter().map(|b| match &b.plan {
        crate::Plan::Learned(healing) => healing.memory(&gpt.model),
        crate::Plan::Rotated(rotation) => rotation.memory(spec.dim),
        _ => 0,
    });
    let taught = taught.max().unwrap_or(0);
    let square = if shifted { 34 + 48 } else { 34 };
    let moments = if needs { shapes.iter().map(|[_, c]| square * c * c).max().unwrap_or(0) } else { 0 };
    // Second moments of the gradients of all outputs stand together.
    let slopes = |site: &Site| site.layer.and(spec.shape(*site)).map_or(0, |[rows, _]| 8 * rows * rows);
    let gradients = built.iter().any(|b| b.plan.needs().gradients);
    let gradients: usize = if gradients { spec.matrices().iter().map(slopes).sum() } else { 0 };
    // Those of values, with the values and what they are worth.
    let sites = |b: &Built| {
        b.choice.keys().filter(|s| s.layer.is_some()).filter_map(|s| spec.shape(*s)).map(|[r, c]| 12 * r * c).sum()
    };
    let taylor: usize = built.iter().filter(|b| b.plan.needs().taylor).map(sites).max().unwrap_or(0);
    let gradients = gradients + taylor;
    let read = built.iter().any(|b| b.plan.needs().data()) && recipe.stats.is_none();
    let tokens = if read { held.min(recipe.calibration_tokens) } else { 1024 };
    let widest = shapes.iter().map(|[r, c]| if *r == spec.vocab { *c } else { r + c }).max().unwrap_or(0);
    let flows = 4 * tokens * (2 * spec.dim + widest) * if beside { 2 } else { 1 };
    let logits = 4 * 512 * 3 * spec.vocab;
    let own = result
        + (taught.max(gathered) + block + 2 * largest + moments + gradients + flows + logits + (48 << 20)) as u64;
    Memory { own, mapped: (gpt.model.size_bytes() + rotated(&gpt.model, built)) as u64 + result }
}

/// Times a part of the work on this machine and scales it up.
fn seconds(gpt: &Gpt, data: &Data, recipe: &Recipe, choice: &BTreeMap<Site, Storage>) -> Result<f64> {
    let known = stats::of_recipe(gpt, recipe, &recipe.build(&gpt.model)?, data, &Silent)?;
    let calibration = data::calibration(&data.split.calibration, recipe, gpt)?;
    let total: usize = calibration.iter().map(Vec::len).sum();
    let part = data::take_tokens(&data.split.calibration, (total / 4).max(512), recipe.seed);
    let timed: usize = part.iter().map(Vec::len).sum();
    let plan = recipe.rounding()?;
    let method = plan.each_matrix()?;
    // A pass is timed where nothing is gathered, too: scoring takes as long.
    let needs = if known.is_some() { Needs::default() } else { plan.needs() };
    let begin = Instant::now();
    let passed = walk::statistics(&gpt.model, needs, &part, &Silent)?;
    // A tied head's statistics take one pass more than the walk itself, and the original beside the model another.
    let passes = if gpt.model.spec.tied { 2.0 } else { 1.0 } + if needs.original() { 1.0 } else { 0.0 };
    let once = begin.elapsed().as_secs_f64() / timed.max(1) as f64;
    let pass = once * total as f64;
    let mean = total as f64 / calibration.len().max(1) as f64;
    let together = plan.each_block().map_or(0.0, |block| block.passes(mean, total) * once);
    let gather = if known.is_some() { 0.0 } else { pass * passes };
    let stats = known.map_or(Ok(passed), |known| known.all())?;
    let begin = Instant::now();
    for (site, storage) in choice {
        let stats = stats.get(&reader(*site)).cloned().unwrap_or_default();
        walk::rewrite_matrix(method, *site, &gpt.model.linear(*site)?.weight.to_tensor(), *storage, &stats)?;
    }
    let rewrite = begin.elapsed().as_secs_f64();
    let gate: usize = data.split.gate.iter().map(|d| d.ids.len()).sum();
    let score = pass * 1.5 * gate as f64 / total.max(1) as f64;
    Ok(gather + rewrite + together + score + 1.0)
}
