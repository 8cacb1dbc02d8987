//! GGUF files that break a rule of the format.

use crate::{
    alone,
    cases::{Case, judge, other_kinds, refused},
    gguf_draft::{BOOL, Draft, F32, LIST, TEXT, U8, U32, draft, list, long_text, no, text, yes},
    gguf_tensor_cases::{alignment_cases, offset_cases, tensor_cases},
};
use formats::gguf::File;

const FILE: &str = "model.gguf";

fn header_cases() -> Vec<Case> {
    vec![
        refused("empty file", "", &["truncated", "the magic"]),
        refused("half a magic", "GG", &["truncated", "the magic"]),
        refused("a magic alone", "GGUF", &["truncated", "the version"]),
        refused("a header cut at the counts", draft().bytes()[..20].to_vec(), &["truncated", "the number of keys"]),
        no("wrong magic", Draft { magic: *b"GGML", ..draft() }, &["byte 0", "the magic"]),
        no("version 0", draft().version(0), &["the version", "is 0"]),
        no("version 1", draft().version(1), &["the version", "is 1", "convert it anew"]),
        no("a version to come", draft().version(4), &["the version", "is 4", "newer planish"]),
        no("big endian", draft().version(3u32.swap_bytes()), &["big endian", "gguf_convert_endian.py"]),
        no(
            "more tensors than bytes",
            draft().counts(u64::MAX, 0),
            &["the number of tensors", "is 18446744073709551615"],
        ),
        no("a million tensors in 24 bytes", draft().counts(1_000_000, 0), &["the number of tensors"]),
        no("more keys than bytes", draft().counts(0, u64::MAX), &["the number of keys"]),
        no("a negative number of keys", draft().counts(0, 1 << 63), &["the number of keys"]),
        no("one key too few", draft().key("a", U8, [1]).counts(0, 2), &["the number of keys", "room for"]),
        no("one tensor too few", draft().tensor("a", &[1], F32, 0).data(4).counts(3, 0), &["tensor"]),
        refused("a safetensors file", b"\x10\0\0\0\0\0\0\0{\"w\":{}        }".to_vec(), &["safetensors file"]),
        refused("a JSON error saved as the file", "{\"error\":\"Repository not found\"}", &["JSON text"]),
        yes("nothing at all in it", draft(), "the format allows it"),
        yes("version 2", draft().version(2), "it differs from 3 in nothing that is read"),
    ]
}

fn key_cases() -> Vec<Case> {
    let long = |len: u64| [&len.to_le_bytes()[..], b"abcdefghijklmnop"].concat();
    vec![
        no("empty key", draft().key("", U8, [1]), &["key 0", "0 bytes"]),
        no("key of all the bytes there could be", draft().raw_key(long(u64::MAX)), &["truncated", "key 0"]),
        no("key longer than the file", draft().raw_key(long(1 << 40)), &["truncated", "key 0"]),
        no("key of 65,536 bytes", draft().key("k".repeat(65_536), U8, [1]), &["key 0", "65536 bytes"]),
        no("key that is not UTF-8", draft().key(b"a\xff", U8, [1]), &["key 0", "UTF-8"]),
        no("a key twice", draft().key("a.b", U8, [1]).key("a.b", U8, [1]), &["key \"a.b\"", "twice"]),
        no(
            "a key twice with other types",
            draft().key("a.b", U8, [1]).key("a.b", U32, [1, 0, 0, 0]),
            &["\"a.b\"", "twice"],
        ),
        no("unknown value type", draft().key("a", 13, [0; 8]), &["key \"a\"", "value type 13"]),
        no("value type of all ones", draft().key("a", u32::MAX, [0; 8]), &["key \"a\"", "value type 4294967295"]),
        no("value cut", draft().key("a", U32, [1, 2]), &["truncated", "key \"a\""]),
        no("boolean of 2", draft().key("a", BOOL, [2]), &["key \"a\"", "holds 2"]),
        no("a key that rewrites the terminal", draft().key("\x1b[2J\x07", BOOL, [9]), &["\\u{1b}[2J", "holds 9"]),
    ]
}

