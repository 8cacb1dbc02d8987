//! What a case is, and how it is judged.

use crate::within_bounds;
use std::{fs, path::Path};

/// What a reader has to make of a file.
pub enum Want {
    /// An error whose text holds these words.
    Refused(&'static [&'static str]),
    /// No error, for this reason.
    Accepted(&'static str),
}

/// A hostile file.
pub struct Case {
    /// What is wrong with it.
    pub what: &'static str,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What has to come of it.
    pub want: Want,
}

/// A case that must be refused.
pub fn refused(what: &'static str, bytes: impl Into<Vec<u8>>, words: &'static [&'static str]) -> Case {
    Case { what, bytes: bytes.into(), want: Want::Refused(words) }
}

/// A case that must be accepted.
pub fn accepted(what: &'static str, bytes: impl Into<Vec<u8>>, why: &'static str) -> Case {
    Case { what, bytes: bytes.into(), want: Want::Accepted(why) }
}

/// Writes each case to a file of that name, reads it and judges the outcome.
pub fn judge<T>(file: &str, cases: Vec<Case>, open: impl Fn(&Path) -> formats::Result<T>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(file);
    for case in cases {
        fs::write(&path, &case.bytes).unwrap();
        let result = within_bounds(case.what, case.bytes.len(), || open(&path));
        judge_one(case.what, file, &case.want, result.map(|_| ()));
    }
}

/// Judges one outcome.
pub fn judge_one(what: &str, file: &str, want: &Want, result: formats::Result<()>) {
    match (want, result) {
        (Want::Accepted(_), Ok(())) => {}
        (Want::Accepted(why), Err(e)) => panic!("{what}: refused ({e}), although {why}"),
        (Want::Refused(_), Ok(())) => panic!("{what}: accepted"),
        (Want::Refused(words), Err(e)) => {
            let text = e.to_string();
            assert!(text.contains(file), "{what}: does not name {file}: {text}");
            for word in *words {
                assert!(text.contains(word), "{what}: does not say {word:?}: {text}");
            }
            assert!(!text.chars().any(char::is_control), "{what}: control characters in {text:?}");
            assert!(text.len() < 2_000, "{what}: {} bytes of message", text.len());
        }
    }
}

/// Files of other kinds that end up under a model's name; true of every reader.
pub fn other_kinds() -> Vec<Case> {
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 123456789\n";
    vec![
        refused("Git-LFS pointer", lfs, &["Git-LFS pointer", "git lfs pull"]),
        refused(
            "HTML page",
            "<!DOCTYPE html>\n<html><body>404</body></html>",
            &["web page", "download the file itself"],
        ),
        refused("HTML page in capitals after a line", "\n<HTML><HEAD></HEAD></HTML>", &["web page"]),
        refused(
            "XML error of an object store",
            "<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code></Error>",
            &["web page"],
        ),
        refused(
            "zipped PyTorch checkpoint",
            b"PK\x03\x04\x00\x00\x08\x08archive/data.pkl".to_vec(),
            &["zip archive", "safetensors"],
        ),
        refused("Python pickle", b"\x80\x02}q\x00(X\x01\x00\x00\x00w".to_vec(), &["pickle", "safetensors"]),
        refused("Python pickle of protocol 4", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}".to_vec(), &["pickle"]),
        refused("HDF5 file", b"\x89HDF\r\n\x1a\n\x00\x00\x00\x00\x00\x08\x08".to_vec(), &["HDF5"]),
        refused("gzip archive", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03".to_vec(), &["gzip", "unpack"]),
        refused("Zstandard archive", b"\x28\xb5\x2f\xfd\x04\x00\x00\x00\x00\x00".to_vec(), &["Zstandard", "unpack"]),
        refused("zeros that a download reserved", vec![0; 4096], &["zeros", "did not finish"]),
    ]
}
