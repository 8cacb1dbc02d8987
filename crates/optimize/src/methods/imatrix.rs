//! An importance matrix, as llama.cpp quantizes with one: rounding to nearest, with scales fitted so that inputs which are
//! large on the calibration data count more.

use super::{Method, Plan, Rewrite, at, options};
use crate::{Error, Needs, Result, Stats};
use model::Site;
use serde::Deserialize;
use tensor::{Storage, Tensor, Weight};

/// The method.
pub static IMATRIX: Method = Method {
    name: "imatrix",
    about: "Rounds to the nearest level of scales that fit best where inputs are large on the calibration data.",
    paper: "llama.cpp's importance matrix (github.com/ggml-org/llama.cpp/pull/4861)",
    cost: "one pass over the calibration data, memory of one matrix",
    build: |o| Ok(Plan::EachMatrix(Box::new(options::<Imatrix>("imatrix", o)?))),
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Imatrix {}

impl Rewrite for Imatrix {
    fn needs(&self) -> Needs {
        Needs { squares: true, ..Needs::default() }
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight> {
        let squares = stats.mean_squares(weight.cols());
        let squares = squares.ok_or_else(|| Error::Site { site, reason: "no calibration data reached it".into() })?;
        Weight::encode(weight, storage, Some(&squares)).map_err(at(site))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::ops::{Gram, Squares};

    #[test]
    fn inputs_that_count_more_are_hit_better_and_a_diagonal_does() {
        let cols = 64;
        let w = Tensor::from_vec(16, cols, (0..16 * cols).map(|i| ((i * i) as f32 * 0.731).sin()).collect());
        let loud = |c: usize| if c % 8 == 3 { 10.0 } else { 1.0 };
        let x = Tensor::from_vec(99, cols, (0..99 * cols).map(|i| (i as f32 * 1.37).cos() * loud(i % cols)).collect());
        let (mut squares, mut gram) = (Squares::new(cols), Gram::new(cols));
        squares.add(&x);
        gram.add(&x);
        let (site, storage) = (Site::of(0, model::Role::Up), Storage::parse("int3g32").unwrap());
        let by = |stats: &Stats| Imatrix {}.matrix(site, &w, storage, stats).unwrap();
        let weighed = by(&Stats { squares: Some(squares.clone()), ..Stats::default() });
        let off = |q: &Weight| -> f32 {
            let q = q.to_tensor();
            let pairs = q.as_slice().iter().zip(w.as_slice()).enumerate();
            pairs.map(|(i, (a, b))| (a - b).powi(2) * squares.mean()[i % cols]).sum()
        };
        assert!(off(&weighed) < 0.95 * off(&Weight::encode(&w, storage, None).unwrap()));
        // A Gram's diagonal is the same up to its rounding.
        let full = by(&Stats { gram: Some(gram), ..Stats::default() });
        assert!((off(&full) / off(&weighed) - 1.0).abs() < 0.01);
        let none = Imatrix {}.matrix(site, &w, storage, &Stats::default());
        assert!(none.unwrap_err().to_string().contains("no calibration data"));
    }
}
