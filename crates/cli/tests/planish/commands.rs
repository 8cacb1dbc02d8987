//! What makes models smaller, proves it and runs them.

use crate::{fails, json, path, planish, run, sample};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

fn kl(dir: &tempfile::TempDir, artefact: &str) -> f64 {
    let (folder, text) = sample(dir);
    json(&["evaluate", artefact, "--against", &folder, "--data", &text])["against"]["kl_mean"].as_f64().unwrap()
}

/// A launcher's processes would all do the same job and write over each other.
#[cfg(not(feature = "mpi"))]
#[test]
fn without_mpi_a_rank_says_how_to_build_it() {
    let of_two = |words: &[&str], says: &str| {
        let out = planish().args(words).env("PMI_RANK", "0").env("PMI_SIZE", "2").output().unwrap();
        let errors = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{errors}");
        assert!(errors.contains(says), "{errors}");
    };
    of_two(&["evaluate"], "--features mpi");
    of_two(&["inspect"], "without mpirun");
}

#[test]
fn the_first_command_of_the_readme_makes_a_proven_smaller_model() {
    let dir = tempfile::tempdir().unwrap();
    let out = path(&dir, "small");
    let done = json(&["optimize", "--out", &out]);
    let (proof, after) = (&done["proof"], &done["proof"]["after"]);
    assert_eq!(proof["gate"]["result"], "passed");
    let share = after["size_bytes"].as_f64().unwrap() / (2.0 * after["parameters"].as_f64().unwrap());
    assert!(share <= 0.30 && share > 0.25, "{share}");
    assert!(after["against"]["perplexity_ratio"].as_f64().unwrap() < 1.02);
    assert!(proof["before"]["nll"].as_f64().unwrap() > proof["entropy_nats_per_token"].as_f64().unwrap());
    for name in [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "planish.toml",
        "manifest.json",
        "proof.json",
        "report.html",
    ] {
        assert!(Path::new(&out).join(name).is_file(), "{name}");
    }
    let report = fs::read_to_string(Path::new(&out).join("report.html")).unwrap();
    assert!(
        report.contains("<svg") && report.contains("2.down") && !report.contains("http"),
        "the report stands alone"
    );
    assert!(json(&["verify", &out])["faults"].as_array().unwrap().is_empty());
    // The solver is better than one width everywhere, at equal size.
    let size = after["size_bytes"].as_u64().unwrap().to_string();
    let uniform = path(&dir, "uniform");
    let u = json(&["quantize", "--storage", "int5g64", "--out", &uniform]);
    let budget = u["proof"]["after"]["size_bytes"].as_u64().unwrap();
    assert!(budget > size.parse().unwrap(), "the uniform recipe has more room: {budget} {size}");
    assert!(kl(&dir, &out) <= 0.9 * kl(&dir, &uniform));
    // The recipe replays to the same bytes.
    let again = path(&dir, "again");
    json(&["run", &format!("{out}/planish.toml"), "--out", &again]);
    let bytes = |d: &str| fs::read(Path::new(d).join("model.safetensors")).unwrap();
    assert!(bytes(&out) == bytes(&again));
    // One changed bit is found.
    let mut damaged = bytes(&again);
    let at = damaged.len() - 5;
    damaged[at] ^= 1;
    fs::write(Path::new(&again).join("model.safetensors"), damaged).unwrap();
    fails(&["verify", &again], 2, "");
}

#[test]
fn gptq_is_closer_to_the_original_than_rounding_on_every_kind_of_grid() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    for storage in ["int3g32", "q4_0", "iq4_nl"] {
        let make = |method: &str| {
            let out = path(&dir, &format!("{method}-{storage}"));
            json(&["quantize", &folder, "--method", method, "--storage", storage, "--data", &text, "--out", &out]);
            kl(&dir, &out)
        };
        let (gptq, rtn) = (make("gptq"), make("rtn"));
        println!("{storage}: gptq {gptq:.6}, rtn {rtn:.6}");
        assert!(gptq < 0.8 * rtn, "{storage}: {gptq} {rtn}");
    }
}

