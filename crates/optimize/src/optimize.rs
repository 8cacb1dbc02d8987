//! The main job: from a target to a recipe, and from the recipe to a proven artefact.

use crate::{
    Error, Plan, Result,
    artefact::{self, Target},
    data,
    evaluate::{compare, divergence, log_ratio},
    journal::Journal,
    methods,
    progress::{Progress, Silent},
    recipe::{Floor, Recipe, Step},
    report::Report,
    run::{self, Data, Outcome, Settings},
    solve::{self, Point, Sensitivity},
    stats, walk,
};
use model::{Gpt, Model, Site};
use std::{fmt::Write, path::Path};
use tensor::Storage;

/// Documents and tokens below which the solver would only measure noise.
const FEWEST_TOKENS: usize = 64;

/// A size that must not be exceeded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// Part of 2 bytes per parameter.
    Share(f64),
    /// Bytes.
    Bytes(usize),
}

/// A decode speed that must be reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Speed {
    /// Over the original's.
    Ratio(f64),
    /// Tokens per second.
    TokensPerSecond(f64),
}

/// What the result must meet.
#[derive(Clone, Debug, PartialEq)]
pub struct Goal {
    /// Largest size; without one, the smallest that holds the quality is found.
    pub size: Option<Size>,
    /// Quality.
    pub floor: Floor,
    /// Least speed.
    pub speed: Option<Speed>,
}

impl Goal {
    /// The recipe without its choice of storages: the best method, or the best for what a file of statistics holds.
    ///
    /// # Errors
    /// If the file is none of statistics by its name.
    pub fn recipe(&self, seed: u64, stats: Option<&Path>) -> Result<Recipe> {
        let method = stats.map_or(Ok("gptaq"), |path| stats::Kind::of(path).map(stats::Kind::method))?;
        let mut recipe = Recipe::one(method, Storage::F32, seed);
        recipe.steps[0].storage = "keep".into();
        recipe.stats = stats.map(Into::into);
        recipe.floor = self.floor.clone();
        Ok(recipe)
    }

    /// The goal with its size in bytes, whatever becomes of the model.
    pub fn in_bytes(&self, model: &Model) -> Goal {
        Goal { size: self.bytes(model).map(Size::Bytes), ..self.clone() }
    }

    /// Bytes of the whole model.
    pub fn bytes(&self, model: &Model) -> Option<usize> {
        self.size.map(|s| match s {
            Size::Share(share) => (share * 2.0 * model.parameters() as f64) as usize,
            Size::Bytes(bytes) => bytes,
        })
    }
}

/// A model as the solver sees it: in its new basis, where a recipe begins with steps that turn it.
pub struct Turned {
    gpt: Option<Gpt>,
    steps: Vec<Step>,
    /// What is left to do.
    pub rest: Recipe,
}

impl Turned {
    /// Carries out the steps of a recipe that turn the model.
    ///
    /// # Errors
    /// If it cannot be turned.
    pub fn new(gpt: &Gpt, mut recipe: Recipe, progress: &dyn Progress) -> Result<Turned> {
        let shaped = run::shape(gpt, &recipe)?;
        let mut model = shaped.as_ref().map_or(&gpt.model, |gpt| &gpt.model).clone();
        let mut steps = Vec::new();
        while let Some(step) = recipe.steps.first()
            && let Plan::Rotated(rotation) = (methods::find(&step.method)?.build)(step.options.clone())?
        {
            // Which matrices are stored anew is not known yet: all are.
            rotation.turn(&mut model, &|_| true, recipe.seed, &Journal::none(), progress)?;
            steps.push(recipe.steps.remove(0));
        }
        let gpt = (!steps.is_empty()).then(|| Gpt { model, ..gpt.clone() });
        Ok(Turned { gpt, steps, rest: recipe })
    }

    /// The model: `gpt`, where nothing turned it.
    pub fn of<'a>(&'a self, gpt: &'a Gpt) -> &'a Gpt {
        self.gpt.as_ref().unwrap_or(gpt)
    }

