//! JSON files and indexes of shards: what a directory from elsewhere can hold.

use crate::{
    alone,
    cases::{Case, Want, accepted, judge, judge_one, other_kinds, refused},
    safetensors_cases::file,
    within_bounds,
};
use formats::{json, safetensors::Archive};
use std::{fs, os::unix::fs::symlink, path::Path};

const INDEX: &str = "model.safetensors.index.json";

fn json_cases() -> Vec<Case> {
    vec![
        refused("empty file", "", &["truncated"]),
        refused("white space only", " \n\t ", &["truncated"]),
        refused("object cut", "{\"a\": [1, 2", &["truncated", "JSON"]),
        refused("text cut", "{\"a\": \"b", &["truncated", "JSON"]),
        refused("something behind the value", "{} {}", &["byte 3", "JSON"]),
        refused("key twice", "{\"a\":1,\"a\":2}", &["\"a\"", "twice"]),
        refused("key twice deep inside", "{\"x\":[{\"a\":1,\"\\u0061\":2}]}", &["\"a\"", "twice"]),
        refused("a million nested lists", "[".repeat(1_000_000), &["recursion"]),
        refused("a million nested objects", "{\"a\":".repeat(1_000_000), &["recursion"]),
        refused("not a number", "{\"a\": NaN}", &["line 1 column 7"]),
        refused("number beyond any", "{\"a\": 1e999}", &["out of range"]),
        refused("leading zero", "{\"a\": 01}", &["JSON"]),
        refused("comma before the end", "{\"a\": 1,}", &["JSON", "line 1"]),
        refused("single quotes", "{'a': 1}", &["JSON", "line 1"]),
        refused("comment", "{/* hi */}", &["JSON", "line 1"]),
        refused("not UTF-8", b"{\"a\": \"\xff\"}".to_vec(), &["JSON"]),
        refused("half a surrogate", "{\"a\": \"\\ud800\"}", &["JSON"]),
        refused("UTF-16", b"\xff\xfe{\0}\0".to_vec(), &["UTF-16", "UTF-8"]),
        refused("raw control character", b"{\"a\": \"\x07\"}".to_vec(), &["JSON", "control"]),
        refused("a GGUF file", b"GGUF\x03\0\0\0\0\0\0\0".to_vec(), &["GGUF file"]),
        accepted("byte-order mark", "\u{feff}{\"a\": 1}", "editors on Windows write it"),
        accepted("a number as the whole", "1", "it is JSON"),
    ]
}

#[test]
fn json_is_refused_in_words_or_accepted_for_a_reason() {
    let _turn = alone();
    let cases: Vec<Case> = json_cases().into_iter().chain(other_kinds()).collect();
    assert!(cases.len() >= 20);
    println!("{} JSON files", cases.len());
    judge("config.json", cases, json::read);
    judge("config.json", vec![refused("a list as the whole", "[1]", &["not an object"])], json::read_object);
}

#[test]
fn a_file_above_its_purpose_is_not_read() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("huge.json");
    fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let result = within_bounds("a terabyte of nothing", 0, || json::read(&path));
    let want = Want::Refused(&["has 1099511627776 bytes", "at most 268435456"]);
    judge_one("a terabyte of nothing", "huge.json", &want, result.map(|_| ()));
}

/// A model of two shards, `one.safetensors` with `a` and `two.safetensors` with `b` and `c`, and an index.
fn set(directory: &Path, index: &[u8]) {
    let tensor = |name: &str, at: usize| {
        format!("\"{name}\":{{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[{at},{}]}}", at + 4)
    };
    fs::create_dir_all(directory).unwrap();
    fs::write(directory.join("one.safetensors"), file(format!("{{{}}}", tensor("a", 0)), 4)).unwrap();
    let two = format!("{{{},{}}}", tensor("b", 0), tensor("c", 4));
    fs::write(directory.join("two.safetensors"), file(two, 8)).unwrap();
    fs::write(directory.join(INDEX), index).unwrap();
}

fn map(entries: &str) -> Vec<u8> {
    format!("{{\"metadata\":{{\"total_size\":12}},\"weight_map\":{{{entries}}}}}").into_bytes()
}

const GOOD: &str = "\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"two.safetensors\"";