#[test]
fn results_do_not_depend_on_threads_and_are_done_only_once() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let (one, two) = (path(&dir, "one"), path(&dir, "two"));
    let words = |out: &str| -> Vec<String> {
        ["quantize", &folder, "--bits", "4", "--group", "32", "--data", &text, "--out", out].map(String::from).to_vec()
    };
    for (out, threads) in [(&one, "1"), (&two, "2")] {
        assert!(planish().args(words(out)).args(["--threads", threads]).output().unwrap().status.success());
    }
    for name in ["model.safetensors", "proof.json", "manifest.json", "planish.toml", "report.html"] {
        let read = |d: &str| fs::read(Path::new(d).join(name)).unwrap();
        assert!(read(&one) == read(&two), "{name} differs");
    }
    let words: Vec<String> = words(&one);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    assert_eq!(json(&words)["already_done"], true);
    fails(&["quantize", &folder, "--bits", "3", "--data", &text, "--out", &one], 2, "exists");
    fs::write(path(&dir, "file"), "mine").unwrap();
    fails(&["quantize", &folder, "--data", &text, "--out", &path(&dir, "file")], 2, "exists");
}

#[test]
fn a_killed_job_goes_on_and_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let (whole, killed) = (path(&dir, "whole"), path(&dir, "killed"));
    let words = |out: &str| {
        ["quantize", &folder, "--storage", "q4_0", "--data", &text, "--out", out, "--json"].map(String::from).to_vec()
    };
    let begin = Instant::now();
    assert!(planish().args(words(&whole)).output().unwrap().status.success());
    let time = begin.elapsed();
    for i in 1..=6 {
        let mut child = planish().args(words(&killed)).stdout(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(time * i / 8);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(
            !Path::new(&killed).exists() || Path::new(&killed).join("proof.json").is_file(),
            "a half result appeared"
        );
    }
    assert!(planish().args(words(&killed)).output().unwrap().status.success());
    for name in ["model.safetensors", "proof.json", "manifest.json"] {
        let read = |d: &str| fs::read(Path::new(d).join(name)).unwrap();
        assert!(read(&whole) == read(&killed), "{name} differs");
    }
    let left: Vec<PathBuf> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.iter().all(|p| !p.to_string_lossy().contains("partial")), "{left:?}");
}

#[test]
fn the_gate_says_no_and_writes_nothing_unless_forced() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let out = path(&dir, "out");
    let words = ["quantize", &folder, "--bits", "2", "--data", &text, "--max-kl", "0.000001", "--out", &out];
    fails(&words, 1, "the gate says no");
    assert!(!Path::new(&out).exists() && !Path::new(&format!("{out}.partial")).exists());
    let forced = run(&[&words[..], &["--force", "--json"]].concat());
    assert_eq!(forced.status.code(), Some(1));
    let manifest = fs::read_to_string(Path::new(&out).join("manifest.json")).unwrap();
    assert!(manifest.contains("\"gate\": \"failed\""));
    fails(
        &["optimize", &folder, "--max-size", "5%", "--data", &text, "--out", &path(&dir, "tiny")],
        1,
        "the size binds",
    );
    let fast = path(&dir, "fast");
    fails(
        &["optimize", &folder, "--max-size", "60%", "--min-speed", "50x", "--data", &text, "--out", &fast],
        1,
        "speed binds",
    );
    assert!(!Path::new(&fast).exists() && !Path::new(&format!("{fast}.partial")).exists());
    let memory = ["quantize", &folder, "--data", &text, "--max-ram", "1MB", "--out", &path(&dir, "ram")];
    fails(&memory, 3, "--max-ram");
    let slow = ["quantize", &folder, "--bits", "8", "--data", &text, "--max-loss", "50%", "--out", &path(&dir, "few")];
    let short = path(&dir, "short.txt");
    fs::write(
        &short,
        fs::read_to_string(&text).unwrap().split("<|endoftext|>").take(40).collect::<Vec<_>>().join("<|endoftext|>"),
    )
    .unwrap();
    let mut words = slow.to_vec();
    words[5] = &short;
    fails(&words, 1, "too few");
}

