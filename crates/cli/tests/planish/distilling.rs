//! Teachers that were read before, and students that write themselves.

use crate::{fails, json, path, sample};
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
    wrong(&text, &["--teacher-cache", &cache, "--top-k", "16", "--temperature", "2"], "--temperature 1");
    wrong(&text, &["--teacher-cache", &text], "is not what a teacher said");
    wrong(&text, &["--teacher-cache", &cache, "--divergence", "reverse"], "--divergence forward");
    wrong(&text, &["--teacher", &folder, "--teacher-cache", &cache, "--on-policy", "0.5"], "--on-policy");
    wrong(&text, &["--teacher", &folder, "--on-policy", "2"], "--on-policy");
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
