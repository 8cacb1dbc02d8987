//! Steps of recipes that teach, and matrices that learn to be codes.

use crate::{fails, json, kill_again_and_again, path, planish, sample};
use std::{fs, path::Path, time::Instant};

/// Mean divergence from the original, of a result that has its proof.
fn divergence(said: &serde_json::Value) -> f64 {
    said["proof"]["after"]["against"]["kl_mean"].as_f64().unwrap_or_else(|| panic!("{said}"))
}

#[test]
fn codes_that_learn_say_more_than_codes_that_were_fitted() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    for storage in ["int2g32", "int3g64a"] {
        let made = |method: &str, words: &[&str]| {
            let out = path(&dir, &format!("{storage}-{method}"));
            let all = ["quantize", &folder, "--method", method, "--storage", storage, "--data", &text, "--out", &out];
            divergence(&json(&[&all[..], words].concat()))
        };
        let fitted = made("gptq", &[]);
        let learned = made("qat", &["--option", "steps=40", "--option", "lr=3e-4", "--option", "context=128"]);
        println!("{storage}: gptq {fitted}, qat {learned}");
        assert!(learned < 0.6 * fitted, "{storage}: {learned} and {fitted}");
    }
    let made = path(&dir, "int2g32-qat");
    assert!(json(&["inspect", &made])["bits_per_weight"].as_f64().unwrap() < 3.5);
    assert!(json(&["verify", &made])["faults"].as_array().unwrap().is_empty());

    // A text can be learned by codes as well.
    let out = path(&dir, "tuned");
    let words =
        ["finetune", &folder, "--data", &text, "--steps", "12", "--batch", "4", "--context", "128", "--out", &out];
    let done = json(&[&words[..], &["--quantize", "int4g32", "--override", "head=int8g32"]].concat());
    assert!(done["validation_loss"].as_f64() <= done["validation_loss_before"].as_f64(), "{done}");
    let measured = json(&["evaluate", &out, "--against", &folder, "--data", &text, "--documents", "20"]);
    assert!(measured["bits_per_weight"].as_f64().unwrap() < 8.0, "{measured}");

    let wrong = |words: &[&str], says: &str| {
        let out = path(&dir, "wrong");
        let all = ["quantize", &folder, "--method", "qat", "--data", &text, "--out", &out];
        fails(&[&all[..], words].concat(), 2, says);
        assert!(!Path::new(&out).exists());
    };
    wrong(&["--option", "step=40"], "unknown field `step`");
    wrong(&["--option", "steps"], "name = value");
    wrong(&["--option", "divergence='kl'"], "jensen-shannon");
    wrong(&["--option", "share=2"], "--share");
    wrong(&["--option", "context=100000"], "context 100000");
    let words = ["finetune", &folder, "--data", &text, "--out", &out, "--quantize", "int4g32", "--lora", "rank=2"];
    fails(&words, 2, "--lora");
}

#[test]
fn a_recipe_heals_before_it_quantizes_and_goes_on_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let taught = "batch = 4\ncontext = 128\nlr = 3e-4\ncheckpoint_every = 4\n";
    let recipe = |name: &str, steps: &str| {
        fs::write(path(&dir, name), format!("planish = 1\ncalibration_tokens = 4096\n{steps}")).unwrap();
        path(&dir, name)
    };
    let step = |method: &str, storage: &str, more: &str| {
        format!("[[step]]\nmethod = \"{method}\"\nstorage = \"{storage}\"\n{more}")
    };
    let both = format!(
        "{}{}{}",
        step("distill", "keep", &format!("steps = 12\n{taught}")),
        step("qat", "int3g32", &format!("steps = 12\n{taught}[step.sites]\nhead = \"keep\"\n")),
        step("gptq", "keep", "[step.sites]\nhead = \"int4g32\"\n"),
    );
    let good = recipe("good.toml", &both);
    let (whole, killed) = (path(&dir, "whole"), path(&dir, "killed"));
    let words = |out: &str| ["run", &good, "--model", &folder, "--data", &text, "--out", out].map(String::from);
    let begin = Instant::now();
    let said = planish().args(words(&whole)).arg("--json").output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let time = begin.elapsed();
    let said: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    assert!(divergence(&said) < 0.02, "{said}");
    let again = words(&killed);
    kill_again_and_again(&again.each_ref().map(String::as_str), 7, time);
    assert!(planish().args(words(&killed)).output().unwrap().status.success());
    for name in ["model.safetensors", "proof.json", "manifest.json", "planish.toml"] {
        let read = |d: &str| fs::read(Path::new(d).join(name)).unwrap();
        assert!(read(&whole) == read(&killed), "{name} differs");
    }
    assert!(!Path::new(&format!("{killed}.partial")).exists());

    let late =
        recipe("late.toml", &format!("{}{}", step("rtn", "int4g32", ""), step("distill", "keep", "steps = 2\n")));
    let out = path(&dir, "wrong");
    // What is codes already goes on learning as the codes that it is.
    let learned = path(&dir, "learned");
    json(&["run", &late, "--model", &folder, "--data", &text, "--out", &learned, "--force"]);
    assert!(json(&["inspect", &learned])["sites"].to_string().contains("\"storage\":\"int4"), "codes became floats");
    let typo = recipe("typo.toml", &step("distill", "keep", "stepps = 2\n"));
    fails(&["run", &typo, "--model", &folder, "--data", &text, "--out", &out], 2, "unknown field `stepps`");
}
