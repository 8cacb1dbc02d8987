//! Statistics of inputs: gathered once, used again, and how text comes to them.

use crate::{fails, json, path, sample};
use std::{fs, path::Path};

const BITS: [&str; 4] = ["--bits", "3", "--group", "32"];

fn quantize(dir: &tempfile::TempDir, out: &str, words: &[&str]) -> serde_json::Value {
    let (folder, _) = sample(dir);
    json(&[&["quantize", &folder, "--out", out], &BITS[..], words].concat())
}

fn weights(model: &str) -> Vec<u8> {
    fs::read(Path::new(model).join("model.safetensors")).unwrap()
}

#[test]
fn statistics_are_gathered_once_and_give_the_same_bytes_again() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    for (method, file) in [("imatrix", "stats.gguf"), ("gptq", "stats.safetensors")] {
        let [first, again, moved] = ["first", "again", "moved"].map(|name| path(&dir, &format!("{method}-{name}")));
        let (stats, alone) = (path(&dir, file), path(&dir, &format!("alone-{file}")));
        quantize(&dir, &first, &["--method", method, "--stats", &stats, "--data", &text]);
        // The command that only gathers writes what the job gathered.
        let done = json(&["calibrate", &folder, "--data", &text, "--out", &alone]);
        assert!(done["tokens"].as_u64().unwrap() > 1000 && done["inputs"] == 13, "{done}");
        assert!(fs::read(&stats).unwrap() == fs::read(&alone).unwrap(), "{file}");
        quantize(&dir, &again, &["--method", method, "--stats", &alone, "--data", &text]);
        assert!(weights(&first) == weights(&again));
        // It is the same job wherever the file lies.
        let same = quantize(&dir, &first, &["--method", method, "--stats", &alone, "--data", &text]);
        assert_eq!(same["already_done"], true);
        let recipe = format!("{first}/planish.toml");
        json(&["run", &recipe, "--model", &folder, "--data", &text, "--stats", &alone, "--out", &moved]);
        assert!(weights(&first) == weights(&moved));
        let manifest = fs::read_to_string(format!("{first}/manifest.json")).unwrap();
        assert!(manifest.contains(file), "{manifest}");
    }
    // No text is needed to calibrate, and the proof then rests on the model's own.
    let bare = path(&dir, "bare");
    let done = quantize(&dir, &bare, &["--method", "imatrix", "--stats", &path(&dir, "stats.gguf")]);
    assert!(weights(&path(&dir, "imatrix-first")) == weights(&bare));
    assert!(done["proof"]["warnings"][0].as_str().unwrap().contains("wrote itself"));
    let rounded = path(&dir, "rounded");
    let rtn = quantize(&dir, &rounded, &["--method", "rtn", "--data", &text]);
    let first = path(&dir, "gptq-first");
    let gptq = json(&["run", &format!("{first}/planish.toml"), "--model", &folder, "--data", &text, "--out", &first]);
    let kl = |done: &serde_json::Value| done["proof"]["after"]["against"]["kl_mean"].as_f64().unwrap();
    assert!(gptq["already_done"] == true && kl(&gptq) < 0.9 * kl(&rtn), "{} {}", kl(&gptq), kl(&rtn));
    assert!(weights(&path(&dir, "imatrix-first")) != weights(&rounded));
}

#[test]
fn a_solver_and_a_plan_use_statistics_too() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    for (file, method) in [("stats.gguf", "imatrix"), ("stats.safetensors", "gptq")] {
        let (stats, out, recipe) = (path(&dir, file), path(&dir, method), path(&dir, "recipe.toml"));
        let words = ["--max-size", "30%", "--data", &text, "--stats", &stats];
        json(&[&["plan", &folder, "--recipe", &recipe], &words[..]].concat());
        assert!(fs::read_to_string(&recipe).unwrap().contains(&format!("method = \"{method}\"")));
        assert!(Path::new(&stats).is_file());
        let done = json(&[&["optimize", &folder, "--out", &out], &words[..]].concat());
        let kl = done["proof"]["after"]["against"]["kl_mean"].as_f64().unwrap();
        assert!(kl < 0.01, "{method}: {kl}");
    }
}

