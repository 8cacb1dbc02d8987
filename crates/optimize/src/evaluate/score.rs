//! Running documents through one model or two.

use crate::{
    Result,
    data::{Document, batches},
    progress::{self, Progress},
};
use model::Model;
use rayon::prelude::*;
use std::ops::Range;
use tensor::{Tensor, ops};
use train::ranks::{self, Ranks};

/// Tokens of a batch: enough for products to be limited by arithmetic.
const BATCH: usize = 1024;
/// Most values of logits that are held at once.
const LOGITS: usize = 1 << 23;

/// How a model predicts one document.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Sum of negative log-likelihoods in nats.
    pub nll: f64,
    /// Predicted tokens.
    pub tokens: usize,
}

/// How two models predict one document.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The model under test.
    pub score: Score,
    /// Sum of the original's negative log-likelihoods.
    pub base_nll: f64,
    /// Divergence of each predicted token, `KL(original || model)` in nats.
    pub kl: Vec<f32>,
    /// Tokens with the same likeliest continuation.
    pub same_top: usize,
}

/// Final hidden rows that predict something, and what they predict.
struct Rows {
    hidden: Tensor,
    /// Row numbers in the batch: all but the last of each document.
    targets: Vec<u32>,
}

fn run(model: &Model, documents: &[Document]) -> Result<Rows> {
    let sequences: Vec<&[u32]> = documents.iter().map(|d| &d.ids[..]).collect();
    let mut flow = model.start(&sequences, &vec![0; sequences.len()])?;
    for layer in 0..model.spec.layers() {
        model.block_once(layer, &mut flow, &mut ())?;
    }
    let (mut rows, mut targets, mut at) = (Vec::new(), Vec::new(), 0);
    for s in &sequences {
        for i in 0..s.len() - 1 {
            rows.push(at + i);
            targets.push(s[i + 1]);
        }
        at += s.len();
    }
    Ok(Rows { hidden: model.final_rows(&flow, &rows)?, targets })
}

fn chunks(rows: usize, vocab: usize) -> Vec<Vec<usize>> {
    let size = (LOGITS / vocab.max(1)).clamp(16, 512);
    let all: Vec<usize> = (0..rows).collect();
    all.chunks(size).map(<[usize]>::to_vec).collect()
}

/// Scores every document. Ranks share them out.
///
/// # Errors
/// If a token is not in the vocabulary, the job was interrupted, or another rank failed.
pub fn score(model: &Model, documents: &[Document], progress: &dyn Progress) -> Result<Vec<Score>> {
    let ranks = ranks::of_process();
    let mut sums = Vec::new();
    for range in own_batches(documents, &*ranks) {
        progress::check()?;
        let documents = &documents[range];
        let rows = run(model, documents)?;
        let mut losses = Vec::with_capacity(rows.targets.len());
        for chunk in chunks(rows.targets.len(), model.spec.vocab) {
            let logits = model.head(&rows.hidden.select_rows(&chunk), &mut ())?;
            let loss = |(i, row): (usize, &usize)| -ops::log_prob(logits.row(i), rows.targets[*row] as usize);
            losses.par_extend(chunk.par_iter().enumerate().map(loss));
        }
        let mut at = 0;
        for d in documents {
            let n = d.predicted();
            sums.push(losses[at..at + n].iter().sum());
            at += n;
        }
        progress.advance((documents.len() * ranks.size()) as u64);
    }
    let all = ranks::gathered(&*ranks, &sums)?;
    Ok(all.into_iter().zip(documents).map(|(nll, d)| Score { nll, tokens: d.predicted() }).collect())
}

/// The batches that are this rank's. They are those of one process, so no sum depends on the number of ranks.
fn own_batches(documents: &[Document], ranks: &dyn Ranks) -> Vec<Range<usize>> {
    let all = batches(documents, BATCH);
    all[ranks::share(all.len(), ranks)].to_vec()
}

/// What one token says of two models.
struct Token {
    nll: f64,
    base_nll: f64,
    kl: f64,
    same_top: bool,
}

fn token(base: &[f32], other: &[f32], target: usize) -> Token {
    Token {
        nll: -ops::log_prob(other, target),
        base_nll: -ops::log_prob(base, target),
        kl: ops::divergence(base, other),
        same_top: ops::argmax(base) == ops::argmax(other),
    }
}

/// Scores every document with a model and its original. Ranks share them out.
///
/// # Errors
/// If the vocabularies differ, a token is not in them, the job was interrupted, or another rank failed.
pub fn compare(model: &Model, base: &Model, documents: &[Document], progress: &dyn Progress) -> Result<Vec<Pair>> {
    if model.spec.vocab != base.spec.vocab {
        let (a, b) = (model.spec.vocab, base.spec.vocab);
        return Err(crate::Error::Asked(format!(
            "the models have {a} and {b} tokens; only equal vocabularies compare"
        )));
    }
    let ranks = ranks::of_process();
    // Numbers of one document after the other: see [`pairs`].
    let mut numbers = Vec::new();
    for range in own_batches(documents, &*ranks) {
        progress::check()?;
        let documents = &documents[range];
        let (rows, base_rows) = (run(model, documents)?, run(base, documents)?);
        let mut tokens = Vec::with_capacity(rows.targets.len());
        for chunk in chunks(rows.targets.len(), model.spec.vocab) {
            let logits = model.head(&rows.hidden.select_rows(&chunk), &mut ())?;
            let base_logits = base.head(&base_rows.hidden.select_rows(&chunk), &mut ())?;
            let one = |(i, row): (usize, &usize)| token(base_logits.row(i), logits.row(i), rows.targets[*row] as usize);
            tokens.par_extend(chunk.par_iter().enumerate().map(one));
        }
        let mut at = 0;
        for d in documents {
            let n = d.predicted();
            let mine = &tokens[at..at + n];
            numbers.push(mine.iter().map(|t| t.nll).sum());
            numbers.push(mine.iter().map(|t| t.base_nll).sum());
            numbers.push(mine.iter().filter(|t| t.same_top).count() as f64);
            numbers.extend(mine.iter().map(|t| t.kl));
            at += n;
        }
        progress.advance((documents.len() * ranks.size()) as u64);
    }
    Ok(pairs(&ranks::gathered(&*ranks, &numbers)?, documents))
}

/// Reads what ranks say of documents: for each the two sums, how many likeliest tokens agree, and every divergence.
fn pairs(mut numbers: &[f64], documents: &[Document]) -> Vec<Pair> {
    let mut pair = |d: &Document| {
        let ([nll, base_nll, same_top], rest) = numbers.split_first_chunk::<3>()?;
        let (kl, rest) = rest.split_at_checked(d.predicted())?;
        numbers = rest;
        Some(Pair {
            score: Score { nll: *nll, tokens: d.predicted() },
            base_nll: *base_nll,
            kl: kl.iter().map(|k| *k as f32).collect(),
            same_top: *same_top as usize,
        })
    };
    documents.iter().map_while(&mut pair).collect()
}
