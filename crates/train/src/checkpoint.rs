//! Checkpoints: everything that a step depends on, in one safetensors file that appears whole or not at all.

use crate::{Error, Result};
use formats::{
    Dtype,
    safetensors::{self, Archive, View},
};
use model::Parameters;
use serde::{Serialize, de::DeserializeOwned};
use std::path::Path;

/// Numbers of a checkpoint: their name, their type, their bytes.
#[derive(Debug)]
pub struct Piece<B> {
    /// Unlike that of any other piece.
    pub name: String,
    /// What the bytes are.
    pub dtype: Dtype,
    /// The numbers.
    pub bytes: B,
}

/// Parameters under a name, to be saved.
pub fn pieces<'a>(set: &'a str, parameters: &'a Parameters) -> impl Iterator<Item = Piece<&'a [u8]>> {
    parameters.names().zip(parameters.slices()).map(move |(name, values)| Piece {
        name: tensor_name(set, name),
        dtype: Dtype::F32,
        bytes: bytemuck::cast_slice(values),
    })
}

/// The same to be read.
pub fn pieces_mut<'a>(set: &str, parameters: &'a mut Parameters) -> Vec<Piece<&'a mut [u8]>> {
    let names: Vec<String> = parameters.names().map(|name| tensor_name(set, name)).collect();
    let pieces = names.into_iter().zip(parameters.slices_mut()).map(|(name, values)| Piece {
        name,
        dtype: Dtype::F32,
        bytes: bytemuck::cast_slice_mut(values),
    });
    pieces.collect()
}

/// Writes pieces, and what else there is to know.
///
/// # Errors
/// If the file cannot be written.
pub fn write<'a>(path: &Path, pieces: impl Iterator<Item = Piece<&'a [u8]>>, about: &impl Serialize) -> Result<()> {
    let about = serde_json::to_string(about).map_err(|e| Error::Asked(e.to_string()))?;
    let pieces: Vec<Piece<&[u8]>> = pieces.collect();
    let views: Vec<View<'_>> = pieces
        .iter()
        .map(|p| View {
            name: &p.name,
            dtype: p.dtype,
            shape: vec![if p.dtype == Dtype::U8 { p.bytes.len() } else { p.bytes.len() / 4 }],
            bytes: p.bytes,
        })
        .collect();
    Ok(safetensors::write_views(path, &views, &[("about", about)])?)
}

/// Reads what [`write`] wrote, piece by piece.
///
/// # Errors
/// If the file is malformed, or of another model or optimizer.
pub fn read<T: DeserializeOwned>(path: &Path, pieces: Vec<Piece<&mut [u8]>>) -> Result<T> {
    let archive = Archive::open(path)?;
    let other = |field: &str, reason: String| {
        Error::File(formats::Error::field(path, field, format!("{reason}; give --restart to begin anew")))
    };
    for piece in pieces {
        let view = archive.get(&piece.name).filter(|v| v.dtype == piece.dtype && v.bytes.len() == piece.bytes.len());
        let view = view.ok_or_else(|| other(&piece.name, "is not what this model has there".into()))?;
        // Values are little-endian in the file and, on every machine that planish runs on, in memory.
        piece.bytes.copy_from_slice(&view.bytes);
    }
    let about = archive.metadata("about").ok_or_else(|| other("about", "is missing".into()))?;
    serde_json::from_str(about).map_err(|e| other("about", e.to_string()))
}

fn tensor_name(set: &str, (site, name): (model::Site, &str)) -> String {
    format!("{set} {site} {name}")
}
