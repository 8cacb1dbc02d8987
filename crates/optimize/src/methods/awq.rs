//! AWQ (arXiv 2306.00978), activation-aware weight quantization: channels with large inputs are multiplied before they are
//! rounded, and the norm that makes them is divided, so that they lose less.
//!
//! The power of the inputs' size by which they are multiplied is searched: the one whose rounded matrices, all that read the
//! norm together, err least on the calibration data. Where no norm makes the inputs (`o`, `down`) columns are weighed by
//! their size and not multiplied.

use super::{Method, Plan, Rewrite, at, gptq::Gptq, options};
use crate::{Error, Needs, Result, Stats};
use model::Site;
use serde::Deserialize;
use tensor::{Storage, Tensor, Weight, ops};

/// The method.
pub static AWQ: Method = Method {
    name: "awq",
    about: "Multiplies channels with large inputs before rounding; the norm before them is divided.",
    paper: "arXiv 2306.00978",
    cost: "one pass over the calibration data and twenty roundings of a part of each matrix",
    build: |o| {
        let awq = options::<Awq>("awq", o)?;
        let round = match awq.round.as_str() {
            "nearest" => None,
            "gptq" => Some(Gptq::default()),
            other => {
                let reason = format!("`round` is \"nearest\" or \"gptq\", not {other:?}");
                return Err(Error::Options { method: "awq".into(), reason });
            }
        };
        if !(1..=100).contains(&awq.grid) {
            return Err(Error::Options { method: "awq".into(), reason: "`grid` is from 1 to 100".into() });
        }
        Ok(Plan::EachMatrix(Box::new(Balanced { grid: awq.grid, round })))
    },
};

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Awq {
    /// Powers that are tried.
    grid: usize,
    /// How values are rounded afterwards.
    round: String,
}

impl Default for Awq {
    fn default() -> Self {
        Awq { grid: 20, round: "nearest".into() }
    }
}

struct Balanced {
    grid: usize,
    round: Option<Gptq>,
}

/// Rows of a matrix that a power is tried on.
const ROWS: usize = 128;

impl Rewrite for Balanced {
    fn needs(&self) -> Needs {
        Needs { gram: true, ..Needs::default() }
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight> {
        if let Some(gptq) = &self.round {
            return gptq.matrix(site, weight, storage, stats);
        }
        let squares = stats.gram.as_ref().filter(|g| g.cols() == weight.cols()).map(|g| g.mean_squares());
        Weight::encode(weight, storage, squares.as_deref()).map_err(at(site))
    }

    fn balance(&self, stats: &Stats, matrices: &[(Site, Tensor, Storage)]) -> Result<Option<Vec<f32>>> {
        let Some(gram) = stats.gram.as_ref().filter(|g| g.rows() > 0) else { return Ok(None) };
        let size: Vec<f32> = gram.mean_squares().iter().map(|s| s.sqrt().max(1e-6)).collect();
        let mean: Vec<f32> = gram.mean().iter().map(|v| *v as f32).collect();
        let moments = Weight::from_tensor(Tensor::from_vec(gram.cols(), gram.cols(), mean));
        let parts: Vec<(Site, Tensor, Storage)> = matrices
            .iter()
            .map(|(site, w, storage)| {
                let rows: Vec<usize> = (0..w.rows()).step_by(w.rows().div_ceil(ROWS).max(1)).collect();
                (*site, w.select_rows(&rows), *storage)
            })
            .collect();
        let mut best: Option<(f64, Vec<f32>)> = None;
        for i in 0..self.grid {
            let power = i as f32 / self.grid as f32;
            let mut by: Vec<f32> = size.iter().map(|s| s.powf(power)).collect();
            // Around one, as far up as down, so that nothing grows beyond what 16 bits hold.
            let (low, high) = by.iter().fold((f32::INFINITY, 0f32), |(l, h), s| (l.min(*s), h.max(*s)));
            by.iter_mut().for_each(|s| *s /= (low * high).sqrt());
            let mut error = 0.0;
            for (site, w, storage) in &parts {
                error += rounding_error(*site, w, *storage, &by, &size, &moments)?;
            }
            if best.as_ref().is_none_or(|(e, _)| error < *e) {
                best = Some((error, by));
            }
        }
        Ok(best.map(|(_, by)| by))
    }
}

/// What rounding costs the outputs when columns are multiplied first and inputs divided.
fn rounding_error(site: Site, w: &Tensor, storage: Storage, by: &[f32], size: &[f32], moments: &Weight) -> Result<f64> {
    let mut scaled = w.clone();
    for row in 0..scaled.rows() {
        scaled.row_mut(row).iter_mut().zip(by).for_each(|(w, s)| *w *= s);
    }
    let importance: Vec<f32> = size.iter().zip(by).map(|(x, s)| (x / s).powi(2)).collect();
    let mut off = Weight::encode(&scaled, storage, Some(&importance)).map_err(at(site))?.to_tensor();
    for row in 0..off.rows() {
        off.row_mut(row).iter_mut().zip(by).zip(w.row(row)).for_each(|((q, s), w)| *q = *q / s - w);
    }
    let moved = ops::matmul(&off, moments);
    Ok(off.as_slice().iter().zip(moved.as_slice()).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::ops::Gram;

    #[test]
    fn a_loud_channel_is_multiplied_and_the_error_falls() {
        let cols = 64;
        let w = Tensor::from_vec(32, cols, (0..32 * cols).map(|i| ((i * i) as f32 * 0.731).sin()).collect());
        let loud = |c: usize| if c % 16 == 3 { 30.0 } else { 1.0 };
        let x =
            Tensor::from_vec(200, cols, (0..200 * cols).map(|i| (i as f32 * 1.37).cos() * loud(i % cols)).collect());
        let mut gram = Gram::new(cols);
        gram.add(&x);
        let size: Vec<f32> = gram.mean_squares().iter().map(|s| s.sqrt()).collect();
        let moments = Tensor::from_vec(cols, cols, gram.mean().iter().map(|v| *v as f32).collect());
        let stats = Stats { gram: Some(gram), ..Stats::default() };
        let (site, storage) = (Site::of(0, model::Role::Up), Storage::parse("int3g64").unwrap());
        let awq = Balanced { grid: 20, round: None };
        let by = awq.balance(&stats, &[(site, w.clone(), storage)]).unwrap().unwrap();
        assert!(by[3] > 1.1 * by[4], "{} {}", by[3], by[4]);
        let moments = Weight::from_tensor(moments);
        let error = |by: &[f32]| rounding_error(site, &w, storage, by, &size, &moments).unwrap();
        assert!(error(&by) < error(&[1.0; 64]), "{} {}", error(&by), error(&[1.0; 64]));
    }
}
