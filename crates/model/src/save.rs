//! A model becomes files again, by the same tables that read it: a Hugging Face directory or a GGUF.

use crate::{
    Config, Error, Model, Result, Role, Site,
    families::{Layout, Part, Stored, gguf_config},
    layout,
    source::{CODED, STORAGE_KEY, own_name},
};
use formats::{
    Dtype,
    gguf::{GgmlType, Value, Writer},
    quantized::{Format, Written},
    safetensors::{self, Entry},
    tokenizer::{GgufVocab, Tokenizer},
};
use serde_json::json;
use std::{collections::BTreeMap, path::Path};
use tensor::{Bytes, Storage, Tensor, Weight, entropy, grid::Grid};

/// A site that could not be stored as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// The site.
    pub site: Site,
    /// What was asked.
    pub asked: Storage,
    /// What it got.
    pub got: Storage,
}

/// Writes `config.json` and `model.safetensors` into an existing directory.
///
/// Sites on grids go to planish's own tensors, all others under the family's names and layouts.
///
/// # Errors
/// If a file cannot be written.
pub fn directory(model: &Model, dir: &Path) -> Result<()> {
    own_directory(model, dir, false)
}

/// The same with codes that take as few bits as how often each is there allows ([`entropy`]); they are unfolded when the file is read.
///
/// # Errors
/// If a file cannot be written.
pub fn coded_directory(model: &Model, dir: &Path) -> Result<()> {
    own_directory(model, dir, true)
}

fn own_directory(model: &Model, dir: &Path, coded: bool) -> Result<()> {
    let (entries, storage) = own_entries(model, coded)?;
    let mut metadata = vec![("format", "pt".to_string())];
    let mut about = None;
    if !storage.is_empty() {
        metadata.push((STORAGE_KEY, json!(storage).to_string()));
        about = Some(json!({"quant_method": "planish", "version": 1}));
    }
    write(model, dir, &entries, &metadata, about)
}

/// Writes `config.json` and `model.safetensors` into an existing directory, as another quantizer's readers want them.
///
/// # Errors
/// If the format cannot hold a matrix, or a file cannot be written.
pub fn quantized(model: &Model, dir: &Path, format: Format) -> Result<()> {
    let (mut entries, mut written, mut floats) = (Vec::new(), Vec::new(), Vec::new());
    let plain_zeros = format.plain_zeros(model.linears.values().map(|l| l.weight.storage()));
    each_tensor(model, model.family.stored, |stored, layer, sites| {
        let (site, part) = sites[0];
        let name = stored.name_in(layer);
        let matrix = part == Part::Weight && !site.role.is_norm();
        let is = |f: fn(&Weight) -> bool| sites.iter().any(|(s, _)| model.linear(*s).is_ok_and(|l| f(&l.weight)));
        if matrix && is(|w| w.low_rank().is_some()) {
            let reason = format!(
                "is the product of two matrices, which {} has no form for; write a directory of planish's own (--format hf), or a \
                 GGUF, which holds it multiplied out",
                format.name()
            );
            return Err(Error::Site { site, reason });
        }
        if matrix && is(|w| matches!(w.storage(), Storage::Sparse(_))) {
            let reason = format!(
                "has holes, which {} has no form for; write a directory of planish's own (--format hf)",
                format.name()
            );
            return Err(Error::Site { site, reason });
        }
        let codes = matrix && is(|w| w.grid().is_some());
        let module = name.strip_suffix(".weight").unwrap_or(&name).to_string();
        if !codes {
            let (weight, vector) = gather(model, stored, layer, sites, None)?;
            entries.push(entry(name, &weight, vector));
            // What is looked up is no linear module of the reader's.
            if matrix && !matches!(site.role, Role::Embed | Role::Position) {
                floats.push(module);
            }
            return Ok(());
        }
        if let Some(reason) = quantized_refusal(model, site, format) {
            return Err(Error::Site { site, reason });
        }
        let rows = match stored.layout {
            Layout::Columns => stored.with(Layout::Rows),
            _ => *stored,
        };
        let (weight, _) = gather(model, &rows, layer, sites, None)?;
        let bad = |reason: String| Error::Site {
            site,
            reason: format!("{reason}; choose another storage for it with --override '{site}=...' or 'keep'"),
        };
        let rounding = model.linear(site)?.rounding;
        entries.extend(format.entries(&module, &weight, plain_zeros, rounding).map_err(bad)?);
        written.push(Written { name: module, weight, rounding });
        Ok(())
    })?;
    if model.spec.tied {
        floats.push("lm_head".into());
    }
    let about = format.config(&written, &floats).map_err(Error::Asked)?;
    write(model, dir, &entries, &[("format", "pt".into())], Some(about))
}

