//! References: logits that other programs computed, beside the models that they are of; and what tests of gradients share.
#![allow(clippy::unwrap_used, dead_code)]

use model::{Model, Parameters};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tensor::{Linear, Weight};

/// Tokens, and what the reference says of them.
pub struct Sequence {
    pub tokens: Vec<u32>,
    pub logits: Vec<f32>,
    /// What greedy decoding says next, where the reference tells.
    pub greedy: Vec<u32>,
}

/// The folders of the golden models.
pub fn directories() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let mut all: Vec<PathBuf> =
        root.read_dir().unwrap().map(|e| e.unwrap().path()).filter(|p| p.join("config.json").is_file()).collect();
    all.sort();
    assert!(all.len() > 40, "{} golden models", all.len());
    all
}

/// A model with these values, as plain floats: the exact path.
pub fn with_values(model: &Model, values: &Parameters) -> Model {
    let mut exact = model.clone();
    for (site, matrix) in &values.matrices {
        let bias = values.biases.get(site).cloned();
        exact.linears.insert(*site, Linear::with_bias(Weight::from_tensor(matrix.clone()), bias));
    }
    values.give_vectors(&mut exact);
    exact
}

pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Reads `reference.json` of a folder.
pub fn reference(dir: &Path) -> Vec<Sequence> {
    let text = fs::read_to_string(dir.join("reference.json")).unwrap();
    let root: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids = |v: &serde_json::Value| -> Vec<u32> {
        v.as_array().into_iter().flatten().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let one = |s: &serde_json::Value| Sequence {
        tokens: ids(&s["tokens"]),
        logits: floats(s["logits"].as_str().unwrap()),
        greedy: ids(&s["greedy"]),
    };
    root["sequences"].as_array().unwrap().iter().map(one).collect()
}

/// Little-endian floats in base64.
fn floats(text: &str) -> Vec<f32> {
    let digit = |b: u8| match b {
        b'A'..=b'Z' => b - b'A',
        b'a'..=b'z' => b - b'a' + 26,
        b'0'..=b'9' => b - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b'=').map(digit).collect();
    let bytes: Vec<u8> = digits
        .chunks(4)
        .flat_map(|c| {
            let word = c.iter().enumerate().fold(0u32, |w, (i, d)| w | u32::from(*d) << (18 - 6 * i));
            word.to_be_bytes()[1..c.len()].to_vec()
        })
        .collect();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// The largest difference of a logit.
pub fn largest_error(model: &Model, sequences: &[Sequence]) -> f32 {
    errors(model, sequences).into_iter().fold(0.0, |m, e| m.max(e.abs()))
}

/// The root of the mean squared difference of logits.
pub fn mean_error(model: &Model, sequences: &[Sequence]) -> f32 {
    let errors = errors(model, sequences);
    (errors.iter().map(|e| e * e).sum::<f32>() / errors.len() as f32).sqrt()
}

fn errors(model: &Model, sequences: &[Sequence]) -> Vec<f32> {
    let tokens: Vec<&[u32]> = sequences.iter().map(|s| &s.tokens[..]).collect();
    let got = model.forward(&tokens, &mut ()).unwrap();
    let want: Vec<f32> = sequences.iter().flat_map(|s| s.logits.iter().copied()).collect();
    assert_eq!(got.as_slice().len(), want.len());
    got.as_slice().iter().zip(&want).map(|(a, b)| a - b).collect()
}