#[test]
fn what_statistics_cannot_do_is_said_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let out = path(&dir, "out");
    let refused = |words: &[&str], says: &str| {
        fails(&[&["quantize", &folder, "--data", &text, "--out", &out], &BITS[..], words].concat(), 2, says);
        assert!(!Path::new(&out).exists());
    };
    let (imatrix, moments) = (path(&dir, "i.gguf"), path(&dir, "m.safetensors"));
    refused(&["--stats", &moments], "--method gptq");
    refused(&["--stats", &imatrix, "--method", "gptq"], "--method imatrix");
    refused(&["--stats", &moments, "--method", "rtn"], "leave out --stats");
    refused(&["--stats", "stats.bin", "--method", "gptq"], "stats.bin");
    refused(&["--stats", &imatrix, "--method", "gptq", "--dry-run"], "--method imatrix");
    assert!(!Path::new(&imatrix).exists() && !Path::new(&moments).exists());
    json(&["calibrate", &folder, "--data", &text, "--out", &imatrix]);
    fails(&["calibrate", &folder, "--data", &text, "--out", &imatrix], 2, "--overwrite");
    let bytes = fs::read(&imatrix).unwrap();
    fs::write(&imatrix, &bytes[..bytes.len() / 2]).unwrap();
    refused(&["--stats", &imatrix, "--method", "imatrix"], "i.gguf");
    fs::write(&imatrix, fs::read(Path::new(&folder).join("model.safetensors")).unwrap()).unwrap();
    refused(&["--stats", &imatrix, "--method", "imatrix"], "i.gguf");
    fails(&["calibrate", &folder, "--data", &text, "--out", &path(&dir, "x.dat")], 2, ".gguf");
    fails(&["calibrate", &folder, "--data", &text, "--out", &moments, "--max-ram", "1MB"], 3, "--max-ram");
}

#[test]
fn conversations_get_the_chat_template_and_documents_can_be_packed() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}";
    fs::write(Path::new(&folder).join("chat_template.jinja"), template).unwrap();
    let said = |n: usize| [("user", format!("How many birds are on tree {n}?")), ("assistant", "Seven.".to_string())];
    let line = |n: usize| {
        // Nobody learns from it, so a conversation may lack an answer.
        let turns = said(n).into_iter().take(if n == 7 { 1 } else { 2 });
        let turns: Vec<_> = turns.map(|(r, c)| serde_json::json!({ "role": r, "content": c })).collect();
        serde_json::json!({ "messages": turns }).to_string()
    };
    let plain = |n: usize| {
        let turns = said(n).into_iter().take(if n == 7 { 1 } else { 2 });
        serde_json::json!({ "text": turns.map(|(r, c)| format!("{r}: {c}\n")).collect::<String>() }).to_string()
    };
    let gather = |name: &str, lines: Vec<String>| {
        fs::create_dir_all(path(&dir, name)).unwrap();
        let (data, out) = (path(&dir, &format!("{name}/lines.jsonl")), path(&dir, &format!("{name}/stats.gguf")));
        fs::write(&data, lines.join("\n")).unwrap();
        json(&["calibrate", &folder, "--data", &data, "--whole", "--out", &out]);
        fs::read(out).unwrap()
    };
    let chats = gather("chats", (0..40).map(line).collect());
    assert!(chats == gather("plain", (0..40).map(plain).collect()), "the template's text is what is read");
    assert!(chats != gather("others", (1..41).map(plain).collect()));

    let [single, packed] = ["single", "packed"].map(|name| path(&dir, name));
    let words = ["--method", "gptq", "--data", &text, "--calibration-tokens", "6000"];
    quantize(&dir, &single, &words);
    quantize(&dir, &packed, &[&words[..], &["--packed"]].concat());
    let recipe = |model: &str| fs::read_to_string(format!("{model}/planish.toml")).unwrap();
    assert!(recipe(&packed).contains("packed = true") && !recipe(&single).contains("packed"));
    assert!(weights(&single) != weights(&packed));
    let again = path(&dir, "again");
    json(&["run", &format!("{packed}/planish.toml"), "--model", &folder, "--data", &text, "--out", &again]);
    assert!(weights(&packed) == weights(&again));
    let stats = path(&dir, "packed.gguf");
    let done =
        json(&["calibrate", &folder, "--data", &text, "--packed", "--calibration-tokens", "6000", "--out", &stats]);
    assert_eq!(done["tokens"].as_u64().unwrap(), 256 * done["sequences"].as_u64().unwrap());
    assert_eq!(done["sequences"], 23);
}