#[test]
fn exports_are_read_again_in_every_type() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    for kind in ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "q6_k", "q4_k", "q2_k"] {
        let out = path(&dir, &format!("{kind}.gguf"));
        let done = json(&["export", &folder, "--to", "gguf", "--type", kind, "--out", &out]);
        assert!(done["largest_logit_difference"].as_f64().unwrap() < 1e-3, "{kind}");
        let fallbacks = done["fallbacks"].as_array().unwrap().len();
        assert_eq!(fallbacks > 0, kind.ends_with("_k"), "{kind}: rows of 128 do not divide into blocks of 256");
        let against = json(&["evaluate", &out, "--against", &folder, "--data", &text]);
        let kl = against["against"]["kl_mean"].as_f64().unwrap();
        assert!(kl < if kind == "q2_k" { 0.1 } else { 0.02 }, "{kind}: {kl}");
    }
    let strict = ["export", &folder, "--to", "gguf", "--type", "q4_k", "--strict", "--out", &path(&dir, "s.gguf")];
    fails(&strict, 1, "--strict");
    let (small, plain) = (path(&dir, "small"), path(&dir, "plain"));
    json(&["quantize", &folder, "--bits", "4", "--data", &text, "--out", &small]);
    json(&["export", &small, "--to", "safetensors", "--out", &plain]);
    let nll = |d: &str| json(&["evaluate", d, "--data", &text])["nll"].as_f64().unwrap();
    assert!((nll(&small) - nll(&plain)).abs() < 1e-9, "the dequantized export computes the same");
    let again = ["quantize", &small, "--bits", "3", "--data", &text, "--out", &path(&dir, "twice")];
    fails(&again, 2, "--requantize");
}

#[test]
fn text_is_generated_as_asked() {
    let text = |words: &[&str]| json(&[&["generate", "--prompt", "Once there was a "], words].concat());
    let greedy = text(&["--tokens", "20"]);
    assert_eq!(greedy["ids"], text(&["--tokens", "20", "--threads", "1"])["ids"]);
    assert_eq!(greedy["tokens"], 20);
    let hot = |seed: &str| text(&["--tokens", "20", "--temperature", "1.5", "--seed", seed]);
    assert_eq!(hot("1")["ids"], hot("1")["ids"]);
    assert_ne!(hot("1")["ids"], hot("2")["ids"]);
    let stopped = text(&["--tokens", "100", "--stop", "."]);
    assert_eq!(stopped["ended"], "stop");
    assert!(!stopped["text"].as_str().unwrap().contains('.'));
    assert_eq!(text(&["--tokens", "250"])["ended"], "end");
    fails(&["chat", "--message", "hello"], 2, "has no chat template");
    let dir = tempfile::tempdir().unwrap();
    let template = path(&dir, "template.jinja");
    fs::write(&template, "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    let words = ["chat", "--message", "Once there was a brave child named ", "--template", &template, "--tokens", "30"];
    assert!(json(&words)["reply"].as_str().unwrap().len() > 20);
}

#[test]
fn evaluation_has_the_fields_that_scripts_rely_on() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let e = json(&["evaluate", &folder, "--against", &folder, "--data", &text, "--documents", "40"]);
    for field in [
        "tokens",
        "documents",
        "nll",
        "perplexity",
        "bits_per_byte",
        "size_bytes",
        "file_bytes",
        "parameters",
        "bits_per_weight",
    ] {
        assert!(e[field].is_number(), "{field}");
    }
    let a = &e["against"];
    assert!(a["kl_mean"].as_f64().unwrap() < 1e-9 && a["top1_agreement"] == 1.0 && a["perplexity_ratio"] == 1.0);
    assert!(a["kl_ci95"].is_array() && a["perplexity_ratio_ci95"].is_array() && a["kl_p99"].is_number());
    let blocks = json(&["evaluate", &folder, "--data", &text, "--protocol", "blocks", "--context", "128"]);
    assert_eq!(blocks["tokens"].as_u64().unwrap(), 127 * blocks["documents"].as_u64().unwrap());
    for command in [&["inspect"][..], &["methods"], &["doctor"], &["bench", "--prefill", "16", "--decode", "8"]] {
        json(command);
    }
}

