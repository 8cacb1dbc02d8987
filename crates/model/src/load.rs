//! A directory or a GGUF file becomes a model: weights stay in the mapped file wherever their layout allows.

use crate::{
    Config, Error, Family, Model, Result, Role, Site, Spec,
    families::{self, Layout, Part, Stored, gguf_config},
    layout,
    model::NormWeights,
    source::{Own, Source},
};
use formats::quantized::{Format, Scheme};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path};
use tensor::{Linear, Tensor, Weight};

/// A model as it was read, with what was left in its files.
pub struct Opened {
    /// The model.
    pub model: Model,
    /// Where its tensors came from.
    pub source: Source,
    /// Tensors that no site holds.
    pub unused: Vec<String>,
    /// The other quantizer in whose format they are stored.
    pub format: Option<Format>,
    /// Matrices that another quantizer stored and that are decoded, with the reason.
    pub decoded: Vec<String>,
}

/// Opens a Hugging Face directory, planish's own artefact or a GGUF file.
///
/// # Errors
/// If a file is malformed, no family knows the architecture, or a tensor is missing or misshapen.
pub fn open(path: &Path) -> Result<Opened> {
    let (source, config) = open_source(path)?;
    let (family, config) = match &source {
        Source::Gguf(file) => (gguf_config::family(file)?, config),
        Source::Safetensors(_) => {
            let family = families::find(&config)?;
            let config = config.assuming(family.assumed)?;
            (family, config)
        }
    };
    let spec = (family.spec)(&config)?;
    check_size(&config, &spec)?;
    let table: &[Stored] = match (&source, &family.gguf) {
        (Source::Gguf(_), Some(gguf)) => gguf.stored,
        _ => family.stored,
    };
    let mut loader = Loader::new(&source, &spec, config.clone())?;
    loader.run(table)?;
    let Loader { linears, norms, used, scheme, decoded, .. } = loader;
    let unused = source.names().into_iter().filter(|n| !used.contains(n)).collect();
    let model = finish(spec, config, family, linears, norms);
    let format = scheme.map(|s| s.format());
    Ok(Opened { model, source, unused, format, decoded })
}

fn open_source(path: &Path) -> Result<(Source, Config)> {
    let missing = |reason: &str| Error::NoModel { path: path.into(), reason: reason.into() };
    if path.is_dir() {
        let config = path.join("config.json");
        if !config.is_file() && path.join(crate::adapter::PEFT_CONFIG).is_file() {
            return Err(missing("is an adapter; give the model that it is of, and the adapter with --adapter"));
        }
        if !config.is_file() {
            return Err(missing(
                "is a directory without config.json; a model has config.json, tokenizer.json and model.safetensors",
            ));
        }
        let config = Config::new(&config, formats::json::read_object(&config)?);
        let source = Source::Safetensors(formats::safetensors::Archive::open(path)?);
        return Ok((source, config));
    }
    if !path.exists() {
        return Err(missing("does not exist; give a Hugging Face directory or a GGUF file"));
    }
    if path.extension().is_some_and(|e| e == "safetensors") {
        return Err(missing(
            "is one file of a model; give its directory, which also holds config.json and tokenizer.json",
        ));
    }
    let file = formats::gguf::File::open(path)?;
    let config = gguf_config::config(&file)?;
    Ok((Source::Gguf(file), config))
}

/// Bounds the claims of a configuration before anything is allocated for them.
pub(crate) fn check_size(config: &Config, spec: &Spec) -> Result<()> {
    let sites = spec.matrices().into_iter().chain(spec.norms());
    let total = sites.filter_map(|s| spec.shape(s)).try_fold(0usize, |n, [r, c]| n.checked_add(r.checked_mul(c)?));
    match total {
        Some(_) => Ok(()),
        None => Err(config.error("hidden_size", "and the other sizes describe more weights than any machine holds")),
    }
}

fn finish(
    mut spec: Spec,
    config: Config,
    family: &'static Family,
    linears: BTreeMap<Site, Linear>,
    norms: BTreeMap<Site, NormWeights>,
) -> Model {
    // What a file carries decides: some families' configurations do not tell of biases.
    let has = |role: Role| linears.iter().any(|(s, l)| s.role == role && l.bias.is_some());
    spec.biases.qkv |= has(Role::Q) || has(Role::K) || has(Role::V);
    spec.biases.o |= has(Role::O);
    spec.biases.mlp |= has(Role::Up) || has(Role::Down);
    spec.biases.head |= has(Role::Head);
    Model { spec, config, family, linears, norms, adapters: BTreeMap::new(), key_value: Default::default() }
}

