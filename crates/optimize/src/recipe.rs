//! Recipes: what is done to a model, as data. The command line writes them, the solver varies them, the
//! manifest keeps them, `planish run` replays them.

use crate::activations::Activations;
use crate::{Error, Plan, Result, Rewrite, methods, methods::Vocabulary, mixes};
use formats::quantized::Format;
use model::{Model, Role, Site, Spec, save};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};
use tensor::{Linear, Pattern, Sparse, Storage, grid::Grid};

/// A whole job.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Version of this format.
    pub planish: u32,
    /// The model: a directory or a GGUF file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// Text for calibration, solver and gate; without it the model writes its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<PathBuf>,
    /// Statistics of the inputs of matrices, in place of a pass over calibration text; gathered and written there where the
    /// file is not there yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats: Option<PathBuf>,
    /// What separates documents in the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// Tokens that methods see.
    #[serde(default = "default_calibration")]
    pub calibration_tokens: usize,
    /// Are documents joined and cut into full sequences for calibration, in place of one sequence each?
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packed: bool,
    /// Start of all random numbers.
    #[serde(default)]
    pub seed: u64,
    /// For whose reader the result is written, where its name does not tell: `hf`, `rans` (planish's own codes, entropy-coded),
    /// `gguf`, `compressed-tensors`, `gptq` or `awq`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// `int8`: readers of compressed-tensors round the inputs of products too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activations: Option<String>,
    /// What the result must meet.
    #[serde(default, skip_serializing_if = "Floor::is_empty")]
    pub floor: Floor,
    /// What is done, in order.
    #[serde(rename = "step")]
    pub steps: Vec<Step>,
}

fn default_calibration() -> usize {
    65_536
}

/// Quality that the result must have.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Floor {
    /// Most that the perplexity may rise, as a fraction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_loss: Option<f64>,
    /// Largest mean divergence in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_kl: Option<f64>,
}

impl Floor {
    /// Is nothing asked?
    pub fn is_empty(&self) -> bool {
        *self == Floor::default()
    }
}

/// One step.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Step {
    /// Which method.
    pub method: String,
    /// Storage of every matrix that `sites` does not name.
    pub storage: String,
    /// Storage of single sites or roles; `keep` leaves one as it is.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sites: BTreeMap<String, String>,
    /// The method's own options.
    #[serde(flatten)]
    pub options: toml::Table,
}

impl Recipe {
    /// A recipe of one step.
    pub fn one(method: &str, storage: Storage, seed: u64) -> Recipe {
        let step = Step {
            method: method.into(),
            storage: storage.name(),
            sites: BTreeMap::new(),
            options: toml::Table::new(),
        };
        Recipe {
            planish: 1,
            model: None,
            data: None,
            stats: None,
            separator: None,
            calibration_tokens: default_calibration(),
            packed: false,
            seed,
            format: None,
            activations: None,
            floor: Floor::default(),
            steps: vec![step],
        }
    }

    /// Reads a recipe.
    ///
    /// # Errors
    /// If it is malformed or of another version.
    pub fn parse(text: &str) -> Result<Recipe> {
        let recipe: Recipe = toml::from_str(text).map_err(|e| Error::Recipe(e.to_string()))?;
        if recipe.planish != 1 {
            return Err(Error::Recipe(format!(
                "version {} is not known; this program reads version 1",
                recipe.planish
            )));
        }
        if recipe.steps.is_empty() {
            return Err(Error::Recipe("has no [[step]]".into()));
        }
        Ok(recipe)
    }

