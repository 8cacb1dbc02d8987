//! Inputs of products that the engine of a result rounds to eight bits beside weights of eight (W8A8): what a recipe asks
//! becomes a part of the model, is written with it, and is measured in its proof.

use crate::{Error, Needs, Result, calibrate::reader, progress::Progress, walk};
use formats::quantized::Format;
use model::{Model, Site};
use tensor::{
    Eight, Rounding, Storage,
    grid::{Grid, Table},
};

/// How inputs are to be rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activations {
    to: Eight,
    /// By one scale for all tokens, which the calibration data tells; otherwise each token has its own.
    fixed: bool,
}

impl Activations {
    /// Reads `--activations`.
    ///
    /// # Errors
    /// If there is no such rounding, or the format does not tell its readers.
    pub fn parse(name: &str, format: Option<Format>) -> Result<Activations> {
        let (to, fixed) = match name {
            "int8" => (Eight::Int, false),
            "int8-static" => (Eight::Int, true),
            "fp8" => (Eight::Float, false),
            "fp8-static" => (Eight::Float, true),
            other => {
                return Err(Error::Asked(format!(
                    "--activations takes int8 or fp8 (a scale per token), int8-static or fp8-static (one per tensor), not \
                     {other:?}"
                )));
            }
        };
        if format != Some(Format::CompressedTensors) {
            let reason = "only compressed-tensors tells its readers to round activations: give --format compressed-tensors. \
                          Planish itself and llama.cpp round them as they run, whatever the file says";
            return Err(Error::Asked(reason.into()));
        }
        Ok(Activations { to, fixed })
    }

    /// Has the model round the inputs of its matrices of eight bits.
    ///
    /// # Errors
    /// If no matrix is of that kind, or one scale is asked for and there is no data to take it from.
    pub fn round(self, model: &mut Model, calibration: &[Vec<u32>], progress: &dyn Progress) -> Result<()> {
        let eight = |storage: Storage| match self.to {
            Eight::Int => matches!(storage, Storage::Grid(Grid::Int { bits: 8, .. })),
            Eight::Float => matches!(storage, Storage::Grid(Grid::Levels { table: Table::E4m3, .. })),
        };
        let sites: Vec<Site> =
            model.linears.iter().filter(|(_, l)| eight(l.weight.storage())).map(|(site, _)| *site).collect();
        if sites.is_empty() {
            let (name, storage) = if self.to == Eight::Int { ("int8", "int8") } else { ("fp8", "fp8_e4m3") };
            return Err(Error::Asked(format!(
                "--activations {name} rounds inputs beside weights of that kind, and no matrix is; give --storage {storage}"
            )));
        }
        let peaks = match self.fixed {
            false => Default::default(),
            true => walk::statistics(model, Needs { peak: true, ..Needs::default() }, calibration, progress)?,
        };
        for site in sites {
            let scale = match self.fixed {
                false => None,
                true => {
                    let peak = peaks.get(&reader(site)).and_then(|stats| stats.peak.as_ref());
                    let largest = peak.map_or(0.0, |p| p.iter().fold(0f32, |m, x| m.max(*x)));
                    if largest <= 0.0 {
                        let reason = "no calibration data reached it, and one scale for its inputs comes from data: give \
                                      --data FILE";
                        return Err(Error::Site { site, reason: reason.into() });
                    }
                    Some(self.to.scale(largest))
                }
            };
            if let Some(linear) = model.linears.get_mut(&site) {
                linear.rounding = Some(Rounding { to: self.to, scale, block: 0 });
            }
        }
        Ok(())
    }
}