struct Loader<'a> {
    source: &'a Source,
    spec: &'a Spec,
    config: Config,
    own: BTreeMap<Site, Own>,
    /// How another quantizer stored the matrices.
    scheme: Option<Scheme>,
    decoded: Vec<String>,
    linears: BTreeMap<Site, Linear>,
    norms: BTreeMap<Site, NormWeights>,
    used: std::collections::BTreeSet<String>,
}

impl<'a> Loader<'a> {
    fn new(source: &'a Source, spec: &'a Spec, config: Config) -> Result<Loader<'a>> {
        let own = source.own_storage()?;
        let scheme = match config.get("quantization_config") {
            Some(Value::Object(about)) if own.is_empty() => Some(Scheme::read(config.path(), about)?),
            Some(about) if own.is_empty() => {
                return Err(config.error("quantization_config", format!("is {about}; it must be an object")));
            }
            _ => None,
        };
        Ok(Loader {
            source,
            spec,
            config,
            own,
            scheme,
            decoded: Vec::new(),
            linears: BTreeMap::new(),
            norms: BTreeMap::new(),
            used: Default::default(),
        })
    }

    fn run(&mut self, table: &[Stored]) -> Result<()> {
        for (site, own) in self.own.clone() {
            let shape = self.spec.shape(site);
            let shape = shape.ok_or_else(|| self.source.error(&site.to_string(), "is no site of this model"))?;
            let (weight, names) = self.source.own_weight(site, &own, shape)?;
            self.used.extend(names);
            self.linears.insert(site, Linear::new(weight));
        }
        for stored in table {
            if stored.is_edge() {
                self.tensor(stored, None)?;
            } else {
                (0..self.spec.layers()).try_for_each(|layer| self.tensor(stored, Some(layer)))?;
            }
        }
        self.check_complete()
    }

    /// Reads one stored tensor into its sites.
    fn tensor(&mut self, stored: &Stored, layer: Option<u16>) -> Result<()> {
        let sites: Vec<(Site, Part)> =
            stored.sites.iter().map(|(role, part)| (Site { layer, role: *role }, *part)).collect();
        let tied_head = sites[0].0 == Site::HEAD && self.spec.tied;
        let wanted = sites.iter().all(|(s, _)| self.spec.shape(*s).is_some()) && !tied_head;
        let name = stored.name_in(layer);
        if wanted && self.quantized(stored, layer, &sites, &name)? {
            return Ok(());
        }
        let Some(found) = self.source.stored_name(&name) else { return Ok(()) };
        if !wanted {
            if tied_head {
                self.used.insert(found);
            }
            return Ok(());
        }
        let raw = self.source.raw(&found)?;
        let bad = |reason: String| self.source.error(&found, reason);
        let vector = sites[0].1 == Part::Bias || sites[0].0.role.is_norm();
        let rows: Vec<usize> = sites.iter().map(|(s, part)| self.rows(*s, *part)).collect();
        let weight = if vector { as_column(raw, &bad)? } else { as_matrix(raw, &bad)? };
        let head_dim = layer.map_or(1, |l| self.spec.blocks[usize::from(l)].head_dim);
        let parts = layout::split(stored, weight, &rows, head_dim).map_err(bad)?;
        for ((site, part), weight) in sites.into_iter().zip(parts) {
            self.put(site, part, weight).map_err(|reason| self.source.error(&found, reason))?;
        }
        self.used.insert(found);
        Ok(())
    }

    /// Reads a matrix that another quantizer stored; `false` where it is not stored so.
    fn quantized(&mut self, stored: &Stored, layer: Option<u16>, sites: &[(Site, Part)], name: &str) -> Result<bool> {
        let (Some(scheme), Source::Safetensors(archive)) = (&self.scheme, self.source) else { return Ok(false) };
        let Some(prefix) = name.strip_suffix(".weight").filter(|_| !sites[0].0.role.is_norm()) else {
            return Ok(false);
        };
        // Base checkpoints leave out the first part of a name.
        let short = prefix.split_once('.').map(|(_, rest)| rest);
        for prefix in [Some(prefix), short].into_iter().flatten() {
            let Some(found) = scheme.matrix(archive, prefix)? else { continue };
            let rows: Vec<usize> = sites.iter().map(|(s, part)| self.rows(*s, *part)).collect();
            let head_dim = layer.map_or(1, |l| self.spec.blocks[usize::from(l)].head_dim);
            // These formats keep outputs by rows whatever the family does with floats.
            let rows_of = match stored.layout {
                Layout::Columns => stored.with(Layout::Rows),
                _ => *stored,
            };
            let parts = layout::split(&rows_of, found.weight, &rows, head_dim)
                .map_err(|reason| self.source.error(prefix, reason))?;
            for ((site, part), weight) in sites.iter().zip(parts) {
                self.put(*site, *part, weight).map_err(|reason| self.source.error(prefix, reason))?;
                if let Some(linear) = self.linears.get_mut(site) {
                    linear.rounding = found.rounding;
                }
            }
            self.decoded.extend(found.decoded.map(|reason| format!("{prefix}: {reason}")));
            self.used.extend(found.names);
            return Ok(true);
        }
        Ok(false)
    }

    /// Values of a site's parameter along the outputs.
    fn rows(&self, site: Site, part: Part) -> usize {
        let [rows, cols] = self.spec.shape(site).unwrap_or([0, 0]);
        if part == Part::Weight && site.role.is_norm() || part == Part::Bias && site.role.is_norm() {
            cols
        } else {
            rows
        }
    }

    fn put(&mut self, site: Site, part: Part, weight: Weight) -> Result<(), String> {
        let values = |w: Weight| w.to_tensor().into_vec();
        if site.role.is_norm() {
            let norm = self.norms.entry(site).or_insert_with(|| NormWeights { scale: Vec::new(), shift: None });
            match part {
                Part::Weight => norm.scale = values(weight),
                Part::Bias => norm.shift = Some(values(weight)),
            }
            return Ok(());
        }
        match part {
            Part::Bias => {
                let bias = values(weight);
                // A bias is listed after its weight in every table.
                let linear = self.linears.get_mut(&site).ok_or("is a bias without its weight")?;
                linear.bias = Some(bias);
            }
            Part::Weight => {
                let [rows, cols] = self.spec.shape(site).unwrap_or([0, 0]);
                if weight.rows() != rows || weight.cols() != cols {
                    let got = [weight.rows(), weight.cols()];
                    return Err(format!("has shape {got:?} where the configuration asks for {:?}", [rows, cols]));
                }
                self.linears.insert(site, Linear::new(weight));
            }
        }
        Ok(())
    }

    fn check_complete(&self) -> Result<()> {
        let matrices = self.spec.matrices();
        let missing = matrices.iter().find(|s| !self.linears.contains_key(s));
        let missing = missing.copied().or_else(|| {
            let empty = |s: &Site| self.norms.get(s).is_none_or(|n| n.scale.is_empty());
            self.spec.norms().into_iter().find(empty)
        });
        let missing = missing.or_else(|| {
            let lacks = |s: &&Site| self.spec.has_bias(**s) && self.linears.get(s).is_some_and(|l| l.bias.is_none());
            matrices.iter().find(lacks).copied()
        });
        match missing {
            None => Ok(()),
            Some(site) => Err(Error::NoModel {
                path: self.source.path().into(),
                reason: format!(
                    "holds no weight for {site}, which {} asks for; the download is incomplete or the files are of another model",
                    self.config.path().display()
                ),
            }),
        }
    }
}

/// A two-dimensional tensor as a matrix.
fn as_matrix(raw: crate::source::Raw, bad: &dyn Fn(String) -> Error) -> Result<Weight> {
    let [rows, cols] = raw.shape[..] else {
        return Err(bad(format!("has shape {:?}; a matrix has two dimensions", raw.shape)));
    };
    Weight::new(raw.storage, rows, cols, raw.bytes).map_err(|e| bad(e.to_string()))
}

/// A vector as a matrix of one column, in `f32`.
fn as_column(raw: crate::source::Raw, bad: &dyn Fn(String) -> Error) -> Result<Weight> {
    let [len] = raw.shape[..] else {
        return Err(bad(format!("has shape {:?}; a vector has one dimension", raw.shape)));
    };
    let row = Weight::new(raw.storage, 1, len, raw.bytes).map_err(|e| bad(e.to_string()))?;
    Ok(Weight::from_tensor(Tensor::from_vec(len, 1, row.to_tensor().into_vec())))
}
