//! What is written is read, whole and split.

use super::*;

fn sample() -> Writer<'static> {
    let mut w = Writer::new();
    w.set("general.architecture", "x");
    w.set("x.list", vec![1.5f32, 2.5]);
    w.set("x.flag", true);
    w.set("x.names", Texts::from_iter(["a", "b\u{e9}", ""]));
    w.set("x.none", Texts::default());
    w.set("x.count", 7u32);
    w.set("x.below", vec![-1i32, 2]);
    w.set("x.far", vec![1u64 << 60]);
    w.set("x.bits", vec![true, false]);
    w.tensor("a", vec![2, 32], GgmlType(2), Box::new(|| Ok(Bytes::from_vec((0..36).collect()))));
    w.tensor("b", vec![3], GgmlType::F32, Box::new(|| Ok(Bytes::from_f32(vec![1.0, 2.0, 3.0]))));
    w.tensor("empty", vec![0, 4], GgmlType::F32, Box::new(|| Ok(Bytes::from_vec(Vec::new()))));
    w
}

fn one(name: &'static str, shape: Vec<usize>, kind: u32, bytes: usize) -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let mut w = Writer::new();
    w.tensor(name, shape, GgmlType(kind), Box::new(move || Ok(Bytes::from_vec(vec![0; bytes]))));
    w.write(&dir.path().join("m.gguf"))
}

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    sample().write(&path).unwrap();
    let f = File::open(&path).unwrap();
    assert_eq!(f.metadata().len(), 9);
    assert_eq!(f.tensor("a").unwrap().shape, [2, 32]);
    assert_eq!(&f.tensor("a").unwrap().bytes[34..], [34, 35]);
    assert_eq!(f.tensor("b").unwrap().bytes.as_f32(), Some(&[1.0, 2.0, 3.0][..]));
    assert!(f.tensor("empty").unwrap().bytes.is_empty() && f.tensor("c").is_none());
    assert_eq!(f.texts("x.names").unwrap().unwrap(), ["a", "b\u{e9}", ""]);
    assert_eq!(f.texts("x.none").unwrap().unwrap(), [""; 0]);
    assert_eq!(f.numbers("x.below").unwrap().unwrap(), [-1.0, 2.0]);
    assert_eq!(f.counts("x.far").unwrap().unwrap(), [1 << 60]);
    assert_eq!(f.list("x.bits").unwrap(), Some(&Array::Bool(vec![true, false])));
    assert_eq!(f.text("no.such").unwrap(), None);
    assert!(f.counts("x.below").unwrap_err().to_string().contains("`x.below` must be a list of whole numbers"));
    assert!(f.count("x.flag").unwrap_err().to_string().contains("m.gguf: `x.flag` must be a whole number"));
}

#[test]
fn the_same_content_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    sample().write(&a).unwrap();
    sample().write(&b).unwrap();
    assert_eq!(std::fs::read(a).unwrap(), std::fs::read(b).unwrap());
}

#[test]
fn what_no_reader_could_take_is_not_written() {
    assert!(one("a", vec![2, 32], 2, 36).is_ok());
    for (name, shape, kind, bytes, want) in [
        ("a", vec![2, 33], 2, 36, "cannot be stored as Q4_0"),
        ("a", vec![2, 32], 2, 35, "has 35 bytes where its shape asks for 36"),
        ("a", vec![1; 5], 0, 4, "5 dimensions"),
        ("a", vec![], 0, 4, "0 dimensions"),
        ("a", vec![usize::MAX, 2], 0, 4, "cannot be stored"),
        ("a", vec![1], 4, 4, "cannot be stored as unknown"),
        ("", vec![1], 0, 4, "0 bytes"),
    ] {
        let e = one(name, shape, kind, bytes).unwrap_err().to_string();
        assert!(e.contains("m.gguf") && e.contains(want), "{want}: {e}");
    }
}

#[test]
fn split_files_are_opened_together() {
    let dir = tempfile::tempdir().unwrap();
    let part = |no: u16, count: u16, name: &'static str| {
        let mut w = Writer::new();
        w.set("split.no", no);
        w.set("split.count", count);
        w.set("split.tensors.count", 2i32);
        w.tensor(name, vec![1], GgmlType::F32, Box::new(|| Ok(Bytes::from_f32(vec![1.0]))));
        w.write(&dir.path().join(format!("m-{:05}-of-00002.gguf", no + 1))).unwrap();
    };
    let open = |i: usize| File::open(&dir.path().join(format!("m-0000{i}-of-00002.gguf"))).map_err(|e| e.to_string());
    part(0, 2, "a");
    assert!(open(1).unwrap_err().contains("m-00002-of-00002.gguf is missing"));
    part(1, 2, "b");
    for i in 1..=2 {
        let f = open(i).unwrap();
        assert_eq!((f.tensors().len(), f.files().len()), (2, 2));
        assert!(f.tensor("a").is_some() && f.tensor("b").is_some());
    }
    part(1, 2, "a");
    assert!(open(1).unwrap_err().contains("another part holds"));
    part(1, 3, "b");
    assert!(open(1).unwrap_err().contains("`split.count` is 3, not 2"));
    std::fs::copy(dir.path().join("m-00001-of-00002.gguf"), dir.path().join("m-00002-of-00002.gguf")).unwrap();
    assert!(open(1).unwrap_err().contains("`split.no` is 0, not 1"));
    std::fs::copy(dir.path().join("m-00001-of-00002.gguf"), dir.path().join("m.gguf")).unwrap();
    let alone = File::open(&dir.path().join("m.gguf")).unwrap_err().to_string();
    assert!(alone.contains("must end in -00001-of-00002.gguf"), "{alone}");
}
