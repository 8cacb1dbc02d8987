//! The real models of `../shared/data` against what transformers computed for them.
#![allow(clippy::unwrap_used, clippy::panic)]

use formats::tokenizer::Tokenizer;
use model::{Gpt, Sampling, generate, generate::Limits};
use serde_json::Value;
use std::path::PathBuf;
use tensor::ops;

fn data() -> Option<PathBuf> {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let root = std::env::var_os("PLANISH_DATA").map_or(beside, PathBuf::from);
    if !root.is_dir() {
        told("skipped: needs ../shared/data");
        return None;
    }
    Some(root)
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn prompts_logits_and_greedy_ids_are_those_of_transformers() {
    let Some(root) = data() else { return };
    for name in ["stories260K-hf", "babyllama105-hf", "tinygpt-shakespeare-hf", "mix7m-hf"] {
        let dir = root.join("models").join(name);
        let gpt = Gpt::open(&dir).unwrap();
        let r: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("reference.json")).unwrap()).unwrap();
        let prompt = gpt.tokenizer.encode(r["prompt"].as_str().unwrap(), true).unwrap();
        assert_eq!(prompt, ids(&r["input_ids"]), "{name}");
        let logits = gpt.model.forward(&[&prompt], &mut ()).unwrap();
        let last = logits.row(prompt.len() - 1);
        for (a, b) in last.iter().zip(r["last_logits"].as_array().unwrap()) {
            assert!((f64::from(*a) - b.as_f64().unwrap()).abs() < 1e-3, "{name}: {a} {b}");
        }
        let limits = Limits { tokens: 64, ignore_end: true, ..Limits::default() };
        let out = generate::generate(&gpt, &prompt, &Sampling::default(), &limits, &mut |_| true).unwrap();
        assert_eq!(out.ids, ids(&r["greedy_ids"])[prompt.len()..], "{name}");
    }
}

fn nll(gpt: &Gpt, ids: &[u32]) -> f64 {
    let logits = gpt.model.forward(&[ids], &mut ()).unwrap();
    let total: f64 = (1..ids.len()).map(|i| -ops::log_prob(logits.row(i - 1), ids[i] as usize)).sum();
    total / (ids.len() - 1) as f64
}

fn texts(root: &std::path::Path, name: &str) -> Vec<String> {
    let read = |p: &str| std::fs::read_to_string(root.join(p)).unwrap();
    if name.starts_with("tinygpt") {
        let text: Vec<char> = read("text/tinyshakespeare/input.txt").chars().collect();
        return text[text.len() - 12_000..].chunks(96).take(100).map(|c| c.iter().collect()).collect();
    }
    let text = read("text/tinystories/tinystories_sample.txt");
    text.split("<|endoftext|>").map(|t| t.trim().to_string()).skip(1).take(100).collect()
}

#[test]
fn the_loss_of_every_document_is_that_of_transformers() {
    let Some(root) = data() else { return };
    for name in ["stories260K-hf", "babyllama105-hf", "tinygpt-shakespeare-hf"] {
        let dir = root.join("models").join(name);
        let gpt = Gpt::open(&dir).unwrap();
        let r: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("reference.json")).unwrap()).unwrap();
        let per_doc = r["eval"]["per_doc"].as_array().unwrap();
        for (i, (text, want)) in texts(&root, name).iter().zip(per_doc).enumerate() {
            let ids = encode(&gpt.tokenizer, text, gpt.model.spec.context);
            assert_eq!(ids.len() as u64 - 1, want[0].as_u64().unwrap(), "{name} document {i}");
            let (got, want) = (nll(&gpt, &ids), want[1].as_f64().unwrap());
            assert!((got - want).abs() < 1e-4, "{name} document {i}: {got} {want}");
        }
    }
}

fn encode(tokenizer: &Tokenizer, text: &str, context: usize) -> Vec<u32> {
    let mut ids = tokenizer.encode(text, true).unwrap();
    ids.truncate(context);
    ids
}

/// Says so past the test harness, which keeps what a passing test prints to itself.
fn told(words: &str) {
    use std::io::Write;
    // A closed standard error is no reason to fail a test.
    let _ = writeln!(std::io::stderr(), "{words}");
}
