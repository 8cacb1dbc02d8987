//! `planish verify`.

use super::print_json;
use crate::{
    args::{Artefact, Common},
    exit,
};
use anyhow::Result;
use optimize::manifest;
use serde_json::json;

/// Checks an artefact against its manifest.
pub fn run(args: &Artefact, common: &Common) -> Result<u8> {
    let (manifest, faults) = manifest::verify(&args.artefact)?;
    if common.json {
        print_json(&json!({"files": manifest.outputs.len(), "faults": faults, "gate": manifest.gate}))?;
    } else if faults.is_empty() {
        sayln!(
            "{} files are as planish {} wrote them; gate: {}",
            manifest.outputs.len(),
            manifest.planish,
            manifest.gate
        );
    } else {
        faults.iter().for_each(|f| sayln!("{f}"));
    }
    Ok(if faults.is_empty() { 0 } else { exit::USAGE })
}
