//! Files of other quantizers: written, read, looked at and repaired.

use crate::{fails, json, kill_again_and_again, path, run, sample};
use formats::safetensors::{self, Archive, Entry};
use std::{fs, path::Path};

/// The sample, quantized with some words.
fn quantized(dir: &tempfile::TempDir, name: &str, words: &[&str]) -> String {
    let (folder, text) = sample(dir);
    let out = path(dir, name);
    json(&[&["quantize", &folder, "--method", "rtn", "--data", &text, "--out", &out], words].concat());
    out
}

fn kl(dir: &tempfile::TempDir, model: &str) -> f64 {
    let (folder, text) = sample(dir);
    let scored = json(&["evaluate", model, "--against", &folder, "--data", &text, "--documents", "60"]);
    scored["against"]["kl_mean"].as_f64().unwrap()
}

fn storage(model: &str, site: &str) -> String {
    let seen = json(&["inspect", model]);
    let sites = seen["sites"].as_array().unwrap();
    sites.iter().find(|s| s["site"] == site).unwrap()["storage"].as_str().unwrap().to_string()
}

#[test]
fn every_format_holds_what_was_chosen_and_reads_back_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let own = kl(&dir, &quantized(&dir, "own", &["--storage", "int4g32", "--override", "embed=keep"]));
    for (format, config) in [
        ("compressed-tensors", "pack-quantized"),
        ("gptq", "\"checkpoint_format\": \"gptq\""),
        ("awq", "\"version\": \"gemm\""),
    ] {
        let out = quantized(&dir, format, &["--bits", "4", "--group", "32", "--format", format]);
        assert_eq!(
            (storage(&out, "1.down").as_str(), storage(&out, "embed").as_str()),
            ("int4g32", "bf16"),
            "{format}"
        );
        assert!(fs::read_to_string(Path::new(&out).join("config.json")).unwrap().contains(config), "{format}");
        assert_eq!(kl(&dir, &out), own, "{format}: the same codes in another file are the same model");
        assert!(json(&["verify", &out])["faults"].as_array().unwrap().is_empty());
        let said = run(&["generate", &out, "--prompt", "Once", "--tokens", "8"]);
        assert!(said.status.success() && !said.stdout.is_empty(), "{format}");
    }
    // The recipe says for whom, so it replays to the same bytes.
    let (folder, text) = sample(&dir);
    let (gptq, again) = (path(&dir, "gptq"), path(&dir, "again"));
    json(&["run", &format!("{gptq}/planish.toml"), "--model", &folder, "--data", &text, "--out", &again]);
    let bytes = |d: &str| fs::read(Path::new(d).join("model.safetensors")).unwrap();
    assert!(bytes(&gptq) == bytes(&again));
    // From one format to another nothing is rounded again.
    let moved = path(&dir, "moved");
    json(&["export", &gptq, "--to", "compressed-tensors", "--out", &moved]);
    assert_eq!(kl(&dir, &moved), own);
}

#[test]
fn inputs_are_rounded_as_asked_and_the_file_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let format = ["--format", "compressed-tensors"];
    let made = |name: &str, words: &[&str]| quantized(&dir, name, &[&format, words].concat());
    for (activations, storage) in
        [("int8", "int8"), ("int8-static", "int8"), ("fp8", "fp8_e4m3"), ("fp8-static", "fp8_e4m3")]
    {
        let plain = kl(&dir, &made(&format!("{activations} weights"), &["--storage", storage]));
        let out = made(activations, &["--storage", storage, "--activations", activations]);
        let rounded = kl(&dir, &out);
        assert!(rounded > plain && rounded < 0.05, "{activations}: {rounded} where weights alone cost {plain}");
        let config = fs::read_to_string(Path::new(&out).join("config.json")).unwrap();
        let strategy = if activations.ends_with("static") { "\"tensor\"" } else { "\"token\"" };
        assert!(config.contains(strategy), "{activations}: {config}");
        // Written once more it is the same model.
        let again = path(&dir, &format!("{activations} again"));
        json(&["export", &out, "--to", "compressed-tensors", "--out", &again]);
        assert_eq!(kl(&dir, &again), rounded, "{activations}");
    }
    let (folder, text) = sample(&dir);
    let all = ["quantize", &folder, "--data", &text, "--out", "x", "--bits", "4", "--activations", "int8"];
    fails(&[&all[..], &format].concat(), 2, "no matrix is");
}

#[test]
fn what_a_format_cannot_hold_is_said_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let out = path(&dir, "out");
    let refused = |words: &[&str], says: &str| {
        let all = [&["quantize", &folder, "--data", &text, "--out", &out], words].concat();
        fails(&all, 2, says);
        assert!(!Path::new(&out).exists());
    };
    refused(&["--format", "exl3"], "no format is called");
    refused(&["--format", "awq", "--bits", "3"], "AWQ's files hold 4 bits");
    refused(&["--format", "gptq", "--storage", "nf4"], "nf4");
    refused(&["--format", "awq", "--override", "embed=int4g32"], "keeps what is looked up");
    refused(&["--activations", "int8"], "only compressed-tensors");
    refused(&["--bits", "9"], "bits are 2 to 8");
    refused(&["--storage", "q4_k_x"], "no storage is called");
    refused(&["--override", "down: 9 bits"], "no storage of so many bits");
    refused(&["--bits", "4.5", "--skip", "head"], "an average");
}

