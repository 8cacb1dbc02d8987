//! HQQ (half-quadratic quantization, Badri and Shaji, mobiusml.github.io/hqq_blog 2023): rounds so that most values are hit
//! well and a few outliers may be missed, without any data.
//!
//! It seeks the scales for which `sum |w - q(w)|^p` is least, `p` below 1, by turns: what is left of the error after
//! shrinking it is taken off the values, and scales are fitted to the rest. Scales are those of the grid, so it works on
//! every grid and not on zero points alone, as the first does.

use super::{Method, Plan, Rewrite, at, options};
use crate::{Error, Needs, Result, Stats};
use model::Site;
use rayon::prelude::*;
use serde::Deserialize;
use tensor::{
    Bytes, Storage, Tensor, Weight,
    grid::{Block, Grid},
};

/// The method.
pub static HQQ: Method = Method {
    name: "hqq",
    about: "Rounds so that most values are hit well and outliers may be missed (p-norm); needs no data.",
    paper: "mobiusml.github.io/hqq_blog",
    cost: "ten times that of rtn, memory of one matrix",
    build: |o| {
        let hqq = options::<Hqq>("hqq", o)?;
        let fits = hqq.p > 0.0 && hqq.p <= 1.0 && hqq.beta > 0.0 && hqq.kappa >= 1.0 && (1..=200).contains(&hqq.rounds);
        if !fits {
            let reason = "`p` lies above 0 and is at most 1, `beta` above 0, `kappa` is at least 1, `rounds` 1 to 200";
            return Err(Error::Options { method: "hqq".into(), reason: reason.into() });
        }
        Ok(Plan::EachMatrix(Box::new(hqq)))
    },
};

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Hqq {
    /// The norm of the errors.
    p: f32,
    /// How little of an error is shrunk away at first.
    beta: f32,
    /// By what `beta` grows from turn to turn.
    kappa: f32,
    /// Turns.
    rounds: usize,
}

impl Default for Hqq {
    fn default() -> Self {
        Hqq { p: 0.7, beta: 10.0, kappa: 1.05, rounds: 20 }
    }
}

impl Rewrite for Hqq {
    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, _: &Stats) -> Result<Weight> {
        let cols = weight.cols();
        let Storage::Grid(grid) = storage else { return Weight::encode(weight, storage, None).map_err(at(site)) };
        if !grid.fits(cols) {
            return Weight::encode(weight, storage, None).map_err(at(site));
        }
        let (len, size, width) = (grid.block_len_in(cols), grid.block_bytes_in(cols), grid.row_bytes(cols));
        let mut bytes = vec![0u8; weight.rows() * width];
        bytes.par_chunks_mut(width).enumerate().for_each(|(r, out)| {
            for (x, out) in weight.row(r).chunks(len).zip(out.chunks_exact_mut(size)) {
                let block = self.fit(grid, x);
                let mut codes = vec![0; x.len()];
                block.round_all(x, None, &mut codes);
                grid.encode(&block, &codes, out);
            }
        });
        Weight::new(storage, weight.rows(), cols, Bytes::from_vec(bytes)).map_err(at(site))
    }
}

impl Hqq {
    /// The scales of a block with the least error in this norm that the turns come by.
    fn fit(&self, grid: Grid, x: &[f32]) -> Block {
        let mut block = grid.fit(x, None);
        // Errors are measured in parts of the block's own size, so that `beta` means the same for every block.
        let size = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        if size == 0.0 {
            return block;
        }
        let mut codes = vec![0; x.len()];
        let mut errors = |b: &Block| -> Vec<f32> {
            b.round_all(x, None, &mut codes);
            x.iter().zip(&codes).enumerate().map(|(i, (v, code))| (v - b.value(i, *code)) / size).collect()
        };
        let cost = |errors: &[f32]| -> f32 { errors.iter().map(|e| e.abs().powf(self.p)).sum() };
        let mut off = errors(&block);
        let mut best = (cost(&off), block);
        let (mut beta, mut target) = (self.beta, x.to_vec());
        for _ in 0..self.rounds {
            for (t, (v, e)) in target.iter_mut().zip(x.iter().zip(&off)) {
                // The generalised soft threshold: small errors vanish, of large ones most stays.
                let kept = (e.abs() - e.abs().max(1e-8).powf(self.p - 1.0) / beta).max(0.0);
                *t = v - kept.copysign(*e) * size;
            }
            block = grid.fit(&target, None);
            off = errors(&block);
            let c = cost(&off);
            if c < best.0 {
                best = (c, block);
            }
            beta *= self.kappa;
        }
        best.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outliers_cost_the_others_less_than_they_do_in_rounding() {
        // Values of one size, and in each block one eight times as large.
        let value = |i: usize| if i % 32 == 5 { 8.0 } else { (i as f32 * 0.731).sin() };
        let x = Tensor::from_vec(8, 256, (0..8 * 256).map(value).collect());
        let storage = Storage::parse("int3g32").unwrap();
        let hqq = Hqq::default().matrix(Site::of(0, model::Role::Up), &x, storage, &Stats::default()).unwrap();
        let rtn = Weight::encode(&x, storage, None).unwrap();
        let off = |w: &Weight, p: f32| -> f32 {
            w.to_tensor().as_slice().iter().zip(x.as_slice()).map(|(a, b)| (a - b).abs().powf(p)).sum()
        };
        assert!(off(&hqq, 0.7) < 0.98 * off(&rtn, 0.7), "{} {}", off(&hqq, 0.7), off(&rtn, 0.7));
    }
}
