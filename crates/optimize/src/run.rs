//! The program in one screen: load, calibrate, transform, export, reload, evaluate, prove, publish.

use crate::{
    Error, Plan, Result, artefact,
    artefact::Target,
    changes,
    data::{self, Cutting, Document, Split},
    evaluate::{self, Evaluation, Pair},
    gate::{self, Proof, Verdict},
    gradients::{self, Gradients},
    heal::{self, Lessons},
    journal::Journal,
    manifest, methods,
    methods::prune,
    optimize::Speed,
    plan,
    progress::Progress,
    recipe::{Built, Recipe},
    report::{Difference, Report},
    speed,
    stats::{self, Known},
    walk::{self, Inputs},
    written,
};
use model::{Gpt, Model, Site};
use std::path::{Path, PathBuf};

/// What a job is told beside its recipe.
#[derive(Clone, Debug)]
pub struct Settings {
    /// A directory, or a file that ends in `.gguf`.
    pub out: PathBuf,
    /// Replace an existing result?
    pub overwrite: bool,
    /// Discard unfinished work of another job?
    pub restart: bool,
    /// Write a result that missed its floor, and record that it did?
    pub force: bool,
    /// Fail where a site cannot be treated as asked?
    pub strict: bool,
    /// Quantize what is quantized already?
    pub requantize: bool,
    /// Least decode speed, measured before the result is published.
    pub min_speed: Option<Speed>,
    /// Most memory in bytes; 80 % of what is free where nothing is said.
    pub max_ram: Option<u64>,
}

/// What a job made.
pub struct Outcome {
    /// Where the result lies.
    pub out: PathBuf,
    /// The proof that was written beside it.
    pub proof: Proof,
    /// Was it there already, from the same job?
    pub already: bool,
    /// Decode speed over the original's: lowest, median, highest of interleaved rounds. It is not part of the
    /// artefact, whose bytes depend on recipe and inputs alone.
    pub speed: Option<[f64; 3]>,
}

/// The text of a job, cut and split.
pub struct Data {
    /// Its parts.
    pub split: Split,
    /// Where it came from.
    pub about: String,
    /// Its hash.
    pub hash: String,
    /// Entropy of the source in nats per predicted token of the gate's part, where it is known.
    pub entropy: Option<f64>,
    /// Did the model write it itself?
    pub own: bool,
}

/// Reads and splits a recipe's data; without any, the model writes its own.
///
/// # Errors
/// If the file is of no use, or the model cannot write.
pub fn load_data(gpt: &Gpt, recipe: &Recipe, progress: &dyn Progress) -> Result<Data> {
    let cutting = Cutting {
        separator: recipe.separator.clone().unwrap_or_else(|| data::SEPARATOR.into()),
        context: gpt.model.spec.context,
        blocks: false,
    };
    let own = recipe.data.is_none();
    if own && recipe.vocabulary()?.is_some() {
        return Err(Error::Asked(
            "which tokens are never used is known by the texts that the model is for: give them with --data".into(),
        ));
    }
    let (documents, about) = match &recipe.data {
        Some(path) => {
            let documents = match data::is_text(path) {
                true => data::documents(&data::read_text(path)?, &gpt.tokenizer, &cutting)?,
                // Methods read whole conversations, and nothing of them is learned.
                false => data::whole(gpt, path, &cutting.separator, cutting.context, data::Purpose::Reading)?
                    .into_iter()
                    .map(|document| document.cut(cutting.context, &gpt.tokenizer))
                    .collect::<train::Result<_>>()?,
            };
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            (documents, format!("the text of {name}"))
        }
        None => {
            let tokens = own_tokens(recipe)?;
            let documents = written::documents(gpt, tokens, recipe.seed, progress)?;
            (documents, "text that the model wrote itself".to_string())
        }
    };
    if documents.is_empty() {
        let path = recipe.data.clone().unwrap_or_default();
        return Err(Error::Data { path, reason: "holds no document of two tokens or more".into() });
    }
    let mut hasher = blake3::Hasher::new();
    for d in &documents {
        d.ids.iter().for_each(|id| {
            hasher.update(&id.to_le_bytes());
        });
    }
    let hash = hasher.finalize().to_hex().to_string();
    Ok(Data { split: Split::new(documents), about, hash, entropy: None, own })
}