/// Why a format of another quantizer has no place for the codes of a site, if it has none.
pub fn quantized_refusal(model: &Model, site: Site, format: Format) -> Option<String> {
    if matches!(site.role, Role::Embed | Role::Position) {
        let tied = if site.role == Role::Embed && model.spec.tied { ", with which the head is one" } else { "" };
        return Some(format!("{} keeps what is looked up{tied} as floats", format.name()));
    }
    let turned = model.family.stored.iter().any(|s| s.layout == Layout::Columns);
    if turned && format != Format::Gptq {
        return Some(format!(
            "{} has no form for the transposed matrices of this family; gptq and gguf have",
            format.name()
        ));
    }
    (site.role == Role::Head && format == Format::Awq).then(|| "awq keeps the head as floats".into())
}

fn write(
    model: &Model,
    dir: &Path,
    entries: &[Entry],
    metadata: &[(&str, String)],
    about: Option<serde_json::Value>,
) -> Result<()> {
    safetensors::write(&dir.join("model.safetensors"), entries, metadata)?;
    let config = config_of(model, about);
    let text = serde_json::to_string_pretty(config.fields()).map_err(|e| Error::Asked(e.to_string()))?;
    formats::atomic::write_bytes(&dir.join("config.json"), text.as_bytes())?;
    Ok(())
}

/// Entries of a directory in planish's own storage, and the storage of each site that has it.
fn own_entries(model: &Model, coded: bool) -> Result<(Vec<Entry>, BTreeMap<String, String>)> {
    let own = |w: &Weight| matches!(w, Weight::Quant(_) | Weight::LowRank(_));
    let own: Vec<Site> = model.linears.iter().filter(|(_, l)| own(&l.weight)).map(|(s, _)| *s).collect();
    let mut entries = Vec::new();
    let mut storage: BTreeMap<String, String> = BTreeMap::new();
    each_tensor(model, model.family.stored, |stored, layer, sites| {
        if sites.iter().any(|(s, part)| own.contains(s) && *part == Part::Weight) {
            for (site, _) in sites {
                let weight = &model.linear(*site)?.weight;
                if let Some(bytes) = coded.then(|| entropy::pack(weight)).flatten() {
                    let (name, shape) = (own_name(*site, ""), vec![bytes.len()]);
                    entries.push(Entry { name, dtype: Dtype::U8, shape, bytes: Bytes::from_vec(bytes) });
                    storage.insert(site.part_name(""), format!("{}{CODED}", weight.storage().full_name()));
                    continue;
                }
                for (part, w) in weight.parts() {
                    entries.push(own_entry(own_name(*site, part), w));
                    storage.insert(site.part_name(part), w.storage().full_name());
                }
            }
            return Ok(());
        }
        let (weight, vector) = gather(model, stored, layer, sites, None)?;
        entries.push(entry(stored.name_in(layer), &weight, vector));
        Ok(())
    })?;
    Ok((entries, storage))
}

/// The configuration that goes with what is written.
fn config_of(model: &Model, about: Option<serde_json::Value>) -> Config {
    let mut config = model.config.clone();
    let fields = config.fields_mut();
    fields.shift_remove("quantization_config");
    fields.insert("tie_word_embeddings".into(), json!(model.spec.tied));
    if let Some(about) = about {
        fields.insert("quantization_config".into(), about);
    }
    config
}

type Sites = [(Site, Part)];

/// Calls `f` for every stored tensor that this model has, in the order of the table, blocks in turn.
fn each_tensor(
    model: &Model,
    table: &[Stored],
    mut f: impl FnMut(&Stored, Option<u16>, &Sites) -> Result<()>,
) -> Result<()> {
    let mut visit = |stored: &Stored, layer: Option<u16>| {
        let sites: Vec<(Site, Part)> =
            stored.sites.iter().map(|(role, part)| (Site { layer, role: *role }, *part)).collect();
        let present = sites.iter().all(|(s, part)| has(model, *s, *part));
        if present { f(stored, layer, &sites) } else { Ok(()) }
    };
    let edges = |first: bool| {
        table.iter().filter(move |s| s.is_edge() && matches!(s.sites[0].0, Role::Embed | Role::Position) == first)
    };
    edges(true).try_for_each(|s| visit(s, None))?;
    for layer in 0..model.spec.layers() {
        table.iter().filter(|s| !s.is_edge()).try_for_each(|s| visit(s, Some(layer)))?;
    }
    edges(false).try_for_each(|s| visit(s, None))
}

fn has(model: &Model, site: Site, part: Part) -> bool {
    match (model.norms.get(&site), model.linears.get(&site), part) {
        (Some(_), _, Part::Weight) | (_, Some(_), Part::Weight) => true,
        (Some(n), _, Part::Bias) => n.shift.is_some(),
        (_, Some(l), Part::Bias) => l.bias.is_some(),
        _ => false,
    }
}

