//! Valid files changed at random, with a fixed seed: no change makes a reader panic, hang or take memory.

use crate::{alone, gguf_draft, safetensors_cases::file, within_bounds};
use formats::{gguf, json, safetensors::Archive};
use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

/// Changed files of each format.
const CHANGES: u64 = 20_000;

/// Counter-based random numbers (SplitMix64), so that the change of any number can be repeated alone.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Numbers at which arithmetic goes wrong.
const EXTREMES: [u64; 16] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x3fff_ffff_ffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffe0,
    0xffff_ffff_ffff_ffff,
];

/// Pieces of JSON that change a header's sense.
const PIECES: [&str; 10] =
    ["-1", "1e309", "null", "[]", "{}", "18446744073709551615", "\"__metadata__\"", "\\u0000", "[[[[", "\"F64\""];

fn change(bytes: &mut Vec<u8>, r: &mut Random) {
    let at = r.below(bytes.len());
    match r.below(8) {
        0 => bytes[at] ^= 1 << r.below(8),
        1 => bytes[at] = r.next() as u8,
        2 => bytes.truncate(at),
        3 => {
            let width = [1, 2, 4, 8][r.below(4)].min(bytes.len() - at);
            let value = EXTREMES[r.below(EXTREMES.len())].to_le_bytes();
            bytes[at..at + width].copy_from_slice(&value[..width]);
        }
        4 => {
            let end = (at + 1 + r.below(16)).min(bytes.len());
            bytes.drain(at..end);
        }
        5 => {
            let end = (at + 1 + r.below(64)).min(bytes.len());
            let again = bytes[at..end].to_vec();
            bytes.splice(at..at, again);
        }
        6 => {
            let piece = PIECES[r.below(PIECES.len())].bytes();
            bytes.splice(at..at, piece);
        }
        _ => {
            // A digit becomes another: lengths and offsets that are nearly right.
            let digit = bytes.iter().skip(at).position(u8::is_ascii_digit).map_or(at, |i| at + i);
            bytes[digit] = b"0123456789"[r.below(10)];
        }
    }
    if bytes.is_empty() {
        bytes.push(0);
    }
}

/// Changes a file 20,000 times, one to three changes at once, and reads each; tells how many were refused.
fn refused<T>(name: &str, valid: &[u8], open: impl Fn(&Path) -> formats::Result<T>) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, valid).unwrap();
    assert!(open(&path).is_ok(), "{name} is valid before it is changed");
    let mut refused = 0;
    for number in 0..CHANGES {
        let mut r = Random(number.wrapping_mul(0x1234_5678_9abc_def1));
        let mut bytes = valid.to_vec();
        for _ in 0..=r.below(3) {
            change(&mut bytes, &mut r);
        }
        // Headers are checked only if their length is right, so half of the time it is put right.
        if name.ends_with("safetensors") && r.below(2) == 0 && bytes.len() > 16 {
            let length = (bytes.len() as u64 - 8).min(r.next() % 2 * 64 + valid[0] as u64 + valid[1] as u64 * 256);
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        }
        // A new file each time: some file systems flush one that is cut and written again.
        fs::remove_file(&path).unwrap();
        fs::write(&path, &bytes).unwrap();
        let what = format!("{name}, change {number}");
        let result = catch_unwind(AssertUnwindSafe(|| within_bounds(&what, bytes.len(), || open(&path).map(|_| ()))));
        match result {
            Ok(Ok(())) => {}
            Ok(Err(e)) => {
                let text = e.to_string();
                assert!(text.contains(name) && !text.chars().any(char::is_control), "{what}: {text:?}");
                refused += 1;
            }
            Err(_) => panic!("{what} panics"),
        }
    }
    println!("{name}: {refused} of {CHANGES} refused");
    refused
}

#[test]
fn safetensors_survives_any_change() {
    let _turn = alone();
    let header = "{\"__metadata__\":{\"format\":\"pt\"},\
        \"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},\
        \"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[24,32]},\
        \"c\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[32,33]}}";
    let refused = refused("m.safetensors", &file(header, 33), Archive::open);
    assert!((CHANGES / 2..CHANGES).contains(&refused), "{refused}");
}

#[test]
fn gguf_survives_any_change() {
    let _turn = alone();
    let scalars: [(u32, &[u8]); 12] = [
        (0, &[1]),
        (1, &[255]),
        (2, &[1, 2]),
        (3, &[1, 2]),
        (4, &[1, 2, 3, 4]),
        (5, &[1, 2, 3, 4]),
        (6, &[0, 0, 128, 63]),
        (7, &[1]),
        (10, &[1; 8]),
        (11, &[1; 8]),
        (12, &[1; 8]),
        (4, &[9; 4]),
    ];
    let mut draft = gguf_draft::draft().key("general.alignment", 4, 32u32.to_le_bytes());
    for (i, (kind, bytes)) in scalars.iter().enumerate() {
        draft = draft.key(format!("x.scalar{i}"), *kind, bytes);
        let list = [&kind.to_le_bytes()[..], &2u64.to_le_bytes(), bytes, bytes].concat();
        draft = draft.key(format!("x.list{i}"), 9, list);
    }
    let texts = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &gguf_draft::text("ab"), &gguf_draft::text("")].concat();
    draft = draft.key("x.text", 8, gguf_draft::text("hello")).key("x.texts", 9, texts);
    draft = draft.tensor("a", &[32, 2], 2, 0).tensor("b", &[8], 0, 64).tensor("c", &[256], 12, 96).data(96 + 144);
    let refused = refused("m.gguf", &draft.bytes(), gguf::File::open);
    assert!((CHANGES / 2..CHANGES).contains(&refused), "{refused}");
}

#[test]
fn json_survives_any_change() {
    let _turn = alone();
    let text = "{\"architectures\": [\"X\"], \"hidden\": 64, \"eps\": 1e-05, \"tie\": true, \"rope\": {\"type\": null, \
        \"factor\": [1.0, 2, -3]}, \"name\": \"caf\u{e9} \\u00e9 \\ud83d\\ude00\"}";
    let refused = refused("config.json", text.as_bytes(), json::read);
    assert!((CHANGES / 4..CHANGES).contains(&refused), "{refused}");
}
