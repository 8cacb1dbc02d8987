//! Importance matrices, the statistics that llama.cpp quantizes with: of each stored matrix the sum of the squares of every
//! input, and over how many rows. Names are those of the tensors in a GGUF file.
//!
//! Layouts: <https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix>. A GGUF file without a model, `general.type`
//! "imatrix", with `NAME.in_sum2` `[matrices, inputs]` and `NAME.counts` `[matrices, 1]` as floats; or the older `.dat`, a
//! list of names and means.

use crate::{
    Error, Result,
    error::check_kind,
    gguf::{self, GgmlType, Texts, Value, Writer, cursor::Cursor},
};
use std::{collections::BTreeMap, path::Path};
use tensor::Bytes;

/// Ends of the names of the two tensors of an entry.
const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
/// The longest name of a matrix: a tensor's name may be longer in files that some builds of ggml write.
const LONGEST_NAME: u64 = 256;
/// The least bytes of an entry of the older layout: the length of its name, calls, values, one of them.
const LEAST_ENTRY: u64 = 4 * 4;

/// Statistics of the inputs of some matrices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    /// By the name of the stored matrix.
    pub entries: BTreeMap<String, Entry>,
    /// What text they were gathered on.
    pub datasets: Vec<String>,
    /// Sequences of `chunk_size` tokens that they were gathered on.
    pub chunks: u32,
    /// Tokens of a sequence; 0 where the file does not tell.
    pub chunk_size: u32,
}

/// The statistics of one stored matrix, or of several in one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Sums of squares, `[matrices, inputs]`; in the older layout means, times the calls that `counts` holds.
    pub sums: Vec<f32>,
    /// Rows that were summed, of each matrix.
    pub counts: Vec<f32>,
}

impl Imatrix {
    /// Reads a file of either layout.
    ///
    /// # Errors
    /// If it breaks a rule of its layout, or a sum is no number from 0 on.
    pub fn read(path: &Path) -> Result<Imatrix> {
        let bytes = Bytes::map(path).map_err(Error::io(path, "open it"))?;
        let all = if bytes.starts_with(b"GGUF") { Imatrix::of_gguf(path)? } else { Imatrix::of_list(path, &bytes)? };
        for (name, entry) in &all.entries {
            if let Some(bad) = entry.sums.iter().chain(&entry.counts).find(|v| !(v.is_finite() && **v >= 0.0)) {
                return Err(Error::field(path, name, format!("holds {bad}, no sum of squares; gather it again")));
            }
        }
        Ok(all)
    }