#[test]
fn wrong_words_and_bad_files_are_told_with_code_2() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    fails(&["quantise"], 2, "unrecognized");
    fails(&["evaluate", &path(&dir, "nothing"), "--data", &text], 2, "does not exist");
    fails(&["evaluate", &folder], 2, "--data");
    // What the system says is told once.
    let nothing = "nothing.txt: cannot read it: No such file or directory (os error 2)\n";
    fails(&["evaluate", &folder, "--data", "nothing.txt"], 2, nothing);
    fails(&["quantize", &folder, "--storage", "q9_k", "--data", &text, "--out", "x"], 2, "iq4_nl");
    fails(
        &["quantize", &folder, "--method", "gtpq", "--data", &text, "--out", "x"],
        2,
        "rtn, hqq, rotate, imatrix, awq, smoothquant, gptq, gptaq, autoround, lqer, kmeans, svd, asvd, svd-llm, gfwsvd, magnitude, \
         wanda, sparsegpt, taylor, fisher, influence, without, slicegpt, unused, qat, distill",
    );
    fails(&["quantize", &folder, "--override", "9.q=q8_0", "--data", &text, "--out", "x"], 2, "9.q");
    fails(&["quantize", &folder, "--bits", "9", "--data", &text, "--out", "x"], 2, "bits are 2 to 8");
    fails(&["optimize", &folder, "--max-size", "big", "--data", &text, "--out", "x"], 2, "--max-size");
    let bad = |name: &str, bytes: &[u8]| {
        let broken = path(&dir, "broken");
        let _ = fs::remove_dir_all(&broken);
        fs::create_dir_all(&broken).unwrap();
        for (file, bytes) in sample::files() {
            fs::write(Path::new(&broken).join(file), bytes).unwrap();
        }
        fs::write(Path::new(&broken).join(name), bytes).unwrap();
        broken
    };
    let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    fails(&["inspect", &bad("model.safetensors", lfs)], 2, "git lfs pull");
    fails(&["inspect", &bad("tokenizer.json", b"<!DOCTYPE html><html></html>")], 2, "web page");
    fails(&["inspect", &bad("config.json", b"{\"architectures\": [\"LlamaForCausalLM\"]}")], 2, "hidden_size");
    fails(&["inspect", &bad("config.json", b"{\"architectures\": [\"T5Model\"]}")], 2, "no family knows");
    let weights = sample::files()[4].1;
    fails(&["inspect", &bad("model.safetensors", &weights[..weights.len() / 2])], 2, "truncated");
}

#[test]
fn every_recipe_in_the_recipes_folder_runs() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let recipe = entry.unwrap().path();
        if recipe.is_dir() {
            continue;
        }
        let name = recipe.file_stem().unwrap().to_string_lossy().into_owned();
        let done = json(&["run", &recipe.to_string_lossy(), "--out", &path(&dir, &name)]);
        assert!(done["proof"]["after"]["bits_per_weight"].as_f64().unwrap() < 9.0, "{name}");
        count += 1;
    }
    assert!(count >= 2);
}

#[test]
fn a_plan_is_carried_out_by_run() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let (recipe, out) = (path(&dir, "recipe.toml"), path(&dir, "out"));
    let plan = json(&["plan", &folder, "--max-size", "40%", "--data", &text, "--recipe", &recipe]);
    assert!(!Path::new(&out).exists());
    let done = json(&["run", &recipe, "--out", &out]);
    assert_eq!(done["proof"]["after"]["size_bytes"], plan["size_bytes"]);
}