/// Tokens that the model writes where there is no text: enough to calibrate on, or only to prove with where no step looks
/// at any.
fn own_tokens(recipe: &Recipe) -> Result<usize> {
    // Statistics that are there already ask for no text.
    let known = recipe.stats.as_ref().is_some_and(|path| path.exists());
    let mut calibrated = false;
    for step in &recipe.steps {
        calibrated |= match (methods::find(&step.method)?.build)(step.options.clone())? {
            Plan::Learned(_) => true,
            Plan::Cut(cut) => cut.reads(),
            Plan::Vocabulary(_) => false,
            plan => plan.needs().data() && !known,
        };
    }
    // The solver, if it is asked, looks at the data too.
    let solved = recipe.steps.last().is_some_and(|s| s.storage == "keep");
    Ok(if calibrated || solved { (recipe.calibration_tokens * 5 / 3).min(60_000) } else { 12_000 })
}

/// Runs a recipe and writes its result, if the gate lets it.
///
/// # Errors
/// [`Error::Gate`] if the result misses its floor; others as they occur. Nothing appears at `out` then.
pub fn run(
    gpt: &Gpt,
    recipe: &Recipe,
    data: &Data,
    settings: &Settings,
    report: Report,
    progress: &dyn Progress,
) -> Result<Outcome> {
    refuse_requantizing(&gpt.model, settings)?;
    let (whole, reduced) = (gpt, prune::reduced(gpt, recipe, data, progress)?);
    let (gpt, own) = reduced.as_ref().map_or((gpt, data), |reduced| (&reduced.gpt, &reduced.data));
    let (whole_data, data) = (data, own);
    let original = gpt;
    let shaped = shape(gpt, recipe)?;
    let gpt = shaped.as_ref().unwrap_or(gpt);
    let built = recipe.build(&gpt.model)?;
    let target = Target::of_recipe(recipe, &settings.out)?;
    target.check(&gpt.model, &built)?;
    let activations = recipe.activations()?;
    if recipe.stats.as_ref().is_some_and(|path| !path.exists()) {
        check_memory(gpt, recipe, data, settings, &built)?;
    }
    let known = stats::of_recipe(gpt, recipe, &built, data, progress)?;
    let key = key(gpt, recipe, data, settings)?;
    if let Some(proof) = artefact::finished(&settings.out, &key)? {
        Journal::forget(&settings.out, &key)?;
        return Ok(Outcome { out: settings.out.clone(), proof, already: true, speed: None });
    }
    artefact::check_free(&settings.out, settings.overwrite)?;
    check_memory(gpt, recipe, data, settings, &built)?;
    formats::atomic::check_room(&settings.out, plan::disk(&gpt.model, &built))?;
    let mut journal = Journal::open(&settings.out, &key, settings.restart)?;

    let mut model = transform(gpt, recipe, &built, data, &mut journal, progress)?;
    if let Some(activations) = activations {
        activations.round(&mut model, &data::calibration(&data.split.calibration, recipe, gpt)?, progress)?;
    }
    let staging = journal.staging()?.ok_or_else(|| Error::Asked("a job that writes has a journal".into()))?;
    let staged = target.write(gpt, &model, &staging)?;
    let mut warnings = warnings(gpt, &built, known.as_ref(), &staged.fallbacks, data, settings)?;
    if shaped.is_some() {
        let more = gpt.model.parameters() - original.model.parameters();
        warnings.push(format!(
            "the head, which was one with the embedding, became a matrix of its own: {more} parameters more"
        ));
    }

    let after = Gpt::open(&staged.path)?;
    let (mut proof, differences) = prove(original, &after, recipe, data, warnings, progress)?;
    let comparable = !built.iter().any(|step| matches!(step.plan, Plan::Rotated(_)));
    let numbers = &model.spec.origin;
    proof.sites = changes::changes(&original.model, &after.model, numbers, &data.split.gate, comparable)?;
    if let Some(reduced) = &reduced {
        let left = proof.before.nll;
        let (before, told) = reduced.before(whole, &whole_data.split.gate, left, progress)?;
        proof.before = before;
        proof.warnings.extend([reduced.told.clone(), told]);
    }
    if !proof.gate.is_good() && !settings.force {
        journal.discard()?;
        return Err(Error::Gate(refusal(&proof.gate)));
    }
    let speed = match speed(whole, &after, settings) {
        Err(Error::Gate(words)) => {
            journal.discard()?;
            return Err(Error::Gate(words));
        }
        other => other?,
    };
    artefact::finish(original, &after, recipe, data, &proof, &differences, &report, &staged, &key)?;
    artefact::publish(&staged, &settings.out, settings.overwrite)?;
    journal.discard()?;
    Ok(Outcome { out: settings.out.clone(), proof, already: false, speed })
}

