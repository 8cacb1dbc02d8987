//! Matrices that learn to be codes (quantization-aware training): the model runs on what their codes stand for, gradients
//! pass the rounding straight through (arXiv 1308.3432), and the scales of the codes learn as well (arXiv 1902.08153), and where
//! the levels are a palette of the matrix's own, these too (Deep Compression, arXiv 1510.00149).

use crate::Result;
use model::{Error, Model, Parameters, Site};
use std::collections::BTreeMap;
use tensor::{
    Linear, Tensor,
    grid::{Grid, Scales, Table},
};

/// The matrices of a model that are to be codes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Codes {
    of: BTreeMap<Site, Coded>,
    /// The levels of the matrix at hand.
    levels: Tensor,
    /// Its scales as they are, and their gradient.
    now: Scales,
    gradient: Scales,
}

/// One matrix.
#[derive(Clone, Debug)]
struct Coded {
    grid: Grid,
    /// What fitted the values before they learned: scales learn as multiples of these, which gives steps of one size to
    /// scales of all sizes.
    before: Scales,
}

impl Coded {
    /// The grid with the levels that were learned.
    fn grid(&self, values: &Parameters, site: Site) -> Grid {
        let (Grid::Levels { table: Table::Own(palette), group }, Some(moves)) = (self.grid, values.moves.get(&site))
        else {
            return self.grid;
        };
        let distance = distance(palette.levels());
        let mut levels: Vec<i8> = palette
            .levels()
            .iter()
            .zip(moves)
            .map(|(l, m)| (f32::from(*l) + m * distance).round().clamp(-127.0, 127.0) as i8)
            .collect();
        for i in 1..levels.len() {
            levels[i] = levels[i].max(levels[i - 1]);
        }
        // Levels that all became one are no palette.
        Table::palette(&levels).map_or(self.grid, |table| Grid::Levels { table, group })
    }

    fn now(&self, values: &Parameters, site: Site, now: &mut Scales) {
        now.clone_from(&self.before);
        let learned = (values.factors.get(&site), values.drifts.get(&site));
        if let (Some(factors), _) = learned {
            now.scale.iter_mut().zip(factors).for_each(|(s, f)| *s *= f);
        }
        if let (_, Some(drifts)) = learned {
            let units = self.before.scale.iter().map(|s| s.abs());
            now.offset.iter_mut().zip(drifts).zip(units).for_each(|((o, d), unit)| *o += d * unit);
        }
    }
}

/// The mean distance between neighbouring levels.
fn distance(levels: &[i8]) -> f32 {
    let ends = [levels.first(), levels.last()].map(|end| f32::from(end.copied().unwrap_or(0)));
    (ends[1] - ends[0]) / (levels.len().max(2) - 1) as f32
}

impl Codes {
    /// Gives each matrix of `choice` scales that fit it; the values learn these as well.
    ///
    /// # Errors
    /// If the model has no such matrix, or a row does not divide into blocks.
    pub fn new(choice: &BTreeMap<Site, Grid>, values: &mut Parameters) -> Result<Codes> {
        let mut all = Codes::default();
        for (site, grid) in choice {
            let matrix = values.matrix(*site)?;
            if !grid.fits(matrix.cols()) {
                let reason =
                    format!("a row of {} values does not divide into blocks of {}", matrix.cols(), grid.name());
                return Err(Error::Site { site: *site, reason }.into());
            }
            let before = grid.fit_scales(matrix);
            values.factors.insert(*site, vec![1.0; before.scale.len()]);
            if grid.has_offsets() {
                values.drifts.insert(*site, vec![0.0; before.offset.len()]);
            }
            if let Grid::Levels { table: Table::Own(palette), .. } = grid {
                values.moves.insert(*site, vec![0.0; palette.levels().len()]);
            }
            all.of.insert(*site, Coded { grid: *grid, before });
        }
        Ok(all)
    }

    /// What the codes of a matrix stand for; `None` where it stays as it is.
    pub fn levels(&mut self, values: &Parameters, site: Site) -> Option<&mut Tensor> {
        let (coded, matrix) = (self.of.get(&site)?, values.matrices.get(&site)?);
        coded.now(values, site, &mut self.now);
        self.levels.reset(matrix.rows(), matrix.cols());
        coded.grid(values, site).levels(matrix, &self.now, &mut self.levels);
        Some(&mut self.levels)
    }

    /// From the gradients of what the codes stand for those of the matrices, in their place, and of their scales.
    pub fn gradients(&mut self, values: &Parameters, gradient: &mut Parameters) {
        for (site, coded) in &self.of {
            let (Some(matrix), Some(dy)) = (values.matrices.get(site), gradient.matrices.get_mut(site)) else {
                continue;
            };
            coded.now(values, *site, &mut self.now);
            self.gradient.clone_from(&self.now);
            let grid = coded.grid(values, *site);
            if let (Some(moves), Grid::Levels { table: Table::Own(palette), .. }) =
                (gradient.moves.get_mut(site), coded.grid)
            {
                let distance = distance(palette.levels());
                let own = grid.table_gradient(matrix, &self.now, dy);
                moves.iter_mut().zip(own).for_each(|(m, g)| *m = g * distance);
            }
            grid.levels_gradient(matrix, &self.now, dy, &mut self.gradient);
            let units = &coded.before.scale;
            if let Some(factors) = gradient.factors.get_mut(site) {
                let own = self.gradient.scale.iter().zip(units);
                factors.iter_mut().zip(own).for_each(|(f, (g, unit))| *f = g * unit);
            }
            if let Some(drifts) = gradient.drifts.get_mut(site) {
                let own = self.gradient.offset.iter().zip(units);
                drifts.iter_mut().zip(own).for_each(|(d, (g, unit))| *d = g * unit.abs());
            }
        }
    }

    /// Puts the codes into a model.
    ///
    /// # Errors
    /// If one cannot be stored.
    pub fn give(&self, values: &Parameters, model: &mut Model) -> Result<()> {
        let mut now = Scales::default();
        for (site, coded) in &self.of {
            let Some(matrix) = values.matrices.get(site) else { continue };
            coded.now(values, *site, &mut now);
            let weight = coded.grid(values, *site).encode_levels(matrix, &now);
            let weight = weight.map_err(|e| Error::Site { site: *site, reason: e.to_string() })?;
            let bias = values.biases.get(site).cloned();
            model.linears.insert(*site, Linear::with_bias(weight, bias));
        }
        Ok(())
    }
}
