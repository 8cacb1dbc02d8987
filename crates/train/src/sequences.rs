//! Documents become batches: pieces of the context, shuffled anew in every epoch by the seed.
//!
//! Pieces of several documents run in one batch as sequences of their own: none sees another.

use crate::{Error, Result, data::Document};
use model::{Tokens, uniform};
use std::path::Path;

/// Up to `context + 1` tokens: every token but the last is fed, every one but the first predicted.
#[derive(Clone, Debug)]
struct Piece {
    ids: Vec<u32>,
    /// Which of them count, where not all do.
    learned: Option<Vec<bool>>,
}

impl Piece {
    fn len(&self) -> usize {
        self.ids.len() - 1
    }

    fn targets(&self) -> impl Iterator<Item = Option<u32>> {
        let counts = |i: usize| self.learned.as_ref().is_none_or(|learned| learned[i]);
        self.ids.iter().enumerate().skip(1).map(move |(i, id)| counts(i).then_some(*id))
    }
}

/// The pieces to learn from, in an order that depends on the seed and the epoch alone.
#[derive(Clone, Debug)]
pub struct Sequences {
    pieces: Vec<Piece>,
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
                let learned = document.learned.as_ref().map(|l| l[from..to].to_vec());
                let piece = Piece { ids: document.ids[from..to].to_vec(), learned };
                // What says nothing that counts is not read.
                if piece.targets().any(|t| t.is_some()) {
                    pieces.push(piece);
                }
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
        self.pieces.iter().map(|p| p.targets().flatten().count()).sum()
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
            if !batch.sequences.is_empty() && batch.targets.len() + piece.len() > predictions {
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
                Some(batch) if batch.targets.len() + piece.len() <= predictions => add(batch, piece),
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

fn add(batch: &mut Tokens, piece: &Piece) {
    batch.sequences.push(piece.ids[..piece.len()].to_vec());
    batch.targets.extend(piece.targets());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prediction_comes_once_an_epoch_and_the_order_follows_the_seed() {
        let document = |from: u32, len: u32| Document { ids: (from..from + len).collect(), ..Document::default() };
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

    #[test]
    fn only_answers_count() {
        let learned = (0..60).map(|i| i >= 10 && i % 3 == 0).collect();
        let document = Document { ids: (0..60).collect(), learned: Some(learned), ..Document::default() };
        let documents = vec![document; 3];
        let mut all = Sequences::new(&documents, 8, 3, Path::new("chat")).unwrap();
        assert_eq!(all.predictions(), 3 * 16);
        let batch = all.batch(40);
        assert_eq!(batch.targets.len(), batch.sequences.iter().map(Vec::len).sum::<usize>());
        assert!(batch.targets.iter().flatten().all(|id| *id >= 10 && id % 3 == 0));
        // The piece of the first eight predictions has none that counts.
        assert!(batch.sequences.iter().all(|s| s[0] >= 8));
    }
}
