//! Matrices with holes that learn: what is not there stays zero.

use crate::Result;
use model::{Error, Model, Parameters, Site};
use rayon::prelude::*;
use std::collections::BTreeMap;
use tensor::{Bytes, Pattern, Sparse, Storage, Tensor, Weight};

/// Which values of each such matrix there are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Holes(BTreeMap<Site, Mask>);

/// Those of one.
#[derive(Clone, Debug)]
struct Mask {
    pattern: Pattern,
    /// Row by row.
    there: Vec<Vec<bool>>,
}

impl Holes {
    /// Of the matrices of a model that are stored with holes.
    pub fn of(model: &Model) -> Holes {
        let mask = |weight: &Weight| {
            let (Storage::Sparse(sparse), Some(stored)) = (weight.storage(), weight.stored()) else { return None };
            let there = (0..weight.rows()).map(|row| sparse.mask(stored.row(row), weight.cols())).collect();
            Some(Mask { pattern: sparse.pattern(), there })
        };
        Holes(model.linears.iter().filter_map(|(site, l)| Some((*site, mask(&l.weight)?))).collect())
    }

    /// Empties the holes of values that learned, or of their gradients.
    pub fn keep(&self, values: &mut Parameters) {
        for site in self.0.keys() {
            if let Some(matrix) = values.matrices.get_mut(site) {
                self.empty(*site, matrix);
            }
        }
    }

    /// Empties those of one matrix.
    pub fn empty(&self, site: Site, matrix: &mut Tensor) {
        let Some(mask) = self.0.get(&site) else { return };
        let cols = matrix.cols().max(1);
        matrix.as_mut_slice().par_chunks_mut(cols).zip(&mask.there).for_each(|(row, there)| {
            row.iter_mut().zip(there).filter(|(_, there)| !**there).for_each(|(value, _)| *value = 0.0);
        });
    }

    /// Takes what is not there out of matrices that became codes, as far as such codes can have holes.
    ///
    /// # Errors
    /// If one cannot be stored.
    pub fn give(&self, model: &mut Model) -> Result<()> {
        for (site, Mask { pattern, there }) in &self.0 {
            let Some(linear) = model.linears.get_mut(site) else { continue };
            let (storage, rows, cols) = (linear.weight.storage(), linear.weight.rows(), linear.weight.cols());
            let (Storage::Grid(_), Some(stored)) = (storage, linear.weight.stored()) else { continue };
            let Some(sparse) = Sparse::new(storage, *pattern).filter(|s| s.fits(cols)) else { continue };
            let width = sparse.row_bytes(cols);
            let mut bytes = vec![0u8; rows * width];
            let rows_out = bytes.par_chunks_mut(width.max(1)).zip(there).enumerate();
            rows_out.for_each(|(row, (out, there))| sparse.compact(stored.row(row), there, out));
            let weight = Weight::new(Storage::Sparse(sparse), rows, cols, Bytes::from_vec(bytes));
            linear.weight = weight.map_err(|e| Error::Site { site: *site, reason: e.to_string() })?;
        }
        Ok(())
    }
}
