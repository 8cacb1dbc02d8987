//! Methods that rewrite the matrices of a block together, and what goes before those that round.

use crate::{fails, json, kill_again_and_again, path, planish, sample};
use std::{fs, path::Path, time::Instant};

#[test]
fn autoround_beats_rounding_on_any_number_of_threads_and_after_kills() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let words = |method: &str, out: &str| {
        let out = path(&dir, out);
        let all = ["quantize", &folder, "--method", method, "--storage", "int3g32", "--data", &text, "--out", &out];
        [&all[..], &["--calibration-tokens", "8192"]].concat().into_iter().map(String::from).collect::<Vec<_>>()
    };
    let learns = ["--option", "steps=30", "--option", "batch=4"].map(String::from);
    let divergence = |words: &[String]| {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        json(&words)["proof"]["after"]["against"]["kl_mean"].as_f64().unwrap()
    };
    let rounded = divergence(&words("rtn", "rtn"));
    let begin = Instant::now();
    let learned = divergence(&[words("autoround", "whole"), learns.to_vec()].concat());
    let time = begin.elapsed();
    println!("rtn {rounded}, autoround {learned}");
    assert!(learned < 0.8 * rounded, "{learned} and {rounded}");

    let one = [words("autoround", "one"), learns.to_vec(), ["--threads", "1"].map(String::from).to_vec()].concat();
    assert!(planish().args(one).output().unwrap().status.success());
    let again = [words("autoround", "killed"), learns.to_vec()].concat();
    kill_again_and_again(&again.iter().map(String::as_str).collect::<Vec<_>>(), 5, time);
    assert!(planish().args(again).output().unwrap().status.success());
    for other in ["one", "killed"] {
        for name in ["model.safetensors", "proof.json", "manifest.json", "planish.toml"] {
            let read = |out: &str| fs::read(Path::new(&path(&dir, out)).join(name)).unwrap();
            assert!(read("whole") == read(other), "{name} of {other} differs");
        }
    }
    assert!(!Path::new(&path(&dir, "killed.partial")).exists());

    let wrong = |option: &str, says: &str| {
        let words = [words("autoround", "wrong"), ["--option", option].map(String::from).to_vec()].concat();
        fails(&words.iter().map(String::as_str).collect::<Vec<_>>(), 2, says);
        assert!(!Path::new(&path(&dir, "wrong")).exists());
    };
    wrong("step=30", "unknown field `step`");
    wrong("steps=0", "at least 1");
    wrong("lr=2", "`lr`");
    wrong("start='best'", "unknown variant `best`");
}

#[test]
fn a_rotation_before_rounding_ends_in_the_same_bytes_after_kills_and_in_any_format() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let words = |method: &str, storage: &str, out: &str| {
        let out = path(&dir, out);
        let all = ["quantize", &folder, "--method", method, "--storage", storage, "--data", &text, "--out", &out];
        [&all[..], &["--calibration-tokens", "8192"]].concat().into_iter().map(String::from).collect::<Vec<_>>()
    };
    let run = |words: &[String]| json(&words.iter().map(String::as_str).collect::<Vec<_>>())["proof"].clone();
    let divergence = |proof: &serde_json::Value| proof["after"]["against"]["kl_mean"].as_f64().unwrap();

    // Turned alone it is the same model: what eight bits lose is all.
    let begin = Instant::now();
    let whole = run(&words("rotate,smoothquant,gptq", "int8g32", "whole"));
    let time = begin.elapsed();
    assert!(divergence(&whole) < 1e-3, "{}", divergence(&whole));
    let one = [words("rotate,smoothquant,gptq", "int8g32", "one"), ["--threads", "1"].map(String::from).to_vec()];
    run(&one.concat());
    let again = words("rotate,smoothquant,gptq", "int8g32", "killed");
    kill_again_and_again(&again.iter().map(String::as_str).collect::<Vec<_>>(), 5, time);
    run(&again);
    for other in ["one", "killed"] {
        for name in ["model.safetensors", "proof.json", "manifest.json", "planish.toml"] {
            let read = |out: &str| fs::read(Path::new(&path(&dir, out)).join(name)).unwrap();
            assert!(read("whole") == read(other), "{name} of {other} differs");
        }
    }
    let turned = run(&words("rotate,rtn", "int8g32", "turned"));
    let kept = run(&words("rtn", "int8g32", "kept"));
    assert!(divergence(&turned) < 2.0 * divergence(&kept));
    let bytes = |out: &str| fs::read(Path::new(&path(&dir, out)).join("model.safetensors")).unwrap();
    assert!(bytes("turned") != bytes("kept"));
    let gguf = run(&words("rotate,gptq", "q8_0", "turned.gguf"));
    assert!(divergence(&gguf) < 1e-3, "{}", divergence(&gguf));
    let values =
        [words("rotate,rtn", "int8g32", "values"), ["--option", "rotate.residual=false"].map(String::from).to_vec()];
    run(&values.concat());
    assert!(bytes("values") != bytes("turned") && bytes("values") != bytes("kept"));

    let wrong = |method: &str, more: &[&str], says: &str| {
        let words = words(method, "int4g32", "wrong");
        fails(&[words.iter().map(String::as_str).collect::<Vec<_>>(), more.to_vec()].concat(), 2, says);
        assert!(!Path::new(&path(&dir, "wrong")).exists());
    };
    wrong("rotate", &[], "--method rotate,gptq");
    wrong("gptq,rtn", &[], "comes last");
    wrong("rotate,gptq", &["--option", "rotate.all=true"], "unknown field `all`");
    wrong("rotate,gptq", &["--option", "rotate=1"], "rotate.NAME=VALUE");
    wrong("rotates,gptq", &[], "no method is called");
}
