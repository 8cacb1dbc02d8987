//! Parquet files as pyarrow writes them (`tests/tables`, `README.md` there), whole and damaged.
#![allow(clippy::unwrap_used, clippy::panic)]

use formats::parquet::rows;
use std::{fs, path::PathBuf};

const FIELDS: [&str; 4] = ["text", "prompt", "completion", "messages"];

fn table(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/tables").join(name)
}

#[test]
fn rows_are_what_was_written() {
    let texts = rows(&table("texts-snappy.parquet"), &FIELDS).unwrap();
    assert_eq!(texts.len(), 40);
    assert_eq!(texts[17].to_string(), r#"{"text":"Tom saw 17 birds. He counted them again and again."}"#);
    let chats = rows(&table("chats-zstd.parquet"), &FIELDS).unwrap();
    let last = r#"{"messages":[{"content":"How many is 11 and 11?","role":"user"},{"content":"It is 22.","role":"assistant"}]}"#;
    let sorted: serde_json::Value = serde_json::from_str(last).unwrap();
    assert_eq!((chats.len(), &chats[11]), (12, &sorted));
    let pairs = rows(&table("pairs-gzip.parquet"), &FIELDS).unwrap();
    assert_eq!(pairs[4], serde_json::json!({"prompt": "q4", "completion": "a4"}));
}

#[test]
fn what_is_no_such_table_is_told() {
    let says = |name: &str, bytes: Option<Vec<u8>>, want: &str| {
        let dir = tempfile::tempdir().unwrap();
        let path = match bytes {
            Some(bytes) => {
                fs::write(dir.path().join(name), bytes).unwrap();
                dir.path().join(name)
            }
            None => table(name),
        };
        let e = rows(&path, &FIELDS).unwrap_err().to_string();
        assert!(e.contains(want) && e.contains(name), "{e}");
    };
    says("labels.parquet", None, "has the columns label, and none of text");
    says("text.parquet", Some(b"Once upon a time".to_vec()), "Parquet");
    says("empty.parquet", Some(Vec::new()), "Parquet");
    says("none.parquet", None, "cannot read it");
    let whole = fs::read(table("texts-snappy.parquet")).unwrap();
    says("cut.parquet", Some(whole[..whole.len() / 2].to_vec()), "the table");
}

#[test]
fn damage_ends_in_an_error_or_in_rows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged.parquet");
    let mut faults = 0;
    for name in ["texts-snappy.parquet", "chats-zstd.parquet", "pairs-gzip.parquet"] {
        let whole = fs::read(table(name)).unwrap();
        let mut random = 12345u64;
        for _ in 0..300 {
            let mut bytes = whole.clone();
            for _ in 0..3 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (random >> 33) as usize % bytes.len();
                bytes[at] = (random >> 20) as u8;
            }
            fs::write(&path, bytes).unwrap();
            faults += usize::from(rows(&path, &FIELDS).is_err());
        }
    }
    assert!(faults > 100, "{faults} of 900 were found");
}
