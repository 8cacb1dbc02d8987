//! What is written is read, and what breaks a rule is refused in words that name the place.

use super::*;

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn open(bytes: &[u8]) -> Result<Archive> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    Archive::open(&path)
}

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let entry = |name: &str, n: usize| Entry {
        name: name.into(),
        dtype: Dtype::F32,
        shape: vec![n, 2],
        bytes: Bytes::from_f32((0..2 * n).map(|i| i as f32).collect()),
    };
    let path = dir.path().join("model.safetensors");
    write(&path, &[entry("b", 3), entry("a", 1), entry("empty", 0)], &[("format", "pt".into())]).unwrap();
    let archive = Archive::open(dir.path()).unwrap();
    assert_eq!(archive.metadata("format"), Some("pt"));
    assert_eq!(archive.get("b").unwrap().bytes.as_f32().unwrap()[5], 5.0);
    assert_eq!(archive.tensors().len(), 3);
}

#[test]
fn malformed_files_are_typed_errors_that_name_the_place() {
    let one = |dtype: &str, shape: &str, offsets: &str| {
        format!("{{\"w\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":{offsets}}}}}")
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "truncated"),
        (vec![1, 2, 3], "truncated"),
        (u64::MAX.to_le_bytes().to_vec(), "header's length"),
        (99_000_000u64.to_le_bytes().to_vec(), "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "git lfs pull"),
        (b"<!DOCTYPE html><html></html>".to_vec(), "web page"),
        (b"PK\x03\x04aaaaaaaaaaaa".to_vec(), "zip archive"),
        (b"\x80\x02}aaaaaaaaaaaaa".to_vec(), "pickle"),
        (b"GGUF\x03\x00\x00\x00aaaaaaaaaaaa".to_vec(), "GGUF"),
        (file(" {}", 0), "begin with"),
        (file("[]", 0), "begin with"),
        (file("{", 0), "truncated"),
        (file("{\"w\":1}", 0), "object"),
        (file(&one("F99", "[1]", "[0,4]"), 4), "dtype"),
        (file(&one("F32", "[2]", "[0,4]"), 4), "shape"),
        (file(&one("F32", "[-1]", "[0,4]"), 4), "shape"),
        (file(&one("F32", "[1.5]", "[0,4]"), 4), "shape"),
        (file(&one("F32", "\"x\"", "[0,4]"), 4), "shape"),
        (file(&one("F32", "[18446744073709551615, 2]", "[0,4]"), 4), "shape"),
        (file(&one("F32", "[4611686018427387904, 4]", "[0,0]"), 0), "shape"),
        (file(&one("F32", "[1]", "[4,0]"), 4), "data_offsets"),
        (file(&one("F32", "[1]", "[0]"), 4), "data_offsets"),
        (file(&one("F32", "[1]", "[0,4]"), 3), "truncated"),
        (file(&one("F32", "[1]", "[0,4]"), 5), "no tensor covers"),
        (file(&one("F32", "[1]", "[4,8]"), 8), "hole"),
        (
            file(
                "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[2,6]}}",
                6,
            ),
            "overlaps",
        ),
        (
            file(
                "{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}",
                0,
            ),
            "stands twice",
        ),
        (file("{\"__metadata__\":{\"a\":1}}", 0), "__metadata__"),
        (file("{\"__metadata__\":[]}", 0), "__metadata__"),
        (file("{\"w\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0],\"x\":1}}", 0), "unknown field"),
        (file(&"[".repeat(50_000), 0), "begin with"),
        (file(&format!("{{\"a\":{}", "[".repeat(50_000)), 0), "recursion"),
    ];
    for (bytes, want) in cases {
        let e = open(&bytes).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(e.contains("model.safetensors") && e.contains(want), "{want}: {e}");
    }
}

#[test]
fn shards_cannot_leave_the_directory_and_every_tensor_is_accounted_for() {
    let dir = tempfile::tempdir().unwrap();
    let entry =
        |name: &str| Entry { name: name.into(), dtype: Dtype::U8, shape: vec![1], bytes: Bytes::from_vec(vec![7]) };
    write(&dir.path().join("s1.safetensors"), &[entry("a")], &[]).unwrap();
    write(&dir.path().join("s2.safetensors"), &[entry("b"), entry("c")], &[]).unwrap();
    let index = |map: &str| {
        std::fs::write(dir.path().join("model.safetensors.index.json"), format!("{{\"weight_map\":{map}}}")).unwrap();
        Archive::open(dir.path()).map(|a| a.tensors().len()).map_err(|e| e.to_string())
    };
    let good = "{\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\",\"c\":\"s2.safetensors\"}";
    assert_eq!(index(good), Ok(3));
    for (map, want) in [
        ("{\"a\":\"../s1.safetensors\"}", "beside its index"),
        ("{\"a\":\"/etc/passwd\"}", "beside its index"),
        ("{\"a\":\"x/s1.safetensors\"}", "beside its index"),
        ("{\"a\":3}", "not a file name"),
        ("{\"a\":\"s2.safetensors\"}", "does not hold"),
        ("{\"b\":\"s2.safetensors\"}", "does not list c"),
        ("{\"a\":\"s9.safetensors\"}", "s9.safetensors"),
        ("[]", "weight_map"),
    ] {
        let e = index(map).unwrap_err();
        assert!(e.contains(want), "{want}: {e}");
    }
}
