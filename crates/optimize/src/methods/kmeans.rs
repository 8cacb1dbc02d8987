//! Palettes: the levels of a matrix are chosen for it (Deep Compression, arXiv 1510.00149; they are the best there are, by dynamic
//! programming), and its values rounded to them with error feedback. Where nothing is known of the inputs' second moments, values
//! are weighed by the size of their inputs instead.

use super::{Method, Plan, Rewrite, at, gptq, options};
use crate::{Needs, Result, Stats};
use model::Site;
use rayon::prelude::*;
use serde::Deserialize;
use tensor::{
    Storage, Tensor, Weight,
    grid::{Grid, Table, means},
};

/// The method.
pub static KMEANS: Method = Method {
    name: "kmeans",
    about: "Chooses the levels of each matrix for itself, then rounds to them as gptq does.",
    paper: "arXiv 1510.00149; levels by dynamic programming (Wu, 1991)",
    cost: "one pass over the calibration data and inputs^3 operations per matrix",
    build: |o| {
        let kmeans = options::<KMeans>("kmeans", o)?;
        Ok(Plan::EachMatrix(Box::new(kmeans)))
    },
};

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct KMeans {
    /// How often levels and scales are fitted to each other.
    rounds: usize,
}

impl Default for KMeans {
    fn default() -> Self {
        KMeans { rounds: 4 }
    }
}

/// Bins of a unit of the levels.
const FINE: usize = 8;
/// Bins: from -127 to 127.
const BINS: usize = 254 * FINE + 1;
/// Values that are looked at; of larger matrices some rows, evenly.
const LOOK: usize = 1 << 20;

impl Rewrite for KMeans {
    fn needs(&self) -> Needs {
        Needs { gram: true, ..Needs::default() }
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight> {
        let choose = |importance: Option<&[f32]>| match storage.dense() {
            Storage::Grid(grid @ Grid::Levels { table: Table::Own(_), group }) if storage.fits(weight.cols()) => {
                let table = self.levels(grid, group, weight, importance);
                storage.with_values(Storage::Grid(Grid::Levels { table, group }))
            }
            _ => storage,
        };
        match stats.gram.as_ref().is_some_and(|gram| gram.cols() == weight.cols() && gram.rows() > 0) {
            // Errors are passed on, whichever column they are made in: all columns count alike.
            true => gptq::Gptq::default().matrix(site, weight, choose(None), stats),
            false => {
                let importance = stats.mean_squares(weight.cols());
                Weight::encode(weight, choose(importance.as_deref()), importance.as_deref()).map_err(at(site))
            }
        }
    }
}

impl KMeans {
    /// The levels of a matrix; zeros of one with holes are no values.
    fn levels(&self, grid: Grid, group: u16, weight: &Tensor, importance: Option<&[f32]>) -> Table {
        let (cols, mut grid) = (weight.cols(), grid);
        let Some(mut table) = Table::normal_palette(grid.code_bits()) else { return own(grid) };
        let step = (weight.rows() * cols / LOOK + 1).min(weight.rows().max(1));
        let rows: Vec<usize> = (0..weight.rows()).step_by(step).collect();
        for _ in 0..self.rounds {
            grid = Grid::Levels { table, group };
            let histograms: Vec<Vec<[f64; 2]>> =
                rows.par_chunks(64).map(|rows| histogram(grid, weight, rows, importance)).collect();
            let mut sums = vec![[0f64; 2]; BINS];
            histograms.iter().for_each(|h| sums.iter_mut().zip(h).for_each(|(a, b)| *a = [a[0] + b[0], a[1] + b[1]]));
            // What a bin weighs, at the mean of what is in it.
            let bins: Vec<(f64, f64)> = sums.iter().filter(|s| s[0] > 0.0).map(|[w, x]| (x / w, *w)).collect();
            let mut levels: Vec<i8> =
                means(&bins, 1 << grid.code_bits()).into_iter().map(|l| l.round().clamp(-127.0, 127.0) as i8).collect();
            levels.sort_unstable();
            match Table::palette(&levels) {
                Some(next) if next != table => table = next,
                _ => break,
            }
        }
        table
    }
}

fn own(grid: Grid) -> Table {
    if let Grid::Levels { table, .. } = grid { table } else { Table::Nf4 }
}

/// Weights and weighted values of some rows by bin, in units of the scales that fit the levels as they are.
fn histogram(grid: Grid, weight: &Tensor, rows: &[usize], importance: Option<&[f32]>) -> Vec<[f64; 2]> {
    let len = grid.block_len_in(weight.cols()).max(1);
    let mut sums = vec![[0f64; 2]; BINS];
    for row in rows.iter().map(|row| weight.row(*row)) {
        for (b, x) in row.chunks(len).enumerate() {
            let importance = importance.map(|w| &w[b * len..b * len + x.len()]);
            let scale = f64::from(grid.fit(x, importance).unit());
            if scale == 0.0 {
                continue;
            }
            for (i, x) in x.iter().enumerate().filter(|(_, x)| **x != 0.0) {
                let at = f64::from(*x) / scale;
                let bin = ((at + 127.0) * FINE as f64).round().clamp(0.0, (BINS - 1) as f64) as usize;
                let w = importance.map_or(1.0, |w| f64::from(w[i])) * scale * scale;
                sums[bin][0] += w;
                sums[bin][1] += w * at;
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::{ops, ops::Gram};

    #[test]
    fn levels_of_its_own_fit_a_matrix_better() {
        // Values around four places, some of which matter more.
        let value = |i: usize| [-1.0, -0.2, 0.15, 0.6][i * 7 % 4] + 0.05 * (i as f32 * 0.61).sin();
        let w = Tensor::from_vec(24, 128, (0..24 * 128).map(value).collect());
        let x = Tensor::from_vec(
            300,
            128,
            (0..300 * 128).map(|i| (i as f32 * 0.37).sin() * (1.0 + (i % 5) as f32)).collect(),
        );
        let mut gram = Gram::new(128);
        gram.add(&x);
        let stats = Stats { gram: Some(gram), ..Stats::default() };
        let error = |q: &Weight| -> f32 {
            let (a, b) = (ops::matmul(&x, &Weight::from_tensor(w.clone())), ops::matmul(&x, q));
            a.as_slice().iter().zip(b.as_slice()).map(|(a, b)| (a - b) * (a - b)).sum()
        };
        let method = KMeans::default();
        for (storage, most) in [("palette2g64", 0.2), ("palette3", 0.7), ("palette1g32", 0.9)] {
            let storage = Storage::parse(storage).unwrap();
            let site = Site::of(0, model::Role::Up);
            let ours = method.matrix(site, &w, storage, &stats).unwrap();
            let usual = gptq::Gptq::default().matrix(site, &w, storage, &stats).unwrap();
            println!("{storage}: {} of {}, {}", error(&ours), error(&usual), ours.storage().full_name());
            assert!(error(&ours) < most * error(&usual), "{storage}: {} {}", error(&ours), error(&usual));
            assert_eq!(ours.storage().name(), storage.name());
        }
        // What is zero stays so.
        let sparse = method
            .matrix(Site::of(0, model::Role::Up), &w, Storage::parse("palette4g32@2:4").unwrap(), &stats)
            .unwrap();
        assert_eq!(sparse.to_tensor().as_slice().iter().filter(|v| **v == 0.0).count(), 24 * 64);
    }
}
