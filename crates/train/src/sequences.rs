//! Documents become batches: pieces of the context, cut and shuffled anew in every epoch by the seed.
//!
//! Pieces of several documents run in one batch as sequences of their own, one after the other without gaps: none sees
//! another, and no place is filled up with nothing.

use crate::{Error, Result, data::Document};
use model::{Tokens, uniform};
use std::{ops::Range, path::Path};

/// Up to `context + 1` tokens of a document: every token but the last is fed, every one but the first predicted.
#[derive(Clone, Debug)]
struct Piece {
    document: usize,
    tokens: Range<usize>,
}

impl Piece {
    fn len(&self) -> usize {
        self.tokens.len() - 1
    }

    fn targets<'a>(&self, documents: &'a [Document]) -> impl Iterator<Item = Option<u32>> + use<'a> {
        let Document { ids, learned, .. } = &documents[self.document];
        let counts = move |i: usize| learned.as_ref().is_none_or(|learned| learned[i]);
        (self.tokens.start + 1..self.tokens.end).map(move |i| counts(i).then_some(ids[i]))
    }
}

/// The pieces to learn from, in an order that depends on the seed and the epoch alone.
#[derive(Clone, Debug)]
pub struct Sequences {
    documents: Vec<Document>,
    /// Which of all predictions the first one of each document is.
    firsts: Vec<usize>,
    context: usize,
    /// Are long documents cut at other places in every epoch?
    moving: bool,
    /// Of the epoch at hand, in their order.
    pieces: Vec<Piece>,
    seed: u64,
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
    pub fn new(documents: Vec<Document>, context: usize, seed: u64, path: &Path) -> Result<Sequences> {
        let count = |first: &mut usize, document: &Document| {
            let own = *first;
            *first += document.predicted();
            Some(own)
        };
        let firsts = documents.iter().scan(0, count).collect();
        let (moving, pieces) = (true, Vec::new());
        let mut all = Sequences { documents, firsts, context, moving, pieces, seed, epoch: 0, next: 0 };
        let held = all.predictions();
        if held < LEAST {
            let reason =
                format!("holds {held} tokens to predict; a model learns from {LEAST} on, and well from thousands");
            return Err(Error::Data { path: path.into(), reason });
        }
        all.cut();
        Ok(all)
    }

    /// From here on every epoch cuts documents as the first one does.
    #[must_use]
    pub fn with_kept_cuts(self) -> Sequences {
        Sequences { moving: false, ..self }
    }

    /// The pieces of this epoch, shuffled. From the second one on long documents are cut at other places, so that not the
    /// same tokens are always those with little before them.
    fn cut(&mut self) {
        let seed = self.seed ^ self.epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let moved = |i: usize, document: &Document| {
            let long = self.moving && self.epoch > 0 && document.ids.len() > self.context + 1;
            if long { (uniform(seed ^ MOVED, i as u64) * self.context as f64) as usize } else { 0 }
        };
        let cut = |(i, document)| pieces(i, document, self.context, moved(i, document));
        self.pieces = self.documents.iter().enumerate().flat_map(cut).collect();
        // What says nothing that counts is not read.
        self.pieces.retain(|piece| piece.targets(&self.documents).any(|t| t.is_some()));
        let mut order: Vec<usize> = (0..self.pieces.len()).collect();
        order.sort_by_key(|i| (uniform(seed, *i as u64).to_bits(), *i));
        self.pieces = order.into_iter().map(|i| self.pieces[i].clone()).collect();
        self.next = 0;
    }

    /// Predictions of one epoch.
    pub fn predictions(&self) -> usize {
        let counted = |d: &Document| match &d.learned {
            Some(learned) => learned.iter().skip(1).filter(|l| **l).count(),
            None => d.predicted(),
        };
        self.documents.iter().map(counted).sum()
    }

    /// Epochs that were finished.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The next pieces, as many as fit into so many predictions, and one at least.
    pub fn batch(&mut self, predictions: usize) -> Tokens {
        let mut batch = Tokens::default();
        loop {
            if self.next == self.pieces.len() {
                self.epoch += 1;
                self.cut();
            }
            let piece = &self.pieces[self.next];
            if !batch.sequences.is_empty() && batch.targets.len() + piece.len() > predictions {
                return batch;
            }
            self.add(&mut batch, piece);
            self.next += 1;
            if batch.targets.len() >= predictions {
                return batch;
            }
        }
    }

    /// All pieces that say something that counts, once, in batches of about so many predictions.
    pub fn once(&self, predictions: usize) -> Vec<Tokens> {
        let counts = |piece: &Piece| piece.targets(&self.documents).any(|t| t.is_some());
        self.batches(predictions, self.in_order().filter(counts))
    }