/// Decode speed over the original's, and whether it is enough.
fn speed(gpt: &Gpt, after: &Gpt, settings: &Settings) -> Result<Option<[f64; 3]>> {
    let both = (gpt.model.size_bytes() + after.model.size_bytes()) as u64;
    let allowed = settings.max_ram.unwrap_or_else(|| speed::free_memory_bytes() / 5 * 4);
    if both > allowed {
        // Nobody asked: a model that memory does not hold beside its original is not timed.
        return if settings.min_speed.is_some() { Err(Error::Memory { needed: both, allowed }) } else { Ok(None) };
    }
    // Both as users run them: packed, which takes the memory of both.
    let pack = |model: &Model| -> Result<Model> {
        let mut fast = model.clone();
        fast.pack()?;
        Ok(fast)
    };
    let (fast, base) = (pack(&after.model)?, pack(&gpt.model)?);
    let ratios = speed::decode_ratios(&fast, &base, settings.min_speed.is_some())?;
    let [low, median, high] = [ratios[0], ratios[ratios.len() / 2], ratios[ratios.len() - 1]];
    let (got, wanted, unit) = match settings.min_speed {
        None => return Ok(Some([low, median, high])),
        Some(Speed::Ratio(x)) => (low, x, "x the original's"),
        Some(Speed::TokensPerSecond(x)) => {
            let room = after.model.spec.context.saturating_sub(2);
            let s = speed::measure(&fast, &speed::Ask::plain(128.min(room / 2), 64.min(room / 2)))?;
            (s.decode.range[0], x, "tokens/s")
        }
    };
    if got < wanted && !settings.force {
        return Err(Error::Gate(format!(
            "the speed binds: decode runs at {got:.2} {unit} at the lower end of what was measured, {wanted} was asked. Nothing was written"
        )));
    }
    Ok(Some([low, median, high]))
}

/// Refuses a job that would take more memory than it may, before it begins.
///
/// # Errors
/// [`Error::Memory`].
pub fn check_memory(gpt: &Gpt, recipe: &Recipe, data: &Data, settings: &Settings, built: &[Built]) -> Result<()> {
    let needed = plan::memory(gpt, data, recipe, built).own;
    let allowed = settings.max_ram.unwrap_or_else(|| speed::free_memory_bytes() / 5 * 4);
    if needed > allowed { Err(Error::Memory { needed, allowed }) } else { Ok(()) }
}

