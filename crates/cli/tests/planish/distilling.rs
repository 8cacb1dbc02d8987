//! Teachers that were read before, and students that write themselves.

use crate::{fails, json, path, planish, sample};
use std::{fs, path::Path};

fn words<'a>(student: &'a str, text: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let lesson = ["--steps", "30", "--batch", "4", "--context", "128", "--lr", "1e-3", "--share", "1"];
    [&["distill", student, "--data", text, "--out", out][..], &lesson, more].concat()
}

fn same(a: &str, b: &str) {
    let read = |d: &str| fs::read(Path::new(d).join("model.safetensors")).unwrap();
    assert!(read(a) == read(b), "weights of {a} and {b} differ");
}

#[test]
fn what_a_teacher_said_is_kept_and_learned_from_without_it() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    // A student of two of its three blocks.
    let student = path(&dir, "student");
    let made = ["distill", "--teacher", &folder, "--student-layers", "0,2", "--data", &text, "--steps", "1"];
    json(&[&made[..], &["--lr", "1e-9", "--context", "128", "--out", &student]].concat());
    let learned = |name: &str, more: &[&str]| {
        let out = path(&dir, name);
        let said = json(&words(&student, &text, &out, more));
        (out, said["validation_loss"].as_f64().unwrap())
    };
    let cache = path(&dir, "teacher.said");
    let (_, live) = learned("live", &["--teacher", &folder]);
    let (first, kept) = learned("kept", &["--teacher", &folder, "--teacher-cache", &cache, "--top-k", "16"]);
    println!("live {live}, sixteen tokens kept {kept}");
    assert!((kept / live - 1.0).abs() < 0.02, "{kept} and {live}");
    let whole = fs::read(&cache).unwrap();
    // The teacher is not needed any more, and one that was cut off is gone on with.
    let (again, _) = learned("again", &["--teacher-cache", &cache, "--top-k", "16"]);
    same(&first, &again);
    fs::write(&cache, &whole[..whole.len() / 3]).unwrap();
    let out = path(&dir, "wrong");
    fails(
        &words(&student, &text, &out, &["--teacher-cache", &cache, "--top-k", "16", "--restart"]),
        2,
        "give --teacher",
    );
    let (cut, _) = learned("cut", &["--teacher", &folder, "--teacher-cache", &cache, "--top-k", "16"]);
    same(&first, &cut);
    assert!(fs::read(&cache).unwrap() == whole);

    let other = path(&dir, "other.txt");
    fs::write(&other, fs::read_to_string(&text).unwrap().replace("the", "a")).unwrap();
    let wrong = |data: &str, more: &[&str], says: &str| {
        fails(&[&words(&student, data, &out, more)[..], &["--restart"]].concat(), 2, says);
    };
    wrong(&other, &["--teacher-cache", &cache, "--top-k", "16"], "another text");
    wrong(&text, &["--teacher", &folder, "--teacher-cache", &cache, "--top-k", "8"], "--top-k");
    wrong(&text, &["--teacher-cache", &cache, "--top-k", "16", "--temperature", "2"], "--temperature");
    wrong(&text, &["--teacher-cache", &text], "is not what a teacher said");
    wrong(&text, &["--teacher-cache", &cache, "--divergence", "reverse"], "--divergence forward");
    wrong(&text, &["--teacher", &folder, "--teacher-cache", &cache, "--on-policy", "0.5"], "--on-policy");
    wrong(&text, &["--teacher", &folder, "--on-policy", "2"], "--on-policy");
    wrong(&text, &["--teacher", &folder, "--teacher-cache", &cache, "--hidden", "1"], "--hidden");
    wrong(&text, &["--teacher", &folder, "--hidden=-1"], "--hidden");
    wrong(&text, &[], "--teacher");
    let mut damaged = whole.clone();
    damaged[2000..].fill(0xff);
    fs::write(&cache, &damaged).unwrap();
    wrong(&text, &["--teacher-cache", &cache, "--top-k", "16"], "it is damaged");
}

