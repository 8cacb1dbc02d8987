//! Safetensors files that break a rule of the format.

use crate::{
    alone,
    cases::{Case, accepted, judge, other_kinds, refused},
};
use formats::safetensors::Archive;
use std::fmt::Write;

const FILE: &str = "model.safetensors";

/// Length, header, and that many bytes of data.
pub fn file(header: impl AsRef<[u8]>, data: usize) -> Vec<u8> {
    let header = header.as_ref();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.extend((0..data).map(|i| i as u8));
    bytes
}

/// A file of one tensor `w` of these fields, as JSON.
fn one(dtype: &str, shape: &str, offsets: &str, data: usize) -> Vec<u8> {
    file(format!("{{\"w\":{{\"dtype\":{dtype},\"shape\":{shape},\"data_offsets\":{offsets}}}}}"), data)
}

fn bytes_of(name: &str, from: usize, to: usize) -> String {
    format!("\"{name}\":{{\"dtype\":\"U8\",\"shape\":[{}],\"data_offsets\":[{from},{to}]}}", to - from)
}

fn two(a: (usize, usize), b: (usize, usize), data: usize) -> Vec<u8> {
    file(format!("{{{},{}}}", bytes_of("a", a.0, a.1), bytes_of("b", b.0, b.1)), data)
}

