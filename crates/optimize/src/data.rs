//! Documents of tokens, split by their own hash into calibration, solver and gate.

use crate::{Error, Recipe, Result};
use model::Gpt;
use std::path::Path;

pub use train::{
    data::{Cutting, Document, SEPARATOR, documents, joined, read_text, read_tokens},
    lines::Purpose,
};

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
pub fn whole(gpt: &Gpt, path: &Path, separator: &str, context: usize, purpose: Purpose) -> Result<Vec<Document>> {
    if path.extension().is_some_and(|e| e == "u16") {
        return Ok(read_tokens(path, &gpt.tokenizer)?);
    }
    if path.extension().is_some_and(|e| e == "jsonl") {
        return Ok(train::lines::documents(path, gpt, purpose)?);
    }
    if path.extension().is_some_and(|e| e == "parquet") {
        return Ok(train::lines::table(path, gpt, purpose)?);
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

/// Tokens of the sequences that packed documents are cut into, where the model's context holds as many.
const PACKED: usize = 2048;

/// What methods see of some documents: each by itself, or joined and cut into full sequences, as the recipe says.
///
/// # Errors
/// If joined documents do not fill one sequence.
pub fn calibration(documents: &[Document], recipe: &Recipe, gpt: &Gpt) -> Result<Vec<Vec<u32>>> {
    if !recipe.packed {
        return Ok(take_tokens(documents, recipe.calibration_tokens, recipe.seed));
    }
    let size = PACKED.min(gpt.model.spec.context).min(recipe.calibration_tokens).max(2);
    // Where documents begin with no mark, the one that ends them keeps them apart.
    let end = gpt.tokenizer.eos().filter(|_| !gpt.tokenizer.adds_bos());
    let ended = |d: &Document| {
        let mut d = Document { learned: None, ..d.clone() };
        d.ids.extend(end.filter(|end| d.ids.last() != Some(end)));
        d
    };
    let stream = joined(&documents.iter().map(ended).collect::<Vec<_>>(), recipe.seed).ids;
    let most = (recipe.calibration_tokens / size).max(1);
    let sequences: Vec<Vec<u32>> = stream.chunks_exact(size).take(most).map(<[u32]>::to_vec).collect();
    if sequences.is_empty() {
        let path = recipe.data.clone().unwrap_or_else(|| "--packed".into());
        let reason = format!(
            "leaves {} tokens for calibration, and a packed sequence takes {size}; give more text, or leave out --packed",
            stream.len()
        );
        return Err(Error::Data { path, reason });
    }
    Ok(sequences)
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
    fn packed_documents_fill_their_sequences() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in sample::files() {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let gpt = Gpt::open(dir.path()).unwrap();
        let context = gpt.model.spec.context.min(PACKED);
        let docs: Vec<Document> = (0..60).map(|n| Document { ids: vec![n + 5; 40], ..Document::default() }).collect();
        let mut recipe = Recipe::one("gptq", tensor::Storage::F32, 3);
        assert_eq!(calibration(&docs, &recipe, &gpt).unwrap().len(), 60);
        recipe.packed = true;
        let packed = calibration(&docs, &recipe, &gpt).unwrap();
        assert!(packed.iter().all(|s| s.len() == context) && packed.len() >= 60 * 40 / context);
        assert_eq!(packed, calibration(&docs, &recipe, &gpt).unwrap());
        assert!(docs.iter().filter(|d| packed.iter().any(|s| s.contains(&d.ids[0]))).count() > 40);
        recipe.calibration_tokens = 3 * context + 1;
        assert_eq!(calibration(&docs, &recipe, &gpt).unwrap().len(), 3);
        let e = calibration(&docs[..1], &recipe, &gpt).unwrap_err().to_string();
        assert!(e.contains("a packed sequence takes"), "{e}");
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
