//! Every family and every switch against the logits of transformers, and through planish's own files and back.
//!
//! With PLANISH_KEEP_GGUF=DIR the GGUF files stay in DIR, to be held against llama.cpp.
#![allow(clippy::unwrap_used, clippy::panic)]

mod shared;

use model::{Cache, Model, Runner, Wanted, load, save};
use shared::{Sequence, largest_error, reference};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tensor::ops;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn greedy(model: &Model, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut cache = [Cache::new(model)];
    let mut runner = Runner::new(model);
    let mut logits = runner.step(&[prompt], &mut cache, Wanted::Last).unwrap();
    let mut out = Vec::new();
    for _ in 0..count {
        let next = ops::argmax(logits.row(0)) as u32;
        out.push(next);
        logits = runner.step(&[[next]], &mut cache, Wanted::Last).unwrap();
    }
    out
}

#[test]
fn every_reference_is_met() {
    let mut dirs: Vec<PathBuf> =
        fs::read_dir(root()).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    dirs.sort();
    assert!(dirs.len() >= 30);
    let mut faults = Vec::new();
    for dir in &dirs {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let opened = match load::open(dir) {
            Ok(opened) => opened,
            Err(e) => {
                faults.push(format!("{name}: {e}"));
                continue;
            }
        };
        let sequences = reference(dir);
        let error = largest_error(&opened.model, &sequences);
        println!("{name}: largest error {error:.1e}");
        if error > 1e-4 || !opened.unused.is_empty() {
            faults.push(format!("{name}: largest error {error:.1e}, unused tensors {:?}", opened.unused));
        }
        for s in &sequences {
            let got = greedy(&opened.model, &s.tokens, s.greedy.len());
            if got != s.greedy {
                faults.push(format!("{name}: greedy {got:?} where transformers says {:?}", s.greedy));
            }
        }
        faults.extend(round_trips(&name, &opened.model, &sequences));
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

/// Saving and reading again, as a directory and as GGUF, changes no logit.
fn round_trips(name: &str, model: &Model, sequences: &[Sequence]) -> Vec<String> {
    let mut faults = Vec::new();
    let dir = tempfile::tempdir().unwrap();
    save::directory(model, dir.path()).unwrap();
    let again = load::open(dir.path()).unwrap().model;
    let tokens: Vec<&[u32]> = sequences.iter().map(|s| &s.tokens[..]).collect();
    let logits = |m: &Model, tokens: &[&[u32]]| m.forward(tokens, &mut ()).unwrap();
    if logits(&again, &tokens) != logits(model, &tokens) {
        faults.push(format!("{name}: the saved directory computes something else"));
    }
    // A GGUF promises no more than its context: what lies beyond may be scaled in ways that GGUF cannot tell.
    let tokens: Vec<&[u32]> = tokens.iter().map(|t| &t[..t.len().min(model.spec.context)]).collect();
    let want = logits(model, &tokens);
    let keep = std::env::var_os("PLANISH_KEEP_GGUF").map(PathBuf::from);
    let path = keep.map_or_else(|| dir.path().join("model.gguf"), |kept| kept.join(format!("{name}.gguf")));
    match save::gguf(model, None, &path, &|_| tensor::Storage::F32) {
        Ok(fallbacks) => {
            assert!(fallbacks.is_empty());
            let again = load::open(&path).unwrap_or_else(|e| panic!("{name}: {e}")).model;
            let got = logits(&again, &tokens);
            let error = got.as_slice().iter().zip(want.as_slice()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // llama.cpp computes GPT-NeoX with the tanh form of gelu, and so does what is read from its file.
            let exact = model.spec.activation != ops::Activation::Gelu;
            if error > if exact { 1e-5 } else { 3e-3 } {
                faults.push(format!("{name}: the GGUF computes something else: {error:.1e}"));
            }
        }
        Err(e) => println!("{name}: no GGUF: {e}"),
    }
    faults
}