/// Walks every step over the model.
///
/// # Errors
/// As [`walk::walk`].
pub fn transform(
    gpt: &Gpt,
    recipe: &Recipe,
    built: &[Built],
    data: &Data,
    journal: &mut Journal,
    progress: &dyn Progress,
) -> Result<Model> {
    let known = stats::of_recipe(gpt, recipe, built, data, progress)?;
    let mut model = gpt.model.clone();
    for (i, step) in built.iter().enumerate() {
        journal.step(i);
        match &step.plan {
            Plan::Rotated(rotation) => {
                let asked = |site: Site| built[i + 1..].iter().any(|later| later.choice.contains_key(&site));
                rotation.turn(&mut model, &asked, recipe.seed, journal, progress)?;
            }
            Plan::Learned(healing) => {
                let lessons = Lessons { original: &gpt.model, documents: &data.split.calibration, seed: recipe.seed };
                heal::heal(&mut model, &recipe.steps[i], healing, &lessons, journal, progress)?;
            }
            // It was done before the first step, so that all of them know the tokens by one number.
            Plan::Vocabulary(_) => {}
            Plan::Cut(cut) => {
                let texts = match cut.reads() {
                    true => data::calibration(&data.split.calibration, recipe, gpt)?,
                    false => Vec::new(),
                };
                model = cut.run(&model, &texts, progress)?;
            }
            plan => {
                let texts = match known.is_none() && plan.needs().data() {
                    true => data::calibration(&data.split.calibration, recipe, gpt)?,
                    false => Vec::new(),
                };
                let inputs = known.as_ref().map_or(Inputs::Texts(&texts), Inputs::Known);
                let needs = plan.needs();
                let gradients = match needs.backward() {
                    true => {
                        let texts = data::calibration(&data.split.calibration, recipe, gpt)?;
                        gradients::gradients(&model, needs, &step.choice, &texts, progress)?
                    }
                    false => Gradients::default(),
                };
                let inputs = (inputs, &gradients);
                let prepared = plan.each_matrix()?.prepare(&model, &mut |survey| {
                    walk::look(&model, &step.choice, survey, inputs, recipe.seed, progress)
                })?;
                let prepared = prepared.map(|method| step.with(method));
                let step = prepared.as_ref().unwrap_or(step);
                walk::walk(&mut model, step, inputs, recipe.seed, journal, progress)?;
                if let Some(cut) = step.plan.each_matrix()?.cut(&model)? {
                    model = cut;
                }
            }
        }
    }
    Ok(model)
}

/// The model with the matrices that a recipe's steps will give it.
pub(crate) fn shape(gpt: &Gpt, recipe: &Recipe) -> Result<Option<Gpt>> {
    Ok(recipe.shape(&gpt.model)?.map(|model| Gpt { model, ..gpt.clone() }))
}

fn refuse_requantizing(model: &Model, settings: &Settings) -> Result<()> {
    if model.is_quantized() && !settings.requantize {
        let reason = "the model is quantized already, and quantizing it again loses more than once from the original: start from the unquantized model, or give --requantize";
        return Err(Error::Asked(reason.into()));
    }
    Ok(())
}

/// Everything that decides the result's bytes.
fn key(gpt: &Gpt, recipe: &Recipe, data: &Data, settings: &Settings) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(env!("CARGO_PKG_VERSION").as_bytes());
    hasher.update(tensor::kernels::kernels().isa.as_bytes());
    // Where the inputs lie does not matter, what they hold does.
    let mut bare = recipe.clone();
    (bare.model, bare.data, bare.stats) = (None, None, None);
    hasher.update(bare.to_text()?.as_bytes());
    hasher.update(data.hash.as_bytes());
    // Chosen by the whole texts, of which the documents may be a part.
    gpt.kept.iter().flatten().for_each(|id| {
        hasher.update(&id.to_le_bytes());
    });
    for sum in manifest::sums(&gpt.files)?.values().chain(manifest::sums(recipe.stats.as_slice())?.values()) {
        hasher.update(sum.blake3.as_bytes());
    }
    hasher.update(&[u8::from(Target::of_recipe(recipe, &settings.out)? == Target::Gguf)]);
    Ok(hasher.finalize().to_hex().to_string())
}

