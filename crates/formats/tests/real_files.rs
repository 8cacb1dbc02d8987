//! Every real safetensors and GGUF file of the shared data opens, and what it holds agrees with its size.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

use formats::{gguf, safetensors::Archive};
use std::path::{Path, PathBuf};

fn data() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let data = std::env::var_os("PLANISH_DATA").map_or_else(beside, PathBuf::from);
    if data.is_dir() {
        return Some(data);
    }
    told("skipped: needs ../shared/data");
    None
}

fn files(directory: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, ending, found);
        } else if path.extension().is_some_and(|e| e == ending) {
            found.push(path);
        }
    }
}

#[test]
fn real_safetensors_open() {
    let Some(data) = data() else { return };
    let mut found = Vec::new();
    files(&data.join("models"), "safetensors", &mut found);
    assert!(!found.is_empty());
    for path in found {
        let archive = Archive::open(&path).unwrap();
        let bytes: usize = archive.tensors().values().map(|t| t.bytes.len()).sum();
        let size = std::fs::metadata(&path).unwrap().len() as usize;
        let header = size - bytes;
        assert!(bytes > 0 && header > 8 && header < 1 << 20, "{}", path.display());
        for (name, t) in archive.tensors() {
            let elements: usize = t.shape.iter().product();
            assert_eq!(t.bytes.len(), elements * t.dtype.size(), "{name}");
        }
    }
}

#[test]
fn real_gguf_files_open() {
    let Some(data) = data() else { return };
    let mut found = Vec::new();
    files(&data, "gguf", &mut found);
    assert!(!found.is_empty());
    for path in found {
        let file = gguf::File::open(&path).unwrap();
        assert!(file.text("general.architecture").unwrap().is_some(), "{}", path.display());
        let tokens = file.texts("tokenizer.ggml.tokens").unwrap().unwrap();
        assert!(tokens.len() > 1_000, "{}", path.display());
        assert_eq!(file.list("tokenizer.ggml.token_type").unwrap().map(gguf::Array::len), Some(tokens.len()));
    }
}

/// Says so past the test harness, which keeps what a passing test prints to itself.
fn told(words: &str) {
    use std::io::Write;
    // A closed standard error is no reason to fail a test.
    let _ = writeln!(std::io::stderr(), "{words}");
}