fn index_cases() -> Vec<Case> {
    vec![
        accepted("all in order", map(GOOD), "nothing is wrong"),
        refused("no weight_map", "{\"metadata\":{}}", &["weight_map"]),
        refused("weight_map that is a list", "{\"weight_map\":[]}", &["weight_map"]),
        refused("index that is a list", "[]", &["not an object"]),
        refused("index cut", &map(GOOD)[..60], &["truncated"]),
        refused("Git-LFS pointer", "version https://git-lfs.github.com/spec/v1\n", &["git lfs pull"]),
        refused("HTML page", "<html></html>", &["web page"]),
        refused("tensor twice", map("\"a\":\"one.safetensors\",\"a\":\"two.safetensors\""), &["\"a\"", "twice"]),
        refused("shard that is a number", map("\"a\":3"), &["weight_map.a", "not a file name"]),
        refused("shard that is null", map("\"a\":null"), &["weight_map.a", "not a file name"]),
        refused("shard above", map("\"a\":\"../one.safetensors\""), &["weight_map.a", "beside its index"]),
        refused("shard far above", map("\"a\":\"../../../../etc/passwd\""), &["weight_map.a", "beside its index"]),
        refused("absolute shard", map("\"a\":\"/etc/passwd\""), &["weight_map.a", "beside its index"]),
        refused("shard below", map("\"a\":\"x/one.safetensors\""), &["weight_map.a", "beside its index"]),
        refused("shard by a detour", map("\"a\":\"x/../one.safetensors\""), &["weight_map.a", "beside its index"]),
        refused(
            "shard with a backslash",
            map("\"a\":\"..\\\\one.safetensors\""),
            &["weight_map.a", "beside its index"],
        ),
        refused("shard with a zero", map("\"a\":\"one.safetensors\\u0000\""), &["weight_map.a", "beside its index"]),
        refused("shard that is the directory", map("\"a\":\".\""), &["weight_map.a", "beside its index"]),
        refused("shard that is the directory above", map("\"a\":\"..\""), &["weight_map.a", "beside its index"]),
        refused("shard without a name", map("\"a\":\"\""), &["weight_map.a", "beside its index"]),
        refused(
            "shard that rewrites the terminal",
            map("\"a\":\"\\u001b[2J/x\""),
            &["weight_map.a", "beside its index"],
        ),
        refused("tensor in another shard", map("\"a\":\"two.safetensors\""), &["weight_map.a", "does not hold"]),
        refused(
            "tensor in no shard",
            map(&format!("{GOOD},\"d\":\"two.safetensors\"")),
            &["weight_map.d", "does not hold"],
        ),
        refused(
            "tensor not listed",
            map("\"b\":\"two.safetensors\""),
            &["weight_map", "does not list c", "two.safetensors"],
        ),
        refused("index that nests", format!("{{\"weight_map\":{}", "{\"a\":".repeat(100_000)), &["recursion"]),
    ]
}

#[test]
fn an_index_reaches_no_file_outside_and_every_tensor_is_accounted_for() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    let cases = index_cases();
    println!("{} indexes", cases.len());
    for case in cases {
        set(&model, &case.bytes);
        let result = within_bounds(case.what, case.bytes.len(), || Archive::open(&model));
        judge_one(case.what, INDEX, &case.want, result.map(|_| ()));
    }
}

#[test]
fn what_is_wrong_with_a_shard_is_told_of_the_shard() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    let two = model.join("two.safetensors");
    let check = |what: &str, words: &'static [&'static str]| {
        judge_one(what, "two.safetensors", &Want::Refused(words), Archive::open(&model).map(|_| ()));
    };
    set(&model, &map(GOOD));
    fs::remove_file(&two).unwrap();
    check("missing shard", &["which the index names", "No such file"]);
    fs::write(&two, "version https://git-lfs.github.com/spec/v1\noid sha256:00\n").unwrap();
    check("pointer instead of a shard", &["git lfs pull"]);
    fs::write(&two, &file("{}", 0)[..9]).unwrap();
    check("shard cut", &["truncated"]);
    fs::remove_file(&two).unwrap();
    fs::create_dir(&two).unwrap();
    check("directory instead of a shard", &["regular file"]);
}

#[test]
fn links_may_not_leave_the_directory_except_into_the_hubs_cache() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    set(&model, &map(GOOD));
    fs::rename(model.join("two.safetensors"), dir.path().join("secret")).unwrap();
    symlink("../secret", model.join("two.safetensors")).unwrap();
    let want = Want::Refused(&["weight_map.b", "leaves the model's folder"]);
    judge_one("link out", INDEX, &want, Archive::open(&model).map(|_| ()));

    fs::remove_file(model.join("two.safetensors")).unwrap();
    fs::rename(dir.path().join("secret"), model.join("blob")).unwrap();
    symlink("blob", model.join("two.safetensors")).unwrap();
    assert_eq!(Archive::open(&model).unwrap().tensors().len(), 3);

    let (snapshot, blobs) = (dir.path().join("hub/snapshots/abc"), dir.path().join("hub/blobs"));
    set(&snapshot, &map(GOOD));
    fs::create_dir(&blobs).unwrap();
    fs::rename(snapshot.join("two.safetensors"), blobs.join("123")).unwrap();
    symlink("../../blobs/123", snapshot.join("two.safetensors")).unwrap();
    assert_eq!(Archive::open(&snapshot).unwrap().tensors().len(), 3);
}

#[test]
fn a_directory_without_weights_says_what_it_has_instead() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    let e = Archive::open(dir.path()).unwrap_err().to_string();
    assert!(e.contains("model.safetensors") && e.contains("is not there"), "{e}");
    fs::write(dir.path().join("pytorch_model.bin"), b"PK\x03\x04").unwrap();
    let e = Archive::open(dir.path()).unwrap_err().to_string();
    assert!(e.contains("only pytorch_model.bin") && e.contains("convert"), "{e}");
}