#[test]
fn a_preview_shows_mixtures_overrides_and_skips_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, _) = sample(&dir);
    let becomes = |words: &[&str], site: &str| {
        let shown = json(&[&["quantize", &folder, "--dry-run"], words].concat());
        let sites = shown["sites"].as_array().unwrap();
        sites.iter().find(|s| s["site"] == site).unwrap()["becomes"].as_str().unwrap().to_string()
    };
    let words = ["--bits", "4", "--override", "layers 0: 6 bits", "--override", "down=q8_0", "--skip", "0.q"];
    assert_eq!(becomes(&words, "0.k"), "int6g32");
    // A role is narrower than a block, and a site than either.
    assert_eq!(becomes(&words, "0.down"), "q8_0");
    assert_eq!(becomes(&words, "0.q"), "bf16");
    assert_eq!(becomes(&words, "1.k"), "int4g32");
    // Rows of 128 do not divide into blocks of 256; llama.cpp falls back alike.
    assert_eq!(becomes(&["--storage", "q4_k_m"], "0.q"), "q5_0");
    let size = json(&["quantize", &folder, "--dry-run", "--storage", "q8_0"]);
    assert!((8.4..8.6).contains(&size["bits_per_weight"].as_f64().unwrap()));
}

#[test]
fn a_method_that_changes_norms_is_closer_than_rounding_and_ends_in_the_same_bytes_after_kills() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let words = |method: &'static str, out: &str| {
        let words = ["quantize", &folder, "--method", method, "--storage", "int3g32", "--skip", "embed"];
        words.into_iter().chain(["--data", &text, "--out", out]).map(String::from).collect::<Vec<_>>()
    };
    let run = |method: &'static str, name: &str| {
        let out = path(&dir, name);
        let all = words(method, &out);
        json(&all.iter().map(String::as_str).collect::<Vec<_>>());
        out
    };
    let begin = std::time::Instant::now();
    let (awq, rtn) = (run("awq", "awq"), run("rtn", "rounded"));
    let took = begin.elapsed();
    assert!(kl(&dir, &awq) < kl(&dir, &rtn));
    let killed = path(&dir, "killed");
    let all = words("awq", &killed);
    kill_again_and_again(&all.iter().map(String::as_str).collect::<Vec<_>>(), 4, took);
    run("awq", "killed");
    let bytes = |d: &str| fs::read(Path::new(d).join("model.safetensors")).unwrap();
    assert!(bytes(&awq) == bytes(&killed));
}

#[test]
fn an_average_is_met_from_below() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let out = path(&dir, "average");
    let done = json(&["quantize", &folder, "--bits", "5.25", "--data", &text, "--out", &out]);
    let bits = done["proof"]["after"]["bits_per_weight"].as_f64().unwrap();
    assert!((5.1..=5.25).contains(&bits), "{bits}");
}

#[test]
fn an_audit_names_what_is_wrong_and_repairs_only_that() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let good = quantized(&dir, "good", &["--bits", "4", "--group", "32", "--format", "gptq"]);
    let clean = json(&["audit", &good, "--against", &folder, "--data", &text]);
    let kl = |audit: &serde_json::Value| audit["against"]["kl_mean"].as_f64().unwrap();
    assert!(kl(&clean["audit"]) > 0.0);
    // One matrix loses its scales, another its order.
    let spoiled = path(&dir, "spoiled");
    fs::create_dir(&spoiled).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        let from = Path::new(&good).join(name);
        if from.is_file() {
            fs::copy(from, Path::new(&spoiled).join(name)).unwrap();
        }
    }
    let archive = Archive::open(Path::new(&good)).unwrap();
    let entries: Vec<Entry> = archive
        .tensors()
        .iter()
        .map(|(name, t)| {
            let mut bytes = t.bytes.to_vec();
            match name.as_str() {
                "model.layers.1.mlp.up_proj.scales" => bytes.fill(0),
                "model.layers.0.self_attn.o_proj.qweight" => bytes.reverse(),
                _ => {}
            }
            Entry { name: name.clone(), dtype: t.dtype, shape: t.shape.clone(), bytes: tensor::Bytes::from_vec(bytes) }
        })
        .collect();
    safetensors::write(&Path::new(&spoiled).join("model.safetensors"), &entries, &[]).unwrap();
    fails(&["audit", &spoiled], 1, "");
    let repaired = path(&dir, "repaired");
    let words = ["audit", &spoiled, "--against", &folder, "--data", &text, "--repair", &repaired, "--json"];
    let out = run(&words);
    assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
    let found: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let matrices = found["audit"]["matrices"].as_array().unwrap();
    let bad: Vec<&str> = matrices
        .iter()
        .filter(|m| !m["faults"].as_array().unwrap().is_empty())
        .map(|m| m["site"].as_str().unwrap())
        .collect();
    assert_eq!(bad, ["0.o", "1.up"]);
    assert!(kl(&found["audit"]) > 5.0 * kl(&clean["audit"]));
    // Rounding is deterministic: what was made anew is what was there before.
    assert_eq!(kl(&found["repaired"]["audit"]), kl(&clean["audit"]));
    let archive = |d: &str| Archive::open(Path::new(d)).unwrap();
    let (before, after) = (archive(&good), archive(&repaired));
    for (name, t) in before.tensors().iter().filter(|(n, _)| n.contains("_proj")) {
        assert!(t.bytes[..] == after.get(name).unwrap().bytes[..], "{name}");
    }
    fails(&["audit", &good, "--against", "nowhere"], 2, "nowhere");
}
