//! Documents become batches: pieces of the context, shuffled anew in every epoch by the seed.
//!
//! Pieces of several documents run in one batch as sequences of their own: none sees another.

use crate::{Error, Result, data::Document};
use model::{Tokens, uniform};
use std::path::Path;

/// The pieces to learn from, in an order that depends on the seed and the epoch alone.
#[derive(Clone, Debug)]
pub struct Sequences {
    /// Up to `context + 1` tokens each: every token but the last is fed, every one but the first predicted.
    pieces: Vec<Vec<u32>>,
    seed: u64,
    /// Order of the epoch at hand.
    order: Vec<usize>,
    epoch: u64,
    next: usize,
}

/// Fewer predictions than these teach nothing: the path or the separator is wrong.
const LEAST: usize = 32;

impl Sequences {
    /// Cuts documents into pieces of `context` predictions.
    ///
    /// # Errors
    /// If there is next to nothing to predict.
    pub fn new(documents: &[Document], context: usize, seed: u64, path: &Path) -> Result<Sequences> {
        let mut pieces = Vec::new();
        for document in documents {
            let mut from = 0;
            while from + 1 < document.ids.len() {
                let to = document.ids.len().min(from + context + 1);
                pieces.push(document.ids[from..to].to_vec());
                from = to - 1;
            }
        }
        let mut all = Sequences { pieces, seed, order: Vec::new(), epoch: 0, next: 0 };
        let held = all.predictions();
        if held < LEAST {
            let reason =
                format!("holds {held} tokens to predict; a model learns from {LEAST} on, and well from thousands");
            return Err(Error::Data { path: path.into(), reason });
        }
        all.shuffle();
        Ok(all)
    }

    fn shuffle(&mut self) {
        let seed = self.seed ^ self.epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.order.clear();
        self.order.extend(0..self.pieces.len());
        self.order.sort_by_key(|i| (uniform(seed, *i as u64).to_bits(), *i));
        self.next = 0;
    }

    /// Predictions of one epoch.
    pub fn predictions(&self) -> usize {
        self.pieces.iter().map(|p| p.len() - 1).sum()
    }

    /// Epochs that were finished.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The next pieces, as many as fit into so many predictions, and one at least.
    pub fn batch(&mut self, predictions: usize) -> Tokens {
        let mut batch = Tokens::default();
        loop {
            if self.next == self.order.len() {
                self.epoch += 1;
                self.shuffle();
            }
            let piece = &self.pieces[self.order[self.next]];
            if !batch.sequences.is_empty() && batch.targets.len() + piece.len() - 1 > predictions {
                return batch;
            }
            add(&mut batch, piece);
            self.next += 1;
            if batch.targets.len() >= predictions {
                return batch;
            }
        }
    }

    /// All pieces once, in batches of about so many predictions.
    pub fn once(&self, predictions: usize) -> Vec<Tokens> {
        let mut out: Vec<Tokens> = Vec::new();
        for piece in &self.pieces {
            match out.last_mut() {
                Some(batch) if batch.targets.len() + piece.len() - 1 <= predictions => add(batch, piece),
                _ => {
                    let mut batch = Tokens::default();
                    add(&mut batch, piece);
                    out.push(batch);
                }
            }
        }
        out
    }
}

fn add(batch: &mut Tokens, piece: &[u32]) {
    batch.sequences.push(piece[..piece.len() - 1].to_vec());
    batch.targets.extend(piece[1..].iter().map(|id| Some(*id)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prediction_comes_once_an_epoch_and_the_order_follows_the_seed() {
        let document = |from: u32, len: u32| Document { ids: (from..from + len).collect(), bytes: 0, percentile: 0 };
        let documents = [document(0, 25), document(100, 3), document(200, 1), document(300, 11)];
        let mut all = Sequences::new(&documents, 8, 3, Path::new("text")).unwrap();
        assert_eq!(all.predictions(), 24 + 2 + 10);
        let mut seen: Vec<u32> = Vec::new();
        let first = all.batch(16);
        seen.extend(first.targets.iter().flatten());
        while all.epoch() == 0 && seen.len() < 36 {
            let batch = all.batch(16);
            assert!(batch.counted() <= 16 && batch.sequences.iter().all(|s| s.len() <= 8));
            seen.extend(batch.targets.iter().flatten());
        }
        seen.truncate(36);
        seen.sort_unstable();
        let want: Vec<u32> = (1..25).chain(101..103).chain(301..311).collect();
        assert_eq!(seen, want);
        let again = Sequences::new(&documents, 8, 3, Path::new("text")).unwrap().batch(16);
        assert_eq!(again.sequences, first.sequences);
        assert!(Sequences::new(&documents[1..3], 8, 3, Path::new("text")).is_err());
    }
}
