//! GGUF files whose tensors are impossible, or lie where they cannot.

use crate::{
    cases::Case,
    gguf_draft::{F32, Q4_0, TEXT, U32, draft, long_text, no, text, yes},
};

pub fn alignment_cases() -> Vec<Case> {
    let aligned = |value: u32| draft().key("general.alignment", U32, value.to_le_bytes()).tensor("w", &[8], F32, 0);
    vec![
        no("alignment of 0", aligned(0).data(32), &["general.alignment", "power of two"]),
        no("alignment of 1", aligned(1).data(32), &["general.alignment", "power of two"]),
        no("alignment of 33", aligned(33).data(32), &["general.alignment", "power of two"]),
        no("alignment of all ones", aligned(u32::MAX).data(32), &["general.alignment", "power of two"]),
        no("alignment of 2 GiB in a small file", aligned(1 << 31).data(32), &["truncated", "tensor \"w\""]),
        no("alignment that is a text", draft().key("general.alignment", TEXT, text("32")), &["general.alignment"]),
        no("alignment in 64 bits", draft().key("general.alignment", 10, 32u64.to_le_bytes()), &["general.alignment"]),
        yes("alignment of 64", aligned(64).align(64).data(32), "the format allows it"),
    ]
}

pub fn tensor_cases() -> Vec<Case> {
    let one = |ne: &[u64], kind: u32, offset: u64| draft().tensor("w", ne, kind, offset).data(64);
    let big = 1u64 << 32;
    vec![
        no("empty name", draft().tensor("", &[1], F32, 0).data(32), &["name of tensor 0", "0 bytes"]),
        no(
            "name of 64 KB",
            draft().tensor("n".repeat(65_536), &[1], F32, 0).data(32),
            &["name of tensor 0", "65536 bytes"],
        ),
        no(
            "name longer than the file",
            draft().raw_tensor([&long_text()[..], &[0; 40]].concat()),
            &["truncated", "name of tensor 0"],
        ),
        no("name that is not UTF-8", draft().tensor(b"w\xfe", &[1], F32, 0).data(32), &["name of tensor 0", "UTF-8"]),
        no(
            "a tensor twice",
            draft().tensor("w", &[1], F32, 0).tensor("w", &[1], F32, 32).data(64),
            &["tensor \"w\"", "twice"],
        ),
        no("no dimensions", one(&[], F32, 0), &["tensor \"w\"", "0 dimensions"]),
        no("five dimensions", one(&[1; 5], F32, 0), &["tensor \"w\"", "5 dimensions"]),
        no(
            "four billion dimensions",
            draft().raw_tensor([&text("w")[..], &[0xff; 4], &[0; 40]].concat()),
            &["tensor \"w\"", "4294967295 dimensions"],
        ),
        no("unknown type", one(&[8], 99, 0), &["tensor \"w\"", "type 99", "newer planish"]),
        no("dropped type", one(&[32], 4, 0), &["tensor \"w\"", "dropped", "convert"]),
        no("type of all ones", one(&[8], u32::MAX, 0), &["tensor \"w\"", "4294967295"]),
        no("row that is no whole number of blocks", one(&[33], Q4_0, 0), &["tensor \"w\"", "[33]", "multiples of 32"]),
        no(
            "row of half a block, columns that make it up",
            one(&[16, 2], Q4_0, 0),
            &["tensor \"w\"", "multiples of 32"],
        ),
        no("dimension beyond 63 bits", one(&[1 << 63], F32, 0), &["tensor \"w\"", "shape"]),
        no("elements that overflow", one(&[big, big], F32, 0), &["tensor \"w\"", "shape"]),
        no("elements that overflow to a small number", one(&[big, big, 1, 2], F32, 0), &["tensor \"w\"", "shape"]),
        no("elements that overflow, times nothing", one(&[big, big, 0], F32, 0), &["tensor \"w\"", "shape"]),
        no("bytes that overflow", one(&[(1 << 62) - 32], F32, 0), &["truncated", "tensor \"w\""]),
        no("an exabyte that fits 63 bits", one(&[1 << 58], F32, 0), &["truncated", "tensor \"w\""]),
        yes("a tensor without values", one(&[8, 0], F32, 0), "llama.cpp accepts it"),
    ]
}

pub fn offset_cases() -> Vec<Case> {
    let pair = |a: u64, b: u64| draft().tensor("a", &[16], F32, a).tensor("b", &[16], F32, b).data(128);
    vec![
        no(
            "offset that is not aligned",
            draft().tensor("w", &[1], F32, 4).data(64),
            &["tensor \"w\"", "offset 4", "alignment 32"],
        ),
        no("offset behind the end", draft().tensor("w", &[1], F32, 1 << 20).data(64), &["truncated", "tensor \"w\""]),
        no(
            "offset at the end of 64 bits",
            draft().tensor("w", &[1], F32, u64::MAX - 31).data(64),
            &["truncated", "tensor \"w\""],
        ),
        no(
            "offset and size that wrap around",
            draft().tensor("w", &[1 << 40], F32, u64::MAX - 31).data(64),
            &["truncated", "tensor \"w\""],
        ),
        no("the same bytes twice", pair(0, 0), &["overlaps", "tensor \"a\"", "tensor \"b\""]),
        no("an overlap", pair(0, 32), &["overlaps", "tensor \"b\""]),
        no("an overlap in the order of the data", pair(32, 0), &["overlaps", "tensor \"a\""]),
        no("data missing", draft().tensor("w", &[64], F32, 0).data(255), &["truncated", "tensor \"w\"", "download"]),
        no("all data missing", draft().tensor("w", &[64], F32, 0), &["truncated", "tensor \"w\""]),
        no(
            "size declared above the file's",
            draft().tensor("w", &[1 << 30], F32, 0).data(64),
            &["truncated", "tensor \"w\""],
        ),
        yes("a gap between tensors", pair(0, 64), "the format asks for alignment only"),
        yes("tensors not in the order of the data", pair(64, 0), "each lies inside the file"),
        yes("bytes behind the last tensor", draft().tensor("w", &[1], F32, 0).data(4096), "ggml pads there"),
        yes("last tensor not padded", draft().tensor("w", &[1], F32, 0).data(4), "some writers leave it out"),
    ]
}