    /// All pieces once, in the order of the text.
    pub fn all(&self, predictions: usize) -> Vec<Tokens> {
        self.batches(predictions, self.in_order())
    }

    fn in_order(&self) -> impl Iterator<Item = Piece> {
        self.documents.iter().enumerate().flat_map(|(i, document)| pieces(i, document, self.context, 0))
    }

    fn batches(&self, predictions: usize, pieces: impl Iterator<Item = Piece>) -> Vec<Tokens> {
        let mut out: Vec<Tokens> = Vec::new();
        for piece in pieces {
            if out.last().is_none_or(|batch| batch.targets.len() + piece.len() > predictions) {
                out.push(Tokens::default());
            }
            if let Some(batch) = out.last_mut() {
                self.add(batch, &piece);
            }
        }
        out
    }

    fn add(&self, batch: &mut Tokens, piece: &Piece) {
        let ids = &self.documents[piece.document].ids;
        batch.sequences.push(ids[piece.tokens.start..piece.tokens.end - 1].to_vec());
        batch.targets.extend(piece.targets(&self.documents));
        batch.places.push(self.firsts[piece.document] + piece.tokens.start);
    }
}

/// What tells the random numbers of cuts from those of orders.
const MOVED: u64 = 0x6375_7473;

/// The pieces of a document, the first of them of `first` predictions, or of as many as the others where that is 0. Each
/// begins with the token that the last one ended with.
fn pieces(i: usize, document: &Document, context: usize, first: usize) -> impl Iterator<Item = Piece> + use<> {
    let len = document.ids.len();
    let rest = (first..len.saturating_sub(1)).step_by(context.max(1));
    let cuts = rest.map(move |from| from..len.min(from + context.max(1) + 1));
    let head = (first > 0).then_some(0..first + 1);
    head.into_iter().chain(cuts).map(move |tokens| Piece { document: i, tokens })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_prediction_comes_once_an_epoch_and_the_order_follows_the_seed() {
        let document = |from: u32, len: u32| Document { ids: (from..from + len).collect(), ..Document::default() };
        let documents = vec![document(0, 25), document(100, 3), document(200, 1), document(300, 11)];
        let mut all = Sequences::new(documents.clone(), 8, 3, Path::new("text")).unwrap();
        assert_eq!(all.predictions(), 24 + 2 + 10);
        let mut seen: Vec<u32> = Vec::new();
        let first = all.batch(16);
        seen.extend(first.targets.iter().flatten());
        while all.epoch() == 0 && seen.len() < 36 {
            let batch = all.batch(16);
            assert!(batch.counted() <= 16 && batch.sequences.iter().all(|s| s.len() <= 8));
            seen.extend(batch.targets.iter().flatten());
        }
        let second = seen.split_off(36);
        seen.sort_unstable();
        let want: Vec<u32> = (1..25).chain(101..103).chain(301..311).collect();
        assert_eq!(seen, want);
        // The next epoch has the same predictions in other pieces.
        let starts = |all: &Sequences| all.pieces.iter().map(|p| (p.document, p.tokens.start)).collect::<BTreeSet<_>>();
        let first_starts = starts(&Sequences::new(documents.clone(), 8, 3, Path::new("text")).unwrap());
        assert_ne!(starts(&all), first_starts);
        let mut seen = second;
        while seen.len() < 36 {
            let batch = all.batch(1);
            assert!(batch.sequences.iter().all(|s| s.len() <= 8));
            seen.extend(batch.targets.iter().flatten());
        }
        assert_eq!(all.epoch(), 1);
        seen.sort_unstable();
        assert_eq!(seen, want);
        let again = Sequences::new(documents.clone(), 8, 3, Path::new("text")).unwrap().batch(16);
        assert_eq!(again.sequences, first.sequences);
        assert!(Sequences::new(documents[1..3].to_vec(), 8, 3, Path::new("text")).is_err());
    }

    #[test]
    fn only_answers_count() {
        let learned = (0..60).map(|i| i >= 10 && i % 3 == 0).collect();
        let document = Document { ids: (0..60).collect(), learned: Some(learned), ..Document::default() };
        let documents = vec![document; 3];
        let mut all = Sequences::new(documents.clone(), 8, 3, Path::new("chat")).unwrap();
        assert_eq!(all.predictions(), 3 * 16);
        let batch = all.batch(40);
        assert_eq!(batch.targets.len(), batch.sequences.iter().map(Vec::len).sum::<usize>());
        assert!(batch.targets.iter().flatten().all(|id| *id >= 10 && id % 3 == 0));
        // The piece of the first eight predictions has none that counts.
        assert!(batch.sequences.iter().all(|s| s[0] >= 8));
    }
}