    /// The whole recipe with the storages of a point of the front.
    pub fn with_choice(self, point: &Point) -> Recipe {
        let mut recipe = with_choice(self.rest, point);
        recipe.steps.splice(0..0, self.steps);
        recipe
    }
}

/// What the solver knows.
pub struct Solved {
    /// What each storage of each site costs.
    pub sensitivities: Vec<Sensitivity>,
    /// The trade-off front.
    pub front: Vec<Point>,
    /// Bytes that no storage changes: norms, biases, and what the format keeps as floats.
    pub fixed: usize,
}

/// Measures what each storage of each site costs.
///
/// # Errors
/// If there is too little data, or the job was interrupted.
pub fn measure(gpt: &Gpt, recipe: &Recipe, data: &Data, target: Target, progress: &dyn Progress) -> Result<Solved> {
    let held = data::take_tokens(&data.split.solver, solve::TOKENS, recipe.seed);
    let documents: Vec<data::Document> =
        held.into_iter().map(|ids| data::Document { ids, ..Default::default() }).collect();
    let tokens: usize = documents.iter().map(|d| d.ids.len()).sum();
    if tokens < FEWEST_TOKENS {
        return Err(Error::Data {
            path: recipe.data.clone().unwrap_or_default(),
            reason: format!("leaves {tokens} tokens for the solver; give a text of some thousand words"),
        });
    }
    let plan = recipe.rounding()?;
    let stats = match stats::of_recipe(gpt, recipe, &recipe.build(&gpt.model)?, data, progress)? {
        Some(known) => known.all()?,
        None => {
            let calibration = data::calibration(&data.split.calibration, recipe, gpt)?;
            walk::statistics(&gpt.model, plan.each_matrix()?.needs(), &calibration, progress)?
        }
    };
    let sensitivities = solve::sensitivities(&gpt.model, &plan, &stats, &documents, target, progress)?;
    let front = solve::front(&sensitivities, 40);
    let treated: usize = sensitivities
        .iter()
        .flat_map(|s| &s.sites)
        .filter_map(|s| gpt.model.linear(*s).ok())
        .map(|l| l.weight.size_bytes())
        .sum();
    let fixed = gpt.model.size_bytes() - treated;
    Ok(Solved { sensitivities, front, fixed })
}

/// The recipe with the storages of a point of the front.
fn with_choice(mut recipe: Recipe, point: &Point) -> Recipe {
    if let Some(step) = recipe.steps.last_mut() {
        step.sites = point.choice.iter().map(|(site, s): (&Site, &Storage)| (site.to_string(), s.name())).collect();
    }
    recipe
}

/// Finds the recipe that meets a goal and makes its artefact.
///
/// # Errors
/// [`Error::Gate`] if none does, with the limit that binds and the nearest points of the front.
pub fn optimize(
    gpt: &Gpt,
    recipe: Recipe,
    goal: &Goal,
    data: &Data,
    settings: &Settings,
    progress: &dyn Progress,
) -> Result<Outcome> {
    let target = Target::of_recipe(&recipe, &settings.out)?;
    if settings.out.exists() && !settings.overwrite && !crate::manifest::beside(&settings.out, "planish.toml").is_file()
    {
        artefact::check_free(&settings.out, false)?;
    }
    target.check(&gpt.model, &[])?;
    run::check_memory(gpt, &recipe, data, settings, &recipe.build(&gpt.model)?)?;
    let turned = Turned::new(gpt, recipe, progress)?;
    let goal = goal.in_bytes(&gpt.model);
    let solved = measure(turned.of(gpt), &turned.rest, data, target, progress)?;
    let point = choose(turned.of(gpt), &turned.rest, &goal, data, &solved, progress)?;
    let recipe = turned.with_choice(&point);
    let report = Report { sensitivities: solved.sensitivities.clone(), front: solved.front.clone() };
    let settings = Settings { min_speed: goal.speed, ..settings.clone() };
    run::run(gpt, &recipe, data, &settings, report, progress).map_err(|e| match e {
        Error::Gate(words) => Error::Gate(format!("{words}\n{}", nearest(gpt, &solved, point.bytes))),
        other => other,
    })
}

