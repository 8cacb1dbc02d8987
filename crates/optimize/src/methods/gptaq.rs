//! GPTAQ (arXiv 2504.02692), asymmetric calibration: each matrix is to give on the inputs that the changed model really
//! sees what the original gives on its own, so that errors do not pile up from block to block. The matrix that does so best
//! is found in one solve; GPTQ rounds that one.

use super::{Method, Plan, gptq::Gptq};
use crate::{Error, Result};

/// The method.
pub static GPTAQ: Method = Method {
    name: "gptaq",
    about: "As gptq, and each matrix makes up for the errors of those before it: the original runs beside the model.",
    paper: "arXiv 2504.02692",
    cost: "two passes over the calibration data and 2 inputs^3 operations per matrix",
    build: |o| Ok(Plan::EachMatrix(Box::new(read(o)?))),
};

pub(super) fn read(mut options: toml::Table) -> Result<Gptq> {
    let asymmetry = match options.remove("asymmetry") {
        None => 1.0,
        Some(value) => {
            value.as_float().or(value.as_integer().map(|i| i as f64)).filter(|x| (0.0..=1.0).contains(x)).ok_or_else(
                || Error::Options {
                    method: "gptaq".into(),
                    reason: "`asymmetry` is a number from 0 (gptq) to 1".into(),
                },
            )?
        }
    };
    let mut gptq = Gptq::read("gptaq", options)?;
    gptq.asymmetry = asymmetry;
    Ok(gptq)
}