fn length_cases() -> Vec<Case> {
    vec![
        refused("empty file", "", &["truncated", "header's length"]),
        refused("three bytes", [1, 2, 3], &["truncated", "header's length"]),
        refused("a length alone", 40u64.to_le_bytes(), &["truncated", "the header"]),
        refused("length of all ones", u64::MAX.to_le_bytes(), &["header's length", "above 100000000"]),
        refused("length that turns negative", (1u64 << 63).to_le_bytes(), &["header's length"]),
        refused("length above 100 MB", 100_000_001u64.to_le_bytes(), &["header's length is 100000001"]),
        refused("length of 100 MB in a file of 8 bytes", 100_000_000u64.to_le_bytes(), &["truncated", "the header"]),
        refused("a GGUF file", b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00".to_vec(), &["GGUF file"]),
        refused("a JSON error saved as the file", "{\"error\":\"Repository not found\"}", &["JSON text"]),
    ]
}

fn header_cases() -> Vec<Case> {
    let empty = bytes_of("a", 0, 0);
    vec![
        refused("header that begins with a space", file(" {}", 0), &["byte 8", "begin with"]),
        refused("header that is a list", file("[]", 0), &["begin with"]),
        refused("header cut within", file("{\"w\":{\"dtype\":\"U8\"", 0), &["truncated", "JSON"]),
        refused("something behind the header's object", file("{}x", 0), &["byte 10", "JSON"]),
        refused("header that is not UTF-8", file(b"{\"\xff\xfe\":1}", 0), &["JSON"]),
        refused("header of zeros", file([0; 32], 0), &["the header", "begin with"]),
        refused("100,000 nested lists", file(format!("{{\"w\":{}", "[".repeat(100_000)), 0), &["recursion"]),
        refused("a tensor twice", file(format!("{{{empty},{empty}}}"), 0), &["tensor \"a\"", "twice"]),
        refused(
            "a tensor twice, once spelled with an escape",
            file(format!("{{{},{}}}", empty, bytes_of("\\u0061", 0, 0)), 0),
            &["tensor \"a\"", "twice"],
        ),
        refused("metadata twice", file("{\"__metadata__\":{},\"__metadata__\":{}}", 0), &["__metadata__", "twice"]),
        refused("metadata that is a list", file("{\"__metadata__\":[]}", 0), &["__metadata__"]),
        refused("metadata of numbers", file("{\"__metadata__\":{\"a\":1}}", 0), &["__metadata__"]),
        refused("a key of the metadata twice", file("{\"__metadata__\":{\"a\":\"\",\"a\":\"\"}}", 0), &["twice"]),
        refused(
            "a name that rewrites the terminal",
            file("{\"\\u001b[2J\\u0007\":{\"dtype\":\"U8\"}}", 0),
            &["\\u{1b}[2J", "shape"],
        ),
        refused("a name of 60,000 bytes", file(format!("{{\"{}\":1}}", "n".repeat(60_000)), 0), &["nnnn", "object"]),
    ]
}

fn entry_cases() -> Vec<Case> {
    let u8s = "\"U8\"";
    vec![
        refused("a tensor that is a number", file("{\"w\":1}", 0), &["tensor \"w\"", "object"]),
        refused("a tensor that is null", file("{\"w\":null}", 0), &["tensor \"w\"", "object"]),
        refused("no dtype", file("{\"w\":{\"shape\":[0],\"data_offsets\":[0,0]}}", 0), &["tensor \"w\"", "dtype"]),
        refused("unknown dtype", one("\"F99\"", "[1]", "[0,4]", 4), &["tensor \"w\"", "F99"]),
        refused("dtype that is a number", one("7", "[1]", "[0,4]", 4), &["tensor \"w\"", "dtype"]),
        refused(
            "unknown field",
            file("{\"w\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0],\"x\":1}}", 0),
            &["\"x\""],
        ),
        refused("a field twice", file("{\"w\":{\"dtype\":\"U8\",\"dtype\":\"F32\"}}", 0), &["dtype", "twice"]),
        refused("no shape", file("{\"w\":{\"dtype\":\"U8\",\"data_offsets\":[0,0]}}", 0), &["tensor \"w\"", "shape"]),
        refused("negative dimension", one(u8s, "[-1]", "[0,4]", 4), &["tensor \"w\"", "shape"]),
        refused("fraction of a dimension", one(u8s, "[1.5]", "[0,4]", 4), &["tensor \"w\"", "shape"]),
        refused("dimension beyond any number", one(u8s, "[1e400]", "[0,4]", 4), &["JSON", "out of range"]),
        refused("shape that is a text", one(u8s, "\"4\"", "[0,4]", 4), &["tensor \"w\"", "shape"]),
        refused(
            "shape whose product overflows",
            one(u8s, "[4294967296,4294967296]", "[0,0]", 0),
            &["tensor \"w\"", "shape"],
        ),
        refused(
            "shape whose product overflows, times nothing",
            one(u8s, "[0,4294967296,4294967296]", "[0,0]", 0),
            &["tensor \"w\"", "shape"],
        ),
        refused(
            "shape whose bytes overflow",
            one("\"F64\"", "[2305843009213693952]", "[0,0]", 0),
            &["tensor \"w\"", "shape"],
        ),
        refused(
            "shape larger than its bytes",
            one("\"F32\"", "[2]", "[0,4]", 4),
            &["tensor \"w\"", "[2] of F32 but 4 bytes"],
        ),
        refused("shape smaller than its bytes", one(u8s, "[2]", "[0,4]", 4), &["tensor \"w\"", "4 bytes"]),
        refused("offsets that fall", one(u8s, "[4]", "[4,0]", 4), &["tensor \"w\"", "data_offsets"]),
        refused("one offset", one(u8s, "[4]", "[4]", 4), &["tensor \"w\"", "data_offsets"]),
        refused("three offsets", one(u8s, "[4]", "[0,4,8]", 8), &["tensor \"w\"", "data_offsets"]),
        refused("negative offset", one(u8s, "[4]", "[-4,0]", 4), &["tensor \"w\"", "data_offsets"]),
        refused(
            "offsets at the end of 64 bits",
            one(u8s, "[1]", "[18446744073709551614,18446744073709551615]", 4),
            &["truncated", "tensor \"w\""],
        ),
    ]
}

fn data_cases() -> Vec<Case> {
    vec![
        refused("a byte is missing", one("\"F32\"", "[1]", "[0,4]", 3), &["truncated", "tensor \"w\""]),
        refused("all data are missing", one("\"F32\"", "[1000]", "[0,4000]", 0), &["truncated", "tensor \"w\""]),
        refused("a byte too many", one("\"F32\"", "[1]", "[0,4]", 5), &["1 bytes that no tensor covers"]),
        refused("a whole archive behind the data", file("{}", 4096), &["4096 bytes that no tensor covers"]),
        refused("a hole before the first", one("\"F32\"", "[1]", "[4,8]", 8), &["tensor \"w\"", "hole"]),
        refused("a hole between", two((0, 4), (5, 9), 9), &["tensor \"b\"", "hole"]),
        refused("an overlap", two((0, 4), (2, 6), 6), &["tensor \"b\"", "overlaps"]),
        refused("the same bytes twice", two((0, 4), (0, 4), 4), &["overlaps"]),
        accepted("no tensors", file("{}", 0), "the format allows it"),
        accepted("padding behind the header", file("{}      ", 0), "the format allows it"),
        accepted("a tensor without values", one("\"F32\"", "[0,7]", "[0,0]", 0), "the format allows it"),
        accepted("a tensor without dimensions", one("\"F32\"", "[]", "[0,4]", 4), "it is a single number"),
        accepted("tensors not in the order of their bytes", two((4, 8), (0, 4), 8), "the format does not order them"),
    ]
}

#[test]
fn each_is_refused_in_words_or_accepted_for_a_reason() {
    let _turn = alone();
    let groups = [length_cases(), header_cases(), entry_cases(), data_cases(), other_kinds()];
    let cases: Vec<Case> = groups.into_iter().flatten().collect();
    assert!(cases.len() >= 36, "{} cases", cases.len());
    println!("{} safetensors files", cases.len());
    judge(FILE, cases, Archive::open);
}

#[test]
fn many_tensors_take_memory_in_proportion() {
    let _turn = alone();
    let mut header = String::from("{");
    for i in 0..40_000 {
        let comma = if i == 0 { "" } else { "," };
        write!(header, "{comma}\"t{i}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}").unwrap();
    }
    header.push('}');
    judge(FILE, vec![accepted("40,000 tensors", file(header, 0), "they are all there")], Archive::open);
}

#[test]
fn what_is_no_regular_file_does_not_block() {
    use rustix::fs::{CWD, FileType, Mode};
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe.safetensors");
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let e = crate::within_bounds("a named pipe", 0, || Archive::open(&pipe)).unwrap_err().to_string();
    assert!(e.contains("pipe.safetensors") && e.contains("regular file"), "{e}");
    let e = formats::json::read(&pipe).unwrap_err().to_string();
    assert!(e.contains("pipe.safetensors") && e.contains("regular file"), "{e}");
    let e = formats::gguf::File::open(&pipe).unwrap_err().to_string();
    assert!(e.contains("pipe.safetensors") && e.contains("regular file"), "{e}");
    let e = Archive::open(&dir.path().join("none.safetensors")).unwrap_err().to_string();
    assert!(e.contains("none.safetensors") && e.contains("No such file"), "{e}");
}