    /// The recipe as text.
    ///
    /// # Errors
    /// If an option cannot be written as TOML.
    pub fn to_text(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Recipe(e.to_string()))
    }

    /// Builds every step, so that a typo in the last one does not cost the work of the first.
    ///
    /// # Errors
    /// If a method, a storage, an option or a site is not known, or a site is not of this model.
    pub fn build(&self, model: &Model) -> Result<Vec<Built>> {
        let shaped = self.shape(model)?;
        let model = shaped.as_ref().unwrap_or(model);
        let quantizer = self.quantizer()?;
        let fused = save::shared(model, true).iter().flatten().any(|s| s.role == Role::V);
        let (mut built, mut shell) = (Vec::new(), None);
        let mut patterns = patterns(model);
        for step in &self.steps {
            let model = shell.as_ref().unwrap_or(model);
            let floats = |site: Site| quantizer.and_then(|q| save::quantized_refusal(model, site, q));
            let mut step = step.build(&model.spec, &Limits { floats: &floats, fused })?;
            if let Some(next) = step.plan.shell(model)? {
                let narrows = next.spec.layers() == model.spec.layers();
                if let Some(before) = built.iter().find(|b: &&Built| narrows && b.makes_factors(model)) {
                    return Err(Error::Recipe(format!(
                        "step {} takes channels away after {} made products of two matrices; put it before",
                        step.method, before.method
                    )));
                }
                step.cut_to = Some(next.spec.clone());
                shell = Some(next);
            }
            step.keep_holes(&mut patterns);
            built.push(step);
        }
        Ok(built)
    }

    /// What the last step does: it is the one that rounds.
    ///
    /// # Errors
    /// If there is none, or it is not known.
    pub fn rounding(&self) -> Result<Plan> {
        let step = self.steps.last();
        let step = step.ok_or_else(|| Error::Recipe("has no step that rounds, such as method = \"gptq\"".into()))?;
        (methods::find(&step.method)?.build)(step.options.clone())
    }

    /// The model with the matrices that steps will give it, which computes the same; none where it has them already.
    ///
    /// # Errors
    /// If a method or an option is not known, or the model cannot be treated so.
    pub fn shape(&self, model: &Model) -> Result<Option<Model>> {
        for step in &self.steps {
            let shaped = match (methods::find(&step.method)?.build)(step.options.clone())? {
                Plan::Rotated(rotation) => rotation.shape(model)?,
                Plan::Cut(cut) => cut.shape(model)?,
                _ => None,
            };
            if shaped.is_some() {
                return Ok(shaped);
            }
        }
        Ok(None)
    }

    /// Which tokens are left out, if any are.
    ///
    /// # Errors
    /// If a method or an option is not known.
    pub fn vocabulary(&self) -> Result<Option<Vocabulary>> {
        for step in &self.steps {
            if let Plan::Vocabulary(vocabulary) = (methods::find(&step.method)?.build)(step.options.clone())? {
                return Ok(Some(vocabulary));
            }
        }
        Ok(None)
    }

    /// How inputs of products are to be rounded.
    ///
    /// # Errors
    /// As [`Activations::parse`].
    pub fn activations(&self) -> Result<Option<Activations>> {
        let format = self.quantizer()?;
        self.activations.as_deref().map(|name| Activations::parse(name, format)).transpose()
    }

    /// The other quantizer whose format is asked for.
    ///
    /// # Errors
    /// If no format has that name.
    pub fn quantizer(&self) -> Result<Option<Format>> {
        match self.format.as_deref() {
            None | Some("hf" | "gguf" | "rans") => Ok(None),
            Some(name) => Format::parse(name).map(Some).ok_or_else(|| {
                Error::Recipe(format!(
                    "no format is called {name:?}; there are hf, rans (hf with entropy-coded codes), gguf, compressed-tensors, gptq and awq"
                ))
            }),
        }
    }
}

/// A step that is ready to run.
pub struct Built {
    /// Name of its method.
    pub method: &'static str,
    /// What the method does.
    pub plan: Plan,
    /// Storage of each site that it treats.
    pub choice: BTreeMap<Site, Storage>,
    /// Sites whose rows do not divide into the blocks that were asked for, and what was asked.
    pub fallbacks: BTreeMap<Site, Storage>,
    /// What the model is after it, where it has another shape than before.
    pub cut_to: Option<Spec>,
}

/// The matrices of a model that have holes.
fn patterns(model: &Model) -> BTreeMap<Site, Pattern> {
    let pattern = |(site, l): (&Site, &Linear)| match l.weight.storage() {
        Storage::Sparse(sparse) => Some((*site, sparse.pattern())),
        _ => None,
    };
    model.linears.iter().filter_map(pattern).collect()
}

impl Built {
    /// A matrix with holes keeps them where it is rounded to what can have them; `patterns` are those before and after.
    fn keep_holes(&mut self, patterns: &mut BTreeMap<Site, Pattern>) {
        let taught = matches!(self.plan, Plan::Learned(_));
        let rounds = taught || self.plan.each_matrix().is_ok_and(|method| !method.changes_floats());
        for (site, storage) in &mut self.choice {
            if let (true, Some(pattern), Storage::Grid(_)) = (rounds, patterns.get(site), *storage) {
                *storage = Sparse::new(*storage, *pattern).map_or(*storage, Storage::Sparse);
            }
            match storage {
                Storage::Sparse(sparse) => patterns.insert(*site, sparse.pattern()),
                _ => patterns.remove(site),
            };
        }
    }

