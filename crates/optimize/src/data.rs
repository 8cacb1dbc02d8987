//! Documents of tokens, split by their own hash into calibration, solver and gate.

use crate::{Error, Result};
use model::Gpt;
use std::path::Path;

pub use train::data::{Cutting, Document, SEPARATOR, documents, joined, read_text, read_tokens};

/// The data of a job, each document in one part by its own hash, so that a longer file keeps the split.
#[derive(Clone, Debug, Default)]
pub struct Split {
    /// 60 %: what methods see.
    pub calibration: Vec<Document>,
    /// 20 %: what the solver measures on.
    pub solver: Vec<Document>,
    /// 20 %: scored once, on the finished file.
    pub gate: Vec<Document>,
}

impl Split {
    /// Splits documents; equal documents fall into the same part.
    pub fn new(documents: Vec<Document>) -> Split {
        let mut split = Split::default();
        for d in documents {
            match d.percentile {
                0..60 => split.calibration.push(d),
                60..80 => split.solver.push(d),
                _ => split.gate.push(d),
            }
        }
        split
    }
}

/// Is a file a text, not one of tokens, lines or rows?
pub fn is_text(path: &Path) -> bool {
    !path.extension().is_some_and(|e| e == "u16" || e == "jsonl" || e == "parquet")
}

/// The documents of a file in any of the formats of training data, whole: text, `.jsonl`, `.parquet`, or tokens (`.u16`). A
/// text without separators comes in pieces of `context` predictions.
///
/// # Errors
/// If it cannot be read, or is of no use.
pub fn whole(gpt: &Gpt, path: &Path, separator: &str, context: usize) -> Result<Vec<Document>> {
    if path.extension().is_some_and(|e| e == "u16") {
        return Ok(read_tokens(path, &gpt.tokenizer)?);
    }
    if path.extension().is_some_and(|e| e == "jsonl") {
        return Ok(train::lines::documents(path, gpt)?);
    }
    if path.extension().is_some_and(|e| e == "parquet") {
        return Ok(train::lines::table(path, gpt)?);
    }
    let text = read_text(path)?;
    let separated = text.contains(separator);
    // A text without separators is one stream, whose pieces are split between training and validation.
    let context = if separated { usize::MAX } else { context + 1 };
    let cutting = Cutting { separator: separator.into(), context, blocks: false };
    let mut all = documents(&text, &gpt.tokenizer, &cutting)?;
    if all.is_empty() {
        return Err(Error::Data { path: path.into(), reason: "holds no document of two tokens or more".into() });
    }
    if separated && let Some(end) = gpt.tokenizer.eos().filter(|_| !gpt.tokenizer.adds_eos()) {
        // Where a document ends is to be learned as well.
        all.iter_mut().for_each(|d| d.ids.push(end));
    }
    Ok(all)
}

/// The first documents in a seeded order that hold at most `tokens` tokens; the last is cut.
pub fn take_tokens(documents: &[Document], tokens: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut order: Vec<usize> = (0..documents.len()).collect();
    order.sort_by_key(|i| (model::uniform(seed, *i as u64).to_bits(), *i));
    let mut left = tokens;
    let mut out = Vec::new();
    for i in order {
        if left < 2 {
            break;
        }
        let mut ids = documents[i].ids.clone();
        ids.truncate(left);
        left -= ids.len();
        out.push(ids);
    }
    out
}

/// Sequences in batches of about `tokens` tokens.
pub fn batches<T: AsRef<[u32]>>(sequences: &[T], tokens: usize) -> Vec<std::ops::Range<usize>> {
    let mut out = Vec::new();
    let (mut from, mut held) = (0, 0);
    for (i, s) in sequences.iter().enumerate() {
        let len = s.as_ref().len();
        if i > from && held + len > tokens {
            out.push(from..i);
            (from, held) = (i, 0);
        }
        held += len;
    }
    if from < sequences.len() {
        out.push(from..sequences.len());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doc(len: usize, percentile: u8) -> Document {
        Document { ids: vec![1; len], bytes: len, percentile, learned: None }
    }

    #[test]
    fn batches_hold_every_sequence_once() {
        let docs: Vec<Document> = [5, 9, 1, 30, 2, 2].iter().map(|n| doc(*n, 0)).collect();
        let ranges = batches(&docs, 10);
        assert_eq!(ranges, [0..1, 1..3, 3..4, 4..6]);
        assert!(batches::<Document>(&[], 10).is_empty());
    }

    #[test]
    fn a_split_follows_the_hash_and_a_sample_the_seed() {
        let docs: Vec<Document> = (0..100).map(|p| doc(10, p)).collect();
        let split = Split::new(docs.clone());
        assert_eq!((split.calibration.len(), split.solver.len(), split.gate.len()), (60, 20, 20));
        let taken = take_tokens(&docs, 95, 1);
        assert_eq!(taken.iter().map(Vec::len).sum::<usize>(), 95);
        assert_eq!(taken, take_tokens(&docs, 95, 1));
    }
}