fn warnings(
    gpt: &Gpt,
    built: &[Built],
    known: Option<&Known>,
    fallbacks: &[model::save::Fallback],
    data: &Data,
    settings: &Settings,
) -> Result<Vec<String>> {
    let mut warnings: Vec<String> = fallbacks
        .iter()
        .map(|f| format!("{}: a row does not divide into blocks of {}; stored as {}", f.site, f.asked, f.got))
        .collect();
    for step in built {
        for (site, storage) in &step.choice {
            if let Some(asked) = step.fallbacks.get(site) {
                warnings.push(format!("{site}: a row does not divide into blocks of {asked}; stored as {storage}"));
            }
        }
    }
    warnings.extend(known.map_or(Ok(Vec::new()), |known| known.notes(gpt, built))?);
    if settings.strict && !warnings.is_empty() {
        return Err(Error::Gate(format!("--strict: {}", warnings.join("; "))));
    }
    if data.own {
        warnings
            .push("no --data was given: the proof rests on text that the model wrote itself, not on your own".into());
    }
    Ok(warnings)
}

fn refusal(verdict: &Verdict) -> String {
    let words: Vec<&str> = verdict.checks.iter().filter(|c| !c.passed).map(|c| c.words.as_str()).collect();
    format!(
        "the gate says no: {}. Nothing was written; allow more size or loss, give more --data, or --force",
        words.join("; ")
    )
}

/// Scores the original and the reloaded result on the gate's documents.
///
/// # Errors
/// If the documents cannot be scored.
pub fn prove(
    gpt: &Gpt,
    after: &Gpt,
    recipe: &Recipe,
    data: &Data,
    warnings: Vec<String>,
    progress: &dyn Progress,
) -> Result<(Proof, Vec<Difference>)> {
    let documents = &data.split.gate;
    progress.begin("scoring the result", documents.len() as u64);
    let pairs = evaluate::compare(&after.model, &gpt.model, documents, progress)?;
    let scores: Vec<evaluate::Score> = pairs.iter().map(|p| p.score.clone()).collect();
    let base: Vec<evaluate::Score> =
        pairs.iter().map(|p| evaluate::Score { nll: p.base_nll, tokens: p.score.tokens }).collect();
    let before = evaluate::summarize(&gpt.model, file_bytes(&gpt.path), documents, &base);
    let mut result: Evaluation = evaluate::summarize(&after.model, file_bytes(&after.path), documents, &scores);
    if !pairs.is_empty() {
        result.against = Some(evaluate::summarize_pair(&pairs));
    }
    let differences = differences(gpt, after, documents, &pairs)?;
    let proof = Proof {
        before,
        after: result,
        gate: gate::judge(&recipe.floor, &pairs),
        data: data.about.clone(),
        documents: [data.split.calibration.len(), data.split.solver.len(), documents.len()],
        warnings,
        entropy_nats_per_token: data.entropy,
        sites: Vec::new(),
    };
    Ok((proof, differences))
}

/// Tokens that a report shows.
const SHOWN: usize = 12;

/// The tokens on which original and result differ most, with what each would say.
fn differences(gpt: &Gpt, after: &Gpt, documents: &[Document], pairs: &[Pair]) -> Result<Vec<Difference>> {
    let tokens = |(d, p): (usize, &Pair)| p.kl.iter().enumerate().map(move |(t, kl)| (*kl, d, t)).collect::<Vec<_>>();
    let mut all: Vec<(f32, usize, usize)> = pairs.iter().enumerate().flat_map(tokens).collect();
    all.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let one = |(kl, d, t): &(f32, usize, usize)| -> Result<Difference> {
        let ids = &documents[*d].ids[..=*t];
        let says = |g: &Gpt| -> Result<String> {
            let logits = g.model.forward(&[ids], &mut ())?;
            Ok(gpt.tokenizer.decode(&[tensor::ops::argmax(logits.row(*t)) as u32], false)?)
        };
        let context = gpt.tokenizer.decode(&ids[ids.len().saturating_sub(24)..], true)?;
        Ok(Difference { context, before: says(gpt)?, after: says(after)?, kl: f64::from(*kl) })
    };
    all.iter().take(SHOWN).map(one).collect()
}

/// Bytes of the files that hold a model's tensors.
pub fn file_bytes(path: &Path) -> u64 {
    let size = |p: &Path| std::fs::metadata(p).map_or(0, |m| m.len());
    if !path.is_dir() {
        return size(path);
    }
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path());
    entries.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).map(|p| size(&p)).sum()
}
