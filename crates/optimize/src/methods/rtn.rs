//! Round to nearest: the baseline that every other quantizer must beat.

use super::{Method, Plan, Rewrite, at, options};
use crate::{Needs, Result, Stats};
use model::Site;
use serde::Deserialize;
use tensor::{Storage, Tensor, Weight};

/// The method.
pub static RTN: Method = Method {
    name: "rtn",
    about: "Rounds every weight to the nearest level of scales that fit its block best; needs no data.",
    paper: "the baseline of arXiv 2210.17323",
    cost: "seconds per billion weights, memory of one matrix",
    build: |o| Ok(Plan::EachMatrix(Box::new(options::<Rtn>("rtn", o)?))),
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rtn {}

impl Rewrite for Rtn {
    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, _: &Stats) -> Result<Weight> {
        Weight::encode(weight, storage, None).map_err(at(site))
    }
}