/// Joins the parameters of a stored tensor; `storage` rounds matrices to another storage first.
fn gather(
    model: &Model,
    stored: &Stored,
    layer: Option<u16>,
    sites: &Sites,
    storage: Option<Storage>,
) -> Result<(Weight, bool)> {
    let vector = sites[0].1 == Part::Bias || sites[0].0.role.is_norm();
    let column = |v: &[f32]| Weight::from_tensor(Tensor::from_vec(v.len(), 1, v.to_vec()));
    let part = |(site, part): &(Site, Part)| -> Result<Weight> {
        match (model.norms.get(site), part) {
            (Some(n), Part::Weight) => Ok(column(&n.scale)),
            (Some(n), Part::Bias) => Ok(column(n.shift.as_deref().unwrap_or(&[]))),
            (None, Part::Bias) => Ok(column(model.linear(*site)?.bias.as_deref().unwrap_or(&[]))),
            (None, Part::Weight) => {
                let w = &model.linear(*site)?.weight;
                let fits = w.low_rank().is_none() && storage.is_none_or(|s| s == w.storage());
                if fits {
                    return Ok(w.clone());
                }
                // A format of whole matrices gets the product.
                Weight::encode(&w.to_tensor(), storage.unwrap_or(Storage::F32), None)
                    .map_err(|e| Error::Site { site: *site, reason: e.to_string() })
            }
        }
    };
    let parts: Vec<Weight> = sites.iter().map(part).collect::<Result<_>>()?;
    let head_dim = layer.map_or(1, |l| model.spec.blocks[usize::from(l)].head_dim);
    let joined = layout::join(stored, &same_floats(parts), head_dim);
    joined.map(|w| (w, vector)).map_err(|reason| Error::Site { site: sites[0].0, reason })
}

/// Brings floats of different types to 32 bits, so that they can be joined.
fn same_floats(parts: Vec<Weight>) -> Vec<Weight> {
    let dense = parts.iter().all(|p| matches!(p, Weight::Dense(_)));
    if !dense || parts.windows(2).all(|p| p[0].storage() == p[1].storage()) {
        return parts;
    }
    parts.iter().map(|p| Weight::from_tensor(p.to_tensor())).collect()
}

fn own_entry(name: String, w: &Weight) -> Entry {
    let (dtype, shape) = match w.storage() {
        Storage::F32 => (Dtype::F32, vec![w.rows(), w.cols()]),
        Storage::F16 => (Dtype::F16, vec![w.rows(), w.cols()]),
        Storage::Bf16 => (Dtype::Bf16, vec![w.rows(), w.cols()]),
        coded => (Dtype::U8, vec![w.rows(), coded.row_bytes(w.cols())]),
    };
    Entry { name, dtype, shape, bytes: w.bytes().clone() }
}

fn entry(name: String, w: &Weight, vector: bool) -> Entry {
    let dtype = match w.storage() {
        Storage::F16 => Dtype::F16,
        Storage::Bf16 => Dtype::Bf16,
        _ => Dtype::F32,
    };
    let shape = if vector { vec![w.rows()] } else { vec![w.rows(), w.cols()] };
    Entry { name, dtype, shape, bytes: w.bytes().clone() }
}

/// The storage that a row of `cols` values gets where `asked` does not divide it, as llama.cpp chooses.
pub fn fallback(asked: Storage, cols: usize) -> Storage {
    if asked.fits(cols) {
        return asked;
    }
    let next = match asked {
        Storage::Sparse(sparse) => sparse.values(),
        Storage::Grid(Grid::Tq1 | Grid::Tq2) => Storage::Grid(Grid::Q4_0),
        Storage::Grid(grid) if grid.block_len() == 256 && grid.bits_per_weight() < 4.4 => Storage::Grid(Grid::Iq4Nl),
        Storage::Grid(Grid::Q4K) => Storage::Grid(Grid::Q5_0),
        Storage::Grid(Grid::Q5K) => Storage::Grid(Grid::Q5_1),
        Storage::Grid(Grid::Q6K) => Storage::Grid(Grid::Q8_0),
        _ => Storage::F16,
    };
    fallback(next, cols)
}

