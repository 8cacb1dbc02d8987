//! Checkpoints: everything that a step depends on, in one safetensors file that appears whole or not at all.

use crate::{Error, Result};
use formats::{
    Dtype,
    safetensors::{self, Archive, View},
};
use model::Parameters;
use serde::{Serialize, de::DeserializeOwned};
use std::path::Path;

/// Writes sets of parameters, each under a name, and what else there is to know.
///
/// # Errors
/// If the file cannot be written.
pub fn write(path: &Path, sets: &[(&str, &Parameters)], about: &impl Serialize) -> Result<()> {
    let about = serde_json::to_string(about).map_err(|e| Error::Asked(e.to_string()))?;
    let names: Vec<String> = sets.iter().flat_map(|(set, p)| p.names().map(|n| tensor_name(set, n))).collect();
    let slices = sets.iter().flat_map(|(_, p)| p.slices());
    let views: Vec<View<'_>> = names
        .iter()
        .zip(slices)
        .map(|(name, values)| View {
            name,
            dtype: Dtype::F32,
            shape: vec![values.len()],
            bytes: bytemuck::cast_slice(values),
        })
        .collect();
    Ok(safetensors::write_views(path, &views, &[("about", about)])?)
}

/// Reads what [`write`] wrote of a model of the same shape.
///
/// # Errors
/// If the file is malformed, or of another model.
pub fn read<T: DeserializeOwned>(path: &Path, sets: &mut [(&str, &mut Parameters)]) -> Result<T> {
    let archive = Archive::open(path)?;
    let other = |field: &str, reason: String| {
        Error::File(formats::Error::field(path, field, format!("{reason}; give --restart to begin anew")))
    };
    for (set, parameters) in sets {
        let names: Vec<String> = parameters.names().map(|n| tensor_name(set, n)).collect();
        for (name, values) in names.iter().zip(parameters.slices_mut()) {
            let view = archive.get(name).filter(|v| v.dtype == Dtype::F32 && v.bytes.len() == 4 * values.len());
            let view = view.ok_or_else(|| other(name, "is not what this model has there".into()))?;
            for (value, bytes) in values.iter_mut().zip(view.bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
    }
    let about = archive.metadata("about").ok_or_else(|| other("about", "is missing".into()))?;
    serde_json::from_str(about).map_err(|e| other("about", e.to_string()))
}

fn tensor_name(set: &str, (site, name): (model::Site, &str)) -> String {
    format!("{set} {site} {name}")
}