/// The point of the front that meets the goal.
///
/// # Errors
/// [`Error::Gate`] if none does.
pub fn choose(
    gpt: &Gpt,
    recipe: &Recipe,
    goal: &Goal,
    data: &Data,
    solved: &Solved,
    progress: &dyn Progress,
) -> Result<Point> {
    if let Some(bytes) = goal.bytes(&gpt.model) {
        let budget = bytes.saturating_sub(solved.fixed);
        return solve::allot(&solved.sensitivities, budget)
            .map_err(|e| Error::Gate(format!("the size binds: {e}; allow more.\n{}", nearest(gpt, solved, budget))));
    }
    if goal.floor.is_empty() {
        return Err(Error::Asked(
            "give a target: --max-size, --max-loss, --max-kl or --min-speed with one of them".into(),
        ));
    }
    smallest(gpt, recipe, goal, data, solved, progress)
}

/// Halvings of the span of sizes in the search for the smallest.
const HALVINGS: u64 = 8;

/// The smallest point whose quality, measured whole on the solver's documents, holds.
fn smallest(
    gpt: &Gpt,
    recipe: &Recipe,
    goal: &Goal,
    data: &Data,
    solved: &Solved,
    progress: &dyn Progress,
) -> Result<Point> {
    let ends = solved.front.first().zip(solved.front.last()).map(|(a, b)| (a.bytes, b.clone()));
    let (mut low, mut best) = ends.ok_or_else(|| Error::Asked("the model has no matrix to store anew".into()))?;
    progress.begin("searching sizes", HALVINGS + 1);
    if !holds(gpt, &with_choice(recipe.clone(), &best), goal, data)? {
        let words = "the quality binds: not even the largest storages hold it";
        return Err(Error::Gate(format!("{words}.\n{}", nearest(gpt, solved, best.bytes))));
    }
    for _ in 0..HALVINGS {
        progress.advance(1);
        let trial = solve::allot(&solved.sensitivities, usize::midpoint(low, best.bytes))?;
        if trial.bytes < best.bytes && holds(gpt, &with_choice(recipe.clone(), &trial), goal, data)? {
            best = trial;
        } else {
            low = usize::midpoint(low, best.bytes);
        }
    }
    Ok(best)
}

/// Standard errors that a mean on the solver's documents keeps from the floor: 1.645 for the gate's own bound, and
/// 1.645 times the square root of two for the chance that the gate's equally many documents are harder.
const ROOM: f64 = 4.0;

fn holds(gpt: &Gpt, recipe: &Recipe, goal: &Goal, data: &Data) -> Result<bool> {
    let built = recipe.build(&gpt.model)?;
    let model = run::transform(gpt, recipe, &built, data, &mut Journal::none(), &Silent)?;
    let pairs = compare(&model, &gpt.model, &data.split.solver, &Silent)?;
    let bound = |x: crate::evaluate::Paired| x.mean() + ROOM * x.standard_error();
    let loss = goal.floor.max_loss.is_none_or(|max| bound(log_ratio(&pairs)) <= max.ln_1p());
    Ok(loss && goal.floor.max_kl.is_none_or(|max| bound(divergence(&pairs)) <= max))
}

/// The points of the front around a size, in words.
fn nearest(gpt: &Gpt, solved: &Solved, bytes: usize) -> String {
    let at = solved.front.iter().position(|p| p.bytes >= bytes).unwrap_or(solved.front.len());
    let from = at.saturating_sub(2);
    let mut text = String::from("the nearest points of the front (KL expected from sites measured alone):");
    for p in solved.front.iter().skip(from).take(5) {
        let size = p.bytes + solved.fixed;
        let share = 100.0 * size as f64 / (2.0 * gpt.model.parameters() as f64);
        // Writing to a string cannot fail.
        let _ = write!(text, "\n  {size} bytes ({share:.1} %): KL about {:.2e}", p.kl);
    }
    text
}