/// Writes a GGUF. `ask` tells the storage of each matrix; weights that have it already keep their bytes.
///
/// Returns the sites that could not be stored as asked.
///
/// # Errors
/// If llama.cpp does not compute this model or its tokenizer, or the file cannot be written.
pub fn gguf(
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    path: &Path,
    ask: &dyn Fn(Site) -> Storage,
) -> Result<Vec<Fallback>> {
    let mut out = Writer::new();
    gguf_config::write(&model.config, &model.spec, model.family, &mut out)?;
    let table = model.family.gguf.as_ref().map_or(&[][..], |g| g.stored);
    let mut fallbacks = Vec::new();
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    each_tensor(model, table, |stored, layer, sites| {
        let first = sites[0].0;
        let vector = sites[0].1 == Part::Bias || first.role.is_norm();
        let (storage, shape) = if vector {
            let rows: usize = sites.iter().map(|(s, p)| vector_len(model, *s, *p)).sum();
            (Storage::F32, vec![rows])
        } else {
            let asked = common(sites.iter().map(|(s, _)| ask(*s))).ok_or_else(|| Error::Site {
                site: first,
                reason: format!("shares the tensor {} with others, which must take the same storage", stored.name),
            })?;
            let cols = model.linear(first)?.weight.cols();
            let got = fallback(asked, cols);
            if got != asked {
                fallbacks.extend(sites.iter().map(|(site, _)| Fallback { site: *site, asked, got }));
            }
            let rows = sites.iter().map(|(s, _)| model.linear(*s).map(|l| l.weight.rows())).sum::<Result<usize>>()?;
            (got, vec![rows, cols])
        };
        let kind = GgmlType::of(storage).ok_or_else(|| Error::Site {
            site: first,
            reason: format!(
                "is stored as {storage}, which GGUF does not have; export with --type q4_k or another GGUF type"
            ),
        })?;
        if !vector {
            *counts.entry(kind.0).or_default() += shape.iter().product::<usize>();
        }
        let (stored, sites) = (*stored, sites.to_vec());
        let data = move || {
            let storage = (!vector).then_some(storage);
            let joined = gather(model, &stored, layer, &sites, storage);
            let fault = |e: Error| formats::Error::field(Path::new("model"), stored.name, e.to_string());
            joined.map(|(w, _)| w.bytes().clone()).map_err(fault)
        };
        out.tensor(stored.name_in(layer), shape, kind, Box::new(data));
        Ok(())
    })?;
    let most = counts.iter().max_by_key(|(_, n)| **n).map_or(GgmlType::F32, |(id, _)| GgmlType(*id));
    out.set("general.file_type", Value::U32(most.file_type()));
    out.set("general.quantization_version", Value::U32(2));
    match tokenizer {
        Some(tokenizer) => GgufVocab::of(tokenizer, model.spec.vocab)?.write(&mut out),
        // llama.cpp opens a file without a vocabulary only if it says so.
        None => out.set("tokenizer.ggml.model", Value::String("no_vocab".into())),
    }
    out.write(path)?;
    Ok(fallbacks)
}

/// Matrices that share one tensor in a GGUF file, or in a directory under the family's names, and so must be stored alike.
pub fn shared(model: &Model, gguf: bool) -> Vec<Vec<Site>> {
    let table = match gguf {
        true => model.family.gguf.as_ref().map_or(&[][..], |g| g.stored),
        false => model.family.stored,
    };
    let mut groups = Vec::new();
    let matrices = |s: &&Stored| s.sites.len() > 1 && s.sites[0].1 == Part::Weight && !s.sites[0].0.is_norm();
    for stored in table.iter().filter(matrices) {
        for layer in 0..model.spec.layers() {
            groups.push(stored.sites.iter().map(|(role, _)| Site::of(layer, *role)).collect());
        }
    }
    groups
}

/// The matrices of a model by their names in a GGUF file, those that share a tensor together; none where no GGUF file has
/// its family.
pub fn gguf_matrices(model: &Model) -> Result<Vec<(String, Vec<Site>)>> {
    let table = model.family.gguf.as_ref().map_or(&[][..], |g| g.stored);
    let mut names = Vec::new();
    each_tensor(model, table, |stored, layer, sites| {
        if sites[0].1 == Part::Weight && !sites[0].0.role.is_norm() {
            names.push((stored.name_in(layer), sites.iter().map(|(site, _)| *site).collect()));
        }
        Ok(())
    })?;
    Ok(names)
}

/// Why a model has no GGUF form, if it has none.
pub fn gguf_refusal(model: &Model) -> Option<String> {
    // What refuses a model are its switches and its rotary scaling, and both are met before any tensor.
    gguf_config::write(&model.config, &model.spec, model.family, &mut Writer::new()).err().map(|e| e.to_string())
}

fn vector_len(model: &Model, site: Site, part: Part) -> usize {
    match (model.norms.get(&site), part) {
        (Some(n), Part::Weight) => n.scale.len(),
        (Some(n), Part::Bias) => n.shift.as_ref().map_or(0, Vec::len),
        (None, _) => model.linears.get(&site).and_then(|l| l.bias.as_ref()).map_or(0, Vec::len),
    }
}

fn common(mut items: impl Iterator<Item = Storage>) -> Option<Storage> {
    let first = items.next()?;
    items.all(|s| s == first).then_some(first)
}