#[test]
fn a_student_learns_from_what_it_writes_itself() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let learned = |name: &str, more: &[&str]| {
        let out = path(&dir, name);
        let all = ["distill", "--teacher", &folder, "--student-layers", "0,2", "--data", &text, "--out", &out];
        let lesson = ["--steps", "16", "--batch", "4", "--context", "96", "--lr", "1e-3", "--share", "1"];
        let said = json(&[&all[..], &lesson, &["--on-policy", "0.5"], more].concat());
        (out, said)
    };
    let (first, said) = learned("first", &[]);
    let number = |key: &str| said[key].as_f64().unwrap_or_else(|| panic!("{key} in {said}"));
    assert!(number("validation_loss") < 0.8 * number("validation_loss_before"), "{said}");
    // Only what it wrote counts of what it wrote.
    assert!(number("tokens") < 0.9 * 16.0 * 4.0 * 96.0, "{said}");
    let (again, _) = learned("again", &["--threads", "1"]);
    same(&first, &again);
}

#[test]
fn blocks_learn_from_those_of_the_teacher_of_the_same_width_or_another() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let learned = |name: &str, student: &[&str], hidden: &[&str]| {
        let out = path(&dir, name);
        let all = ["distill", "--teacher", &folder, "--data", &text, "--steps", "30", "--batch", "4", "--lr", "1e-3"];
        let said = json(&[&all[..], &["--context", "128", "--share", "1", "--out", &out], student, hidden].concat());
        (out, said["validation_loss"].as_f64().unwrap())
    };
    let half = ["--student-layers", "0,2"];
    let ((_, plain), (_, looked)) = (learned("plain", &half, &[]), learned("looked", &half, &["--hidden", "1"]));
    println!("logits alone {plain}, blocks as well {looked}");
    assert!(looked < 1.1 * plain, "{looked} and {plain}");
    // A narrow student with the teacher's vocabulary, whose projections learn along and survive an interruption.
    let config = path(&dir, "narrow.toml");
    let shape = "architectures = ['LlamaForCausalLM']\nhidden_size = 64\nintermediate_size = 128\nnum_hidden_layers = 2\n\
                 num_attention_heads = 4\nmax_position_embeddings = 128\ntie_word_embeddings = true\n";
    fs::write(&config, format!("[model]\n{shape}[training]\nsteps = 4\n")).unwrap();
    let narrow = path(&dir, "narrow");
    json(&["train", &config, "--data", &text, "--tokenizer", &folder, "--out", &narrow]);
    let (first, _) = learned("first", &[&narrow], &["--hidden", "1"]);
    let (again, _) = learned("again", &[&narrow], &["--hidden", "1", "--threads", "1", "--checkpoint-every", "7"]);
    same(&first, &again);
}

#[test]
fn a_teacher_with_another_vocabulary_is_translated() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let config = path(&dir, "small.toml");
    let shape = "architectures = ['LlamaForCausalLM']\nhidden_size = 64\nintermediate_size = 128\nnum_hidden_layers = 2\n\
                 num_attention_heads = 4\nmax_position_embeddings = 128\ntie_word_embeddings = true\n";
    let rest = "[tokenizer]\nvocab = 420\n[training]\nsteps = 60\nbatch = 8\nlr = 3e-3\n";
    fs::write(&config, format!("[model]\n{shape}{rest}")).unwrap();
    let student = path(&dir, "student");
    json(&["train", &config, "--data", &text, "--out", &student]);
    let learned = |name: &str, share: &str| {
        let out = path(&dir, name);
        let words = ["distill", &student, "--teacher", &folder, "--data", &text, "--share", share, "--out", &out];
        let more = ["--steps", "60", "--batch", "8", "--context", "128", "--lr", "2e-3", "--seed", "3"];
        let done = planish().args(words).args(more).arg("--json").output().unwrap();
        let errors = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{errors}");
        let said: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
        (said["validation_loss"].as_f64().unwrap(), errors)
    };
    let ((taught, errors), (alone, _)) = (learned("taught", "0.8"), learned("alone", "0"));
    println!("from the teacher {taught}, from the text {alone}\n{errors}");
    assert!(errors.contains("have a counterpart among its 1024"), "{errors}");
    assert!(taught < alone, "{taught} and {alone}");
    let out = path(&dir, "wrong");
    let words = ["distill", &student, "--teacher", &folder, "--data", &text, "--out", &out];
    fails(&[&words[..], &["--divergence", "reverse"]].concat(), 2, "--divergence forward");
    fails(&[&words[..], &["--teacher-cache", &path(&dir, "said")]].concat(), 2, "another vocabulary");
}