fn text_and_list_cases() -> Vec<Case> {
    let huge = 1_000_000_000u64;
    let nested = (0..100_000).fold(Vec::new(), |mut out: Vec<u8>, _| {
        out.extend(list(LIST, 1, &[]));
        out
    });
    vec![
        no(
            "text of all the bytes there could be",
            draft().key("a", TEXT, u64::MAX.to_le_bytes()),
            &["truncated", "key \"a\""],
        ),
        no("text longer than the file", draft().key("a", TEXT, 100u64.to_le_bytes()), &["truncated", "key \"a\""]),
        no("text that is not UTF-8", draft().key("a", TEXT, text([0xc3, 0x28])), &["key \"a\"", "UTF-8"]),
        no(
            "a billion bytes in a list of none",
            draft().key("a", LIST, list(U8, huge, &[])),
            &["truncated", "key \"a\""],
        ),
        no(
            "a billion texts in a list of none",
            draft().key("a", LIST, list(TEXT, huge, &[])),
            &["truncated", "key \"a\""],
        ),
        no("list of all ones", draft().key("a", LIST, list(10, u64::MAX, &[0; 64])), &["truncated", "key \"a\""]),
        no(
            "list whose bytes overflow",
            draft().key("a", LIST, list(10, 1 << 61, &[0; 64])),
            &["truncated", "key \"a\""],
        ),
        no("list one value short", draft().key("a", LIST, list(U32, 3, &[0; 8])), &["truncated", "key \"a\""]),
        no("unknown element type", draft().key("a", LIST, list(77, 1, &[0; 64])), &["key \"a\"", "element type 77"]),
        no(
            "a boolean of 255 in a list",
            draft().key("a", LIST, list(BOOL, 3, &[0, 1, 255])),
            &["key \"a\"", "holds 255"],
        ),
        no(
            "a text in a list that is not UTF-8",
            draft().key("a", LIST, list(TEXT, 2, &[text("x"), text([0x80])].concat())),
            &["a\"[1]", "UTF-8"],
        ),
        no(
            "a text in a list longer than the file",
            draft().key("a", LIST, list(TEXT, 2, &[text("x"), long_text()].concat())),
            &["truncated", "key \"a\""],
        ),
        no(
            "a list of lists",
            draft().key("a", LIST, list(LIST, 1, &list(U8, 1, &[1]))),
            &["key \"a\"", "list of lists"],
        ),
        no("lists nested 100,000 deep", draft().key("a", LIST, nested), &["key \"a\"", "list of lists"]),
        yes(
            "empty lists",
            draft().key("a", LIST, list(TEXT, 0, &[])).key("b", LIST, list(U8, 0, &[])),
            "llama.cpp writes them",
        ),
        yes(
            "a megabyte of empty texts",
            draft().key("a", LIST, list(TEXT, 131_072, &vec![0; 1 << 20])),
            "they are there",
        ),
        yes("a megabyte of booleans", draft().key("a", LIST, list(BOOL, 1 << 20, &vec![1; 1 << 20])), "they are there"),
    ]
}

#[test]
fn each_is_refused_in_words_or_accepted_for_a_reason() {
    let _turn = alone();
    let groups = [
        header_cases(),
        key_cases(),
        text_and_list_cases(),
        alignment_cases(),
        tensor_cases(),
        offset_cases(),
        other_kinds(),
    ];
    let cases: Vec<Case> = groups.into_iter().flatten().collect();
    assert!(cases.len() >= 50, "{} cases", cases.len());
    println!("{} GGUF files", cases.len());
    judge(FILE, cases, File::open);
}

#[test]
fn many_keys_and_tensors_are_read_in_linear_time() {
    let _turn = alone();
    let keys = (0..20_000).fold(draft(), |d, i| d.key(format!("k{i}"), U8, [1]));
    let both = (0..20_000).fold(keys, |d, i| d.tensor(format!("t{i}"), &[0], F32, 0));
    judge(FILE, vec![yes("20,000 keys and tensors", both, "they are all there")], |path| {
        let file = File::open(path)?;
        assert_eq!((file.metadata().len(), file.tensors().len()), (20_000, 20_000));
        Ok(())
    });
}

#[test]
fn a_cut_at_any_byte_is_told() {
    let _turn = alone();
    let whole = draft().key("a.text", TEXT, text("hello")).tensor("w", &[8], F32, 0).data(32).bytes();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    for at in 0..whole.len() {
        std::fs::write(&path, &whole[..at]).unwrap();
        let e = File::open(&path).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(e.contains(FILE), "cut at {at}: {e}");
    }
}
