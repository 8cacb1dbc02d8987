//! Calibration data that the model writes itself, for a user who has none.

use crate::{
    Result,
    data::Document,
    progress::{self, Progress},
};
use formats::tokenizer::Tokenizer;
use model::{Cache, Gpt, Runner, Sampling, Wanted, uniform};

/// Sequences that are written at once.
const TOGETHER: usize = 32;

/// Lets the model write about `tokens` tokens at temperature 1, each document with random numbers of its own.
///
/// # Errors
/// If the model has no token to begin with, or the job was interrupted.
pub fn documents(gpt: &Gpt, tokens: usize, seed: u64, progress: &dyn Progress) -> Result<Vec<Document>> {
    let length = gpt.model.spec.context.min(256);
    let mut out = Vec::new();
    let (mut held, mut first) = (0, 0u64);
    progress.begin("writing calibration text", tokens as u64);
    // A model that ends every text at once would never get there.
    while held < tokens && first < 100_000 {
        let batch = batch(gpt, length, seed, first)?;
        first += TOGETHER as u64;
        for ids in batch.into_iter().filter(|ids| ids.len() >= 8) {
            held += ids.len();
            progress.advance(ids.len() as u64);
            out.push(document(&gpt.tokenizer, ids, seed, out.len() as u64)?);
        }
    }
    Ok(out)
}

fn document(tokenizer: &Tokenizer, ids: Vec<u32>, seed: u64, number: u64) -> Result<Document> {
    let bytes = tokenizer.decode(&ids[1..], true)?.len();
    let percentile = (uniform(seed ^ 0x5eed, number) * 100.0) as u8;
    Ok(Document { ids, bytes, percentile, learned: None })
}

fn batch(gpt: &Gpt, length: usize, seed: u64, first: u64) -> Result<Vec<Vec<u32>>> {
    let sampling =
        |i: usize| Sampling { temperature: 1.0, seed: seed.wrapping_add(first + i as u64), ..Sampling::default() };
    let begin = |i: usize| -> u32 {
        match gpt.tokenizer.bos().or(gpt.tokenizer.eos()) {
            Some(id) => id,
            None => (uniform(seed, first + i as u64) * gpt.model.spec.vocab as f64) as u32,
        }
    };
    let mut texts: Vec<Vec<u32>> = (0..TOGETHER).map(|i| vec![begin(i)]).collect();
    let mut open: Vec<usize> = (0..TOGETHER).collect();
    let mut caches: Vec<Cache> = open.iter().map(|_| Cache::new(&gpt.model)).collect();
    let mut runner = Runner::new(&gpt.model);
    for step in 1..length as u64 {
        progress::check()?;
        let last: Vec<&[u32]> = open.iter().map(|i| &texts[*i][texts[*i].len() - 1..]).collect();
        let logits = runner.step(&last, &mut caches, Wanted::Last)?;
        let mut still = Vec::new();
        let mut kept = Vec::new();
        for ((row, i), cache) in open.iter().enumerate().zip(caches) {
            let next = sampling(*i).choose(logits.row(row), &[], step);
            texts[*i].push(next);
            if !gpt.ends.contains(&next) {
                still.push(*i);
                kept.push(cache);
            }
        }
        (open, caches) = (still, kept);
        if open.is_empty() {
            break;
        }
    }
    Ok(texts)
}