    /// The same step by another method.
    pub fn with(&self, method: Box<dyn Rewrite>) -> Built {
        let (choice, fallbacks) = (self.choice.clone(), self.fallbacks.clone());
        Built { method: self.method, plan: Plan::EachMatrix(method), choice, fallbacks, cut_to: self.cut_to.clone() }
    }

    /// Does any matrix become the product of two?
    pub fn makes_factors(&self, model: &Model) -> bool {
        let Ok(method) = self.plan.each_matrix() else { return false };
        let makes = |(site, storage): (&Site, &Storage)| {
            model.spec.shape(*site).is_some_and(|shape| method.factors(*site, shape, *storage).is_some())
        };
        self.choice.iter().any(makes)
    }
}

impl Step {
    fn build(&self, spec: &Spec, limits: &Limits<'_>) -> Result<Built> {
        let method = methods::find(&self.method)?;
        let plan = (method.build)(self.options.clone())?;
        if matches!(plan, Plan::Rotated(_) | Plan::Cut(_) | Plan::Vocabulary(_)) && self.storage != "keep" {
            plan.each_matrix()?;
        }
        let (choice, fallbacks) = choose(&self.storage, &self.sites, spec, limits)?;
        Ok(Built { method: method.name, plan, choice, fallbacks, cut_to: None })
    }
}

/// What the format of the result does not let a recipe choose.
pub struct Limits<'a> {
    /// Why a site must stay floats, where it must: no default treats it, and codes for it are an error.
    pub floats: &'a dyn Fn(Site) -> Option<String>,
    /// Are queries, keys and values one tensor of a GGUF file?
    pub fused: bool,
}

impl Limits<'_> {
    /// None.
    pub const NONE: Limits<'static> = Limits { floats: &|_| None, fused: false };
}

/// A storage for each of some sites.
pub type Choice = BTreeMap<Site, Storage>;

/// The storage of each matrix of a model, and what was asked where rows do not divide into the blocks that were asked for.
///
/// # Errors
/// If a storage or a site is not known.
pub fn choose(
    storage: &str,
    sites: &BTreeMap<String, String>,
    spec: &Spec,
    limits: &Limits<'_>,
) -> Result<(Choice, Choice)> {
    let floats = limits.floats;
    let (default, mixed) = match mixes::mix(storage, spec, limits.fused) {
        Some((most, others)) => (Some(most), others),
        None => (parse_choice(storage, None)?, BTreeMap::new()),
    };
    let mut choice: BTreeMap<Site, Storage> = BTreeMap::new();
    for site in spec.matrices() {
        // Positions are few and llama.cpp keeps them as floats; they are treated only when named.
        if let Some(most) = default.filter(|_| site.role != Role::Position && floats(site).is_none()) {
            choice.insert(site, mixed.get(&site).copied().unwrap_or(most));
        }
    }
    // Of several that select a site the narrowest counts: a site before a role, a role before blocks.
    let mut named: Vec<(usize, &String, &String)> =
        sites.iter().map(|(name, storage)| (breadth(name), name, storage)).collect();
    named.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(b.1)));
    for (_, name, storage) in named {
        let storage = parse_choice(storage, default)?;
        for site in select(name, spec)? {
            match storage {
                Some(s) if s.is_coded() => match floats(site) {
                    Some(reason) => return Err(Error::Site { site, reason }),
                    None => choice.insert(site, s),
                },
                Some(s) => choice.insert(site, s),
                None => choice.remove(&site),
            };
        }
    }
    let mut fallbacks = BTreeMap::new();
    for (site, storage) in &mut choice {
        let got = save::fallback(*storage, spec.shape(*site).map_or(1, |[_, cols]| cols));
        if got != *storage {
            fallbacks.insert(*site, *storage);
            *storage = got;
        }
    }
    Ok((choice, fallbacks))
}

/// How much a selection selects: a site, a role, some blocks.
fn breadth(text: &str) -> usize {
    match text.parse::<Site>() {
        _ if text.starts_with("layer") => 2,
        Ok(_) => 0,
        Err(_) => 1,
    }
}