    fn of_gguf(path: &Path) -> Result<Imatrix> {
        let file = gguf::File::open(path)?;
        if file.text("general.type")? != Some("imatrix") {
            let reason = "is not \"imatrix\": the file is a model, or statistics of another program";
            return Err(Error::field(path, "general.type", reason));
        }
        let small = |key: &str| -> Result<u32> {
            let reason = || Error::field(path, key, "must be a whole number of 32 bits");
            u32::try_from(file.count(key)?.unwrap_or(0)).map_err(|_| reason())
        };
        let mut all = Imatrix {
            entries: BTreeMap::new(),
            datasets: file.texts("imatrix.datasets")?.unwrap_or_default(),
            chunks: small("imatrix.chunk_count")?,
            chunk_size: small("imatrix.chunk_size")?,
        };
        let floats = |name: &str| -> Result<Vec<f32>> {
            let missing = || Error::field(path, name, "is missing; the file is damaged: gather it again");
            let tensor = file.tensor(name).ok_or_else(missing)?;
            if tensor.kind != GgmlType::F32 {
                return Err(Error::field(path, name, format!("is stored as {}, and must be F32", tensor.kind)));
            }
            Ok(tensor.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        for tensor in file.tensors() {
            let Some(name) = tensor.name.strip_suffix(SUMS) else {
                // Sums are asked for by name below, so counts without them are told here.
                let alone = tensor.name.strip_suffix(COUNTS).map(|name| format!("{name}{SUMS}"));
                alone.map_or(Ok(()), |sums| floats(&sums).map(|_| ()))?;
                continue;
            };
            let entry = Entry { sums: floats(&tensor.name)?, counts: floats(&format!("{name}{COUNTS}"))? };
            if entry.sums.is_empty() || entry.counts.is_empty() || !entry.sums.len().is_multiple_of(entry.counts.len())
            {
                let (sums, counts) = (entry.sums.len(), entry.counts.len());
                return Err(Error::field(path, name, format!("has {sums} sums, no multiple of its {counts} counts")));
            }
            all.entries.insert(name.into(), entry);
        }
        Ok(all)
    }

    /// The older layout: how many entries; of each the length of its name, the name, calls, the number of values, those;
    /// then, in newer files, all calls and the name of the text.
    fn of_list(path: &Path, bytes: &[u8]) -> Result<Imatrix> {
        check_kind(path, &bytes[..bytes.len().min(64)], "an importance matrix")?;
        let mut c = Cursor { path, bytes, at: 0 };
        let count = c.u32("the number of entries")?;
        if count == 0 || u64::from(count) > c.left() / LEAST_ENTRY {
            let reason = format!("is {count}, and the {} bytes behind it are no such list", c.left());
            return Err(c.bad("the number of entries", reason));
        }
        let mut all = Imatrix::default();
        for i in 0..count {
            let field = format!("entry {i}");
            let name = short_text(&mut c, &field)?.to_string();
            let calls = c.u32(&field)?;
            let values = u64::from(c.u32(&field)?);
            if values == 0 {
                return Err(c.bad(&field, "has no values"));
            }
            let sums = c.take(4 * values, &field)?.as_chunks::<4>().0;
            let sums = sums.iter().map(|b| f32::from_le_bytes(*b)).collect();
            if all.entries.insert(name, Entry { sums, counts: vec![calls as f32] }).is_some() {
                return Err(c.bad(&field, "has the name of another entry"));
            }
        }
        if c.left() >= 4 {
            all.chunks = c.u32("the calls")?;
        }
        if c.left() >= 4 {
            all.datasets.push(short_text(&mut c, "the name of the text")?.into());
        }
        Ok(all)
    }

    /// Writes a GGUF file, entries by name.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut out = Writer::new();
        out.set("general.type", "imatrix");
        out.set("imatrix.datasets", Texts::from_iter(self.datasets.iter().map(String::as_str)));
        out.set("imatrix.chunk_count", Value::U32(self.chunks));
        out.set("imatrix.chunk_size", Value::U32(self.chunk_size));
        for (name, entry) in &self.entries {
            let (inputs, matrices) = (entry.sums.len() / entry.counts.len().max(1), entry.counts.len());
            let mut put = |end: &str, width: usize, values: &Vec<f32>| {
                let shape = if matrices == 1 { vec![width] } else { vec![matrices, width] };
                let bytes = Bytes::from_f32(values.clone());
                out.tensor(format!("{name}{end}"), shape, GgmlType::F32, Box::new(move || Ok(bytes.clone())));
            };
            put(SUMS, inputs, &entry.sums);
            put(COUNTS, 1, &entry.counts);
        }
        out.write(path)
    }
}

/// A text behind its length of 32 bits.
fn short_text<'a>(c: &mut Cursor<'a>, field: &str) -> Result<&'a str> {
    let length = u64::from(c.u32(field)?);
    if length > LONGEST_NAME {
        return Err(c.bad(field, format!("has a name of {length} bytes; at most {LONGEST_NAME} are allowed")));
    }
    std::str::from_utf8(c.take(length, field)?).map_err(|_| c.bad(field, "has a name that is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Imatrix {
        let one = Entry { sums: vec![1.5, 0.0, 3.0], counts: vec![7.0] };
        let two = Entry { sums: vec![1.0, 2.0, 3.0, 4.0], counts: vec![5.0, 0.0] };
        Imatrix {
            entries: [("b.weight".to_string(), one), ("a.weight".to_string(), two)].into(),
            datasets: vec!["stories.txt".into()],
            chunks: 3,
            chunk_size: 512,
        }
    }

    fn list(entries: &[(&str, u32, &[f32])], end: &[u8]) -> Vec<u8> {
        let mut out = (entries.len() as u32).to_le_bytes().to_vec();
        for (name, calls, values) in entries {
            out.extend((name.len() as u32).to_le_bytes());
            out.extend(name.as_bytes());
            out.extend(calls.to_le_bytes());
            out.extend((values.len() as u32).to_le_bytes());
            values.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        [out, end.to_vec()].concat()
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.gguf");
        sample().write(&path).unwrap();
        assert_eq!(Imatrix::read(&path).unwrap(), sample());
        let file = gguf::File::open(&path).unwrap();
        let keys: Vec<&str> = file.metadata().iter().map(|(k, _)| k.as_str()).collect();
        assert_eq!(keys, ["general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"]);
        let shapes: Vec<(&str, &[usize])> = file.tensors().iter().map(|t| (t.name.as_str(), &t.shape[..])).collect();
        assert_eq!(
            shapes,
            [
                ("a.weight.in_sum2", &[2, 2][..]),
                ("a.weight.counts", &[2, 1]),
                ("b.weight.in_sum2", &[3]),
                ("b.weight.counts", &[1])
            ]
        );
    }

    #[test]
    fn the_older_list_is_read_with_its_end_and_without() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.dat");
        let values: &[f32] = &[2.0, 4.0];
        for (end, chunks, texts) in [(&b""[..], 0, 0), (&b"\x09\0\0\0"[..], 9, 0), (b"\x09\0\0\0\x02\0\0\0ab", 9, 1)] {
            std::fs::write(&path, list(&[("a.weight", 4, values)], end)).unwrap();
            let read = Imatrix::read(&path).unwrap();
            assert_eq!(read.entries["a.weight"], Entry { sums: values.to_vec(), counts: vec![4.0] });
            assert_eq!((read.chunks, read.datasets.len()), (chunks, texts));
        }
    }

    #[test]
    fn damaged_files_are_told_and_never_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.gguf");
        let fails = |bytes: &[u8], says: &str| {
            std::fs::write(&path, bytes).unwrap();
            let e = Imatrix::read(&path).unwrap_err().to_string();
            assert!(e.contains("i.gguf") && e.contains(says), "{says}: {e}");
        };
        fails(b"", "the number of entries");
        fails(&u32::MAX.to_le_bytes(), "no such list");
        fails(&[&[0; 4][..], &[1; 60]].concat(), "no such list");
        fails(b"PK\x03\x04                    ", "zip archive");
        let good = list(&[("a", 4, &[1.0, 2.0]), ("b", 4, &[1.0])], b"");
        (5..good.len()).for_each(|n| fails(&good[..n], ""));
        let mut huge = good.clone();
        huge[13..17].copy_from_slice(&u32::MAX.to_le_bytes());
        fails(&huge, "truncated");
        huge[4..8].copy_from_slice(&(1u32 << 20).to_le_bytes());
        fails(&huge, "256 are allowed");
        fails(&list(&[("a", 4, &[1.0]), ("a", 4, &[1.0])], b""), "another entry");
        fails(&list(&[("a", 4, &[]), ("bbbbbbbb", 4, &[1.0])], b""), "no values");
        fails(&list(&[("a", 4, &[f32::NAN])], b""), "holds NaN");
        fails(&list(&[("a", 4, &[-1.0])], b""), "holds -1");

        let written = |change: &dyn Fn(&mut Writer<'_>)| {
            let mut out = Writer::new();
            out.set("general.type", "imatrix");
            change(&mut out);
            out.write(&path).unwrap();
            std::fs::read(&path).unwrap()
        };
        let tensor = |out: &mut Writer<'_>, name: &str, kind: GgmlType, values: usize| {
            let bytes = Bytes::from_vec(vec![0; kind.bytes_of(&[values]).unwrap() as usize]);
            out.tensor(name, vec![values], kind, Box::new(move || Ok(bytes.clone())));
        };
        fails(&written(&|o| o.set("general.type", "model")), "general.type");
        fails(&written(&|o| o.set("imatrix.chunk_count", u64::MAX)), "32 bits");
        fails(&written(&|o| o.set("imatrix.datasets", 3u32)), "list of texts");
        fails(&written(&|o| tensor(o, "a.in_sum2", GgmlType::F32, 4)), "a.counts");
        fails(&written(&|o| tensor(o, "a.counts", GgmlType::F32, 1)), "a.in_sum2");
        fails(
            &written(&|o| {
                [("a.in_sum2", 4), ("a.counts", 3)].map(|(n, v)| tensor(o, n, GgmlType::F32, v)).into_iter().collect()
            }),
            "3 counts",
        );
        fails(
            &written(&|o| {
                [("a.in_sum2", 4), ("a.counts", 0)].map(|(n, v)| tensor(o, n, GgmlType::F32, v)).into_iter().collect()
            }),
            "0 counts",
        );
        fails(
            &written(&|o| {
                [("a.in_sum2", GgmlType(1)), ("a.counts", GgmlType::F32)]
                    .map(|(n, k)| tensor(o, n, k, 1))
                    .into_iter()
                    .collect()
            }),
            "must be F32",
        );
        let good = written(&|o| {
            [("a.in_sum2", 4), ("a.counts", 1)].map(|(n, v)| tensor(o, n, GgmlType::F32, v)).into_iter().collect()
        });
        (5..good.len() - 60).step_by(3).for_each(|n| fails(&good[..n], ""));
    }
}
