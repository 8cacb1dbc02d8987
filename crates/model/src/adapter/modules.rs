//! Between a model's sites and the matrices of its files, which may hold several: an adapter of a fused matrix is cut
//! into those of its sites, and theirs are joined again.

use super::{Adapter, Adapters, magnitude};
use crate::{
    Error, Model, Result, Role, Site,
    families::{Layout, Part, Stored},
    layout,
};
use tensor::{Tensor, Weight};

/// A matrix of the blocks as files hold it.
#[derive(Clone)]
pub(super) struct Module {
    /// As rows: Conv1D's adapters lie as all others do.
    stored: Stored,
    layer: u16,
    sites: Vec<Site>,
    /// Outputs of each site.
    rows: Vec<usize>,
    head_dim: usize,
    /// Is the matrix itself stored inputs by outputs?
    pub transposed: bool,
}

/// What ends the name of a matrix, and not that of the module which holds it.
const WEIGHT: &str = ".weight";

impl Module {
    /// The matrices of a model's blocks by one of its family's tables, block after block.
    pub fn all(model: &Model, table: &[Stored]) -> Vec<Module> {
        let matrix = |s: &&Stored| !s.is_edge() && s.sites[0].1 == Part::Weight && !s.sites[0].0.is_norm();
        let module = |stored: &Stored, layer: u16| {
            let sites: Vec<Site> = stored.sites.iter().map(|(role, _): &(Role, Part)| Site::of(layer, *role)).collect();
            let rows: Option<Vec<usize>> = sites.iter().map(|s| model.spec.shape(*s).map(|[rows, _]| rows)).collect();
            let transposed = stored.layout == Layout::Columns;
            let stored = if transposed { stored.with(Layout::Rows) } else { *stored };
            let head_dim = model.spec.blocks[usize::from(layer)].head_dim;
            Some(Module { stored, layer, sites, rows: rows?, head_dim, transposed })
        };
        let layers = 0..model.spec.layers();
        layers.flat_map(|layer| table.iter().filter(matrix).filter_map(move |s| module(s, layer))).collect()
    }

    /// Its name in the file.
    pub fn name(&self) -> String {
        let name = self.stored.name_in(Some(self.layer));
        name.strip_suffix(WEIGHT).map(String::from).unwrap_or(name)
    }

    /// What its name has in common with those of other blocks.
    pub fn short_name(&self) -> &'static str {
        let name = self.stored.name.split_once("{}.").map_or(self.stored.name, |(_, rest)| rest);
        name.strip_suffix(WEIGHT).unwrap_or(name)
    }

    /// The adapters of its sites as one, its outputs in the file's order; `None` where there are none.
    ///
    /// # Errors
    /// If some have magnitudes and some have not.
    pub fn join(&self, model: &Model, adapters: &Adapters) -> Result<Option<Adapter>> {
        let parts: Vec<Option<&Adapter>> = self.sites.iter().map(|s| adapters.get(s)).collect();
        let held: Vec<&Adapter> = parts.iter().copied().flatten().collect();
        let Some(first) = held.first() else { return Ok(None) };
        if held.iter().any(|a| a.magnitude.is_some() != first.magnitude.is_some()) {
            let reason = "shares a matrix of the file with sites of which some have magnitudes and some have not";
            return Err(Error::Site { site: self.sites[0], reason: reason.into() });
        }
        let scale = held.iter().map(|a| a.scale).max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(first.scale);
        // One `A` for all, as a fused matrix has it, or one below the other.
        let shared = held.iter().all(|a| a.down == first.down);
        let rank = if shared { first.rank() } else { held.iter().map(|a| a.rank()).sum() };
        let downs = held.iter().take(if shared { 1 } else { held.len() });
        let down = downs.flat_map(|a| a.down.as_slice().iter().copied()).collect();
        let mut at = 0;
        let ups = parts.iter().zip(&self.rows).map(|(part, rows)| {
            let mut up = Tensor::zeros(*rows, rank);
            if let Some(adapter) = part {
                for o in 0..*rows {
                    let own = up.row_mut(o)[at..].iter_mut().zip(adapter.up.row(o));
                    let factor = if adapter.scale == scale { 1.0 } else { adapter.scale / scale };
                    own.for_each(|(to, b)| *to = factor * b);
                }
                at += if shared { 0 } else { adapter.rank() };
            }
            Weight::from_tensor(up)
        });
        let up = self.joined(&ups.collect::<Vec<_>>())?;
        let lengths = |(part, site): (&Option<&Adapter>, &Site)| {
            let own = part.and_then(|a| a.magnitude.clone());
            let length = own.map_or_else(|| magnitude(model, *site), Ok)?;
            Ok(Weight::from_tensor(Tensor::from_vec(length.len(), 1, length)))
        };
        let magnitude = match first.magnitude {
            Some(_) => {
                let columns = parts.iter().zip(&self.sites).map(lengths).collect::<Result<Vec<Weight>>>()?;
                Some(self.joined(&columns)?.into_vec())
            }
            None => None,
        };
        let down = Tensor::from_vec(rank, first.down.cols(), down);
        Ok(Some(Adapter { down, up, scale, magnitude }))
    }

    fn joined(&self, parts: &[Weight]) -> Result<Tensor> {
        let joined = layout::join(&self.stored, parts, self.head_dim);
        joined.map(|w| w.to_tensor()).map_err(|reason| Error::Site { site: self.sites[0], reason })
    }

    /// An adapter of this matrix as those of its sites. `Err` says what is wrong.
    pub fn split(&self, adapter: Adapter) -> Result<Vec<(Site, Adapter)>, String> {
        let Adapter { down, up, scale, magnitude } = adapter;
        let split = |x: Tensor| layout::split(&self.stored, Weight::from_tensor(x), &self.rows, self.head_dim);
        let column = |m: Vec<f32>| Tensor::from_vec(m.len(), 1, m);
        let magnitudes = magnitude.map(|m| split(column(m))).transpose()?;
        let dora = magnitudes.is_some();
        let mut magnitudes = magnitudes.into_iter().flatten();
        let ups: Vec<Tensor> = split(up)?.iter().map(Weight::to_tensor).collect();
        // A fused matrix whose sites have adapters of their own is zero where they do not meet.
        let lone = ups.len() == 1 || ups.iter().all(|up| used(up).is_empty());
        let parts = self.sites.iter().zip(ups).filter_map(|(site, up)| {
            let magnitude = magnitudes.next().map(|m| m.to_tensor().into_vec());
            let used = used(&up);
            if lone || used.len() == up.cols() || used.is_empty() && dora {
                return Some((*site, Adapter { down: down.clone(), up, scale, magnitude }));
            }
            let up = up.transposed().select_rows(&used).transposed();
            (!used.is_empty()).then(|| (*site, Adapter { down: down.select_rows(&used), up, scale, magnitude }))
        });
        Ok(parts.collect())
    }
}

/// Columns that are not zero throughout.
fn used(up: &Tensor) -> Vec<usize> {
    (0..up.cols()).filter(|c| (0..up.rows()).any(|r| up.row(r)[*c] != 0.0)).collect()
}