/// A storage by its name; `keep` leaves what is there, and `6 bits` is of the kind that `like` is.
fn parse_choice(name: &str, like: Option<Storage>) -> Result<Option<Storage>> {
    if name == "keep" {
        return Ok(None);
    }
    let bits = name.strip_suffix("bits").or_else(|| name.strip_suffix("bit"));
    if let Some(bits) = bits.and_then(|b| b.trim().parse::<u8>().ok()) {
        let found = like.and_then(|like| of_bits(bits, like));
        return found.map(Some).ok_or_else(|| {
            let like = like.map_or("what is kept".into(), Storage::name);
            Error::Recipe(format!("{name:?}: there is no storage of so many bits of the kind of {like}; name one"))
        });
    }
    Ok(Some(Storage::parse(name)?))
}

/// The storage of that many bits that is most like another.
fn of_bits(bits: u8, like: Storage) -> Option<Storage> {
    let Storage::Grid(grid) = like else { return None };
    Some(Storage::Grid(match (grid, bits) {
        (Grid::Int { group, zero, .. }, _) => Grid::int(bits, group, zero)?,
        (Grid::Levels { .. }, _) => return None,
        (_, 8) => Grid::Q8_0,
        (Grid::Q4_0 | Grid::Q4_1 | Grid::Q5_0 | Grid::Q5_1 | Grid::Q8_0 | Grid::Iq4Nl | Grid::Mxfp4, 5) => Grid::Q5_0,
        (Grid::Q4_0 | Grid::Q4_1 | Grid::Q5_0 | Grid::Q5_1 | Grid::Q8_0 | Grid::Iq4Nl | Grid::Mxfp4, 4) => Grid::Q4_0,
        (_, 2) => Grid::Q2K,
        (_, 3) => Grid::Q3K,
        (_, 4) => Grid::Q4K,
        (_, 5) => Grid::Q5K,
        (_, 6) => Grid::Q6K,
        _ => return None,
    }))
}

/// The sites that a text selects: `3.q`, `head`, a role in every block (`down`), or `layers 0,1` / `layers 2..5`.
///
/// # Errors
/// If it selects nothing in this model.
pub fn select(text: &str, spec: &Spec) -> Result<Vec<Site>> {
    let matrices = spec.matrices();
    let bad = |reason: &str| {
        Error::Recipe(format!(
            "{text:?} {reason}; sites read like `3.q`, `down`, `head`, `layers 0,1` or `layers 2..5`"
        ))
    };
    if let Some(list) = text.strip_prefix("layers ").or_else(|| text.strip_prefix("layer ")) {
        let mut layers = Vec::new();
        for part in list.split(',').map(str::trim) {
            match part.split_once("..") {
                Some((from, to)) => {
                    let range = from.parse::<u16>().ok().zip(to.parse::<u16>().ok());
                    let (from, to) = range.ok_or_else(|| bad("has no numbers"))?;
                    layers.extend(from..to);
                }
                None => layers.push(part.parse::<u16>().map_err(|_| bad("has no numbers"))?),
            }
        }
        let sites: Vec<Site> = matrices.into_iter().filter(|s| s.layer.is_some_and(|l| layers.contains(&l))).collect();
        return if sites.is_empty() { Err(bad("selects no layer of this model")) } else { Ok(sites) };
    }
    if let Ok(site) = text.parse::<Site>() {
        let site = spec.resolve(site);
        return if matrices.contains(&site) { Ok(vec![site]) } else { Err(bad("is no matrix of this model")) };
    }
    let sites: Vec<Site> = matrices.into_iter().filter(|s| s.role.name() == text).collect();
    if sites.is_empty() { Err(bad("names no site")) } else { Ok(sites) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_round_trip_and_typos_are_told() {
        let text = "planish = 1\nseed = 3\n[floor]\nmax_loss = 0.02\n[[step]]\nmethod = \"gptq\"\nstorage = \"q4_k\"\ndamping = 0.02\n[step.sites]\nhead = \"q6_k\"\n";
        let recipe = Recipe::parse(text).unwrap();
        assert_eq!(Recipe::parse(&recipe.to_text().unwrap()).unwrap(), recipe);
        assert_eq!(recipe.steps[0].options["damping"].as_float(), Some(0.02));
        for (bad, want) in [
            ("planish = 2\n[[step]]\nmethod='rtn'\nstorage='q4_0'", "version 2"),
            ("planish = 1\nsteps = 1", "unknown field"),
            ("planish = 1\nstep = []", "no [[step]]"),
            ("planish = 1\n[[step]]\nmethod = 1", "invalid type"),
        ] {
            let e = Recipe::parse(bad).unwrap_err().to_string();
            assert!(e.contains(want), "{e}");
        }
    }
}
