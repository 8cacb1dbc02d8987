//! The real binary, as a user runs it, on the built-in sample.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod calibrating;
mod commands;
mod distilling;
mod formats;
mod healing;
mod learning;
#[cfg(feature = "mpi")]
mod ranks;
mod reducing;
mod rounding;
mod vocabulary;

use serde_json::Value;
use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

fn planish() -> Command {
    Command::new(env!("CARGO_BIN_EXE_planish"))
}

fn run(words: &[&str]) -> Output {
    planish().args(words).output().unwrap()
}

/// Runs a command that must succeed and print one JSON object.
fn json(words: &[&str]) -> Value {
    let out = run(&[words, &["--json"]].concat());
    let (text, errors) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{words:?}: {errors}");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{words:?}: {e}: {text}"))
}

/// Runs a command that must fail with a code and say something.
fn fails(words: &[&str], code: i32, says: &str) {
    let begin = Instant::now();
    let out = run(words);
    let errors = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{words:?}: {errors}");
    assert!(errors.contains(says), "{words:?} should say {says:?}: {errors}");
    assert!(!errors.contains("panicked"), "{errors}");
    assert!(begin.elapsed() < Duration::from_secs(120), "{words:?}");
}

fn path(dir: &tempfile::TempDir, name: &str) -> String {
    dir.path().join(name).to_string_lossy().into_owned()
}

/// The sample's folder, and a text of its stories.
fn sample(dir: &tempfile::TempDir) -> (String, String) {
    let folder = path(dir, "sample");
    fs::create_dir_all(&folder).unwrap();
    for (name, bytes) in sample::files() {
        fs::write(Path::new(&folder).join(name), bytes).unwrap();
    }
    let text = path(dir, "stories.txt");
    let stories: Vec<String> = (0..600).map(|n| sample::story(4242, n).text).collect();
    fs::write(&text, stories.join("\n<|endoftext|>\n")).unwrap();
    (folder, text)
}

/// Starts a command on one thread and kills it, so many times, each time a little later into `time`, which the whole takes.
fn kill_again_and_again(words: &[&str], times: u32, time: Duration) {
    for i in 1..=times {
        let (null, none) = (std::process::Stdio::null(), std::process::Stdio::null());
        let mut child = planish().args(words).args(["--threads", "1"]).stdout(null).stderr(none).spawn().unwrap();
        std::thread::sleep(time * i / (times + 1));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