#[test]
fn guesses_change_the_steps_and_not_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let prompt = path(&dir, "prompt.txt");
    let story = fs::read_to_string(&text).unwrap().split("\n<|endoftext|>\n").next().unwrap().to_string();
    fs::write(&prompt, format!("{story} {}", &story[..story.len() / 3])).unwrap();
    for heat in ["0", "0.8"] {
        let common = ["generate", &folder, "--prompt-file", &prompt, "--tokens", "60", "--temperature", heat];
        let plain = json(&common);
        assert_eq!(
            (&plain["proposed"], &plain["accepted"], &plain["reused_tokens"]),
            (&0.into(), &0.into(), &0.into())
        );
        for guesses in [&["--lookup"][..], &["--draft", &folder, "--speculate", "6"], &["--draft", &folder, "--exact"]]
        {
            let exact = json(&[&common[..], if guesses.contains(&"--exact") { &["--exact"] } else { &[] }].concat());
            let out = json(&[&common[..], guesses].concat());
            for field in ["ids", "text", "ended", "tokens", "prompt_tokens"] {
                assert_eq!(out[field], exact[field], "{guesses:?} {field}");
            }
            for field in ["prefill_seconds", "decode_seconds", "tokens_per_second"] {
                assert!(out[field].as_f64().unwrap() > 0.0, "{field}");
            }
            let number = |field: &str| out[field].as_u64().unwrap();
            // A draft that is the model is never wrong.
            assert!(guesses[0] == "--lookup" || number("accepted") == number("proposed"), "{out}");
            assert!(guesses[0] == "--lookup" || 3 * number("steps") < number("tokens"), "{out}");
        }
    }
    let out = run(&["generate", &folder, "--prompt-file", &prompt, "--lookup", "--stats"]);
    assert!(String::from_utf8_lossy(&out.stdout).starts_with(&story));
    assert!(String::from_utf8_lossy(&out.stderr).contains("guesses right"));
    fs::write(&prompt, [0xff, 0xfe]).unwrap();
    fails(&["generate", &folder, "--prompt-file", &prompt], 2, "prompt.txt is no text in UTF-8");
    fails(&["generate", &folder, "--prompt-file", &path(&dir, "nothing.txt")], 2, "nothing.txt");
    fails(&["generate", &folder, "--prompt", "x", "--prompt-file", &prompt], 2, "cannot be used with");
    fails(&["generate", &folder, "--prompt", "x", "--draft", &prompt], 2, "prompt.txt");
    fails(&["generate", &folder, "--prompt", "x", "--lookup", "--speculate", "0"], 2, "1..=64");
    fails(&["generate", &folder, "--prompt", "x", "--speculate", "4"], 2, "--draft");
}

/// Talks with the sample line by line; returns what it prints for each.
fn talk(words: &[&str], lines: &str) -> Vec<Value> {
    use std::{io::Write, process::Stdio};
    let mut chat = planish();
    chat.args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut chat = chat.spawn().unwrap();
    chat.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let out = chat.wait_with_output().unwrap();
    assert!(out.status.success());
    String::from_utf8(out.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_conversation_is_not_read_twice() {
    let dir = tempfile::tempdir().unwrap();
    let template = path(&dir, "template.jinja");
    let turns = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}";
    fs::write(&template, turns).unwrap();
    let words = ["chat", "--template", &template, "--tokens", "20", "--json"];
    let first = "Once there was a brave child named Mina. ";
    let replies = talk(&words, &format!("{first}\nThen Mina \n"));
    assert_eq!(replies.len(), 2);
    assert_eq!(replies[0]["reused_tokens"], 0);
    let number = |reply: &Value, field: &str| reply[field].as_u64().unwrap();
    let read = number(&replies[0], "prompt_tokens") + number(&replies[0], "tokens") - 1;
    assert!(number(&replies[1], "reused_tokens") + 4 >= read, "{replies:?}");
    assert!(number(&replies[1], "reused_tokens") < number(&replies[1], "prompt_tokens"));
    // The same conversation as one prompt, read afresh.
    let whole = format!("{first}{}Then Mina ", replies[0]["reply"].as_str().unwrap());
    let afresh = json(&["generate", "--prompt", &whole, "--tokens", "20"]);
    assert_eq!((&afresh["reused_tokens"], &afresh["text"]), (&0.into(), &replies[1]["reply"]));
    let guessed = talk(&[&words[..], &["--lookup"]].concat(), &format!("{first}\nThen Mina \n"));
    assert!(guessed.iter().zip(&replies).all(|(a, b)| a["reply"] == b["reply"]));
}
