//! SmoothQuant (arXiv 2211.10438): moves a part of the size of outlying inputs into the matrices that read them, so that
//! both round well to eight bits. The norm that makes the inputs takes the division over.

use super::{Method, Plan, Rewrite, at, options};
use crate::{Error, Needs, Result, Stats};
use model::Site;
use serde::Deserialize;
use tensor::{Storage, Tensor, Weight, ops};

/// The method.
pub static SMOOTHQUANT: Method = Method {
    name: "smoothquant",
    about: "Evens out inputs and matrices for 8 bits in both: --storage int8 --activations int8.",
    paper: "arXiv 2211.10438",
    cost: "one pass over the calibration data, memory of one matrix",
    build: |o| {
        let smooth = options::<Smooth>("smoothquant", o)?;
        if !(0.0..=1.0).contains(&smooth.alpha) {
            let reason = "`alpha` is from 0 (inputs stay) to 1 (inputs are all of one size)".into();
            return Err(Error::Options { method: "smoothquant".into(), reason });
        }
        Ok(Plan::EachMatrix(Box::new(smooth)))
    },
};

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Smooth {
    /// How much of the size of inputs goes into the matrices.
    alpha: f32,
}

impl Default for Smooth {
    fn default() -> Self {
        Smooth { alpha: 0.5 }
    }
}

impl Rewrite for Smooth {
    fn needs(&self) -> Needs {
        Needs { peak: true, ..Needs::default() }
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, _: &Stats) -> Result<Weight> {
        Weight::encode(weight, storage, None).map_err(at(site))
    }

    fn balances_for_others(&self) -> bool {
        true
    }

    fn balance(&self, stats: &Stats, matrices: &[(Site, Tensor, Storage)]) -> Result<Option<Vec<f32>>> {
        let Some(inputs) = &stats.peak else { return Ok(None) };
        let mut weights = vec![0f32; inputs.len()];
        for (_, w, _) in matrices {
            weights.iter_mut().zip(ops::absolute_maxima(w)).for_each(|(m, v)| *m = m.max(v));
        }
        let one = |(x, w): (&f32, &f32)| match *x > 0.0 && *w > 0.0 {
            true => (x.powf(self.alpha) / w.powf(1.0 - self.alpha)).clamp(1e-5, 1e5),
            false => 1.0,
        };
        Ok(Some(inputs.iter().zip(&weights).map(one).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outlying_input_and_its_column_meet_halfway() {
        let w = Tensor::from_vec(2, 3, vec![1.0, -1.0, 0.5, -0.5, 0.25, 1.0]);
        let stats = Stats { peak: Some(vec![100.0, 1.0, 0.0]), ..Stats::default() };
        let matrices = [(Site::of(0, model::Role::Up), w, Storage::F32)];
        let by = Smooth::default().balance(&stats, &matrices).unwrap().unwrap();
        // The input of 100 becomes 10, and so does the largest value of its column; an input that is never there stays.
        assert_eq!(by, [10.0, 1.0, 1.0]);
    }
}
