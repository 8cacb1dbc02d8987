//! A teacher with another vocabulary: it reads the same text in its own tokens, and where a token of both ends, what it says
//! next is counted for the student's tokens that this begins with; what begins with none of them counts as one.

use super::{Guidance, Teacher};
use formats::tokenizer::Tokenizer;
use model::{Aim, Error, Model, Result, Tokens};
use std::{collections::HashMap, ops::Range};
use tensor::{
    Tensor,
    ops::{self, Distilling, Listed},
};

/// With which of a student's tokens a text begins, by the teacher's token that it begins with.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The student's tokens that one of the teacher's begins with, rising.
    student: Vec<u32>,
    /// For every token of the teacher its place in that list.
    first: Vec<Option<u32>>,
    /// Tokens of the student's vocabulary.
    size: usize,
}

impl Shared {
    /// Of two vocabularies; tokens that end texts are the same to both.
    pub fn of(student: &Tokenizer, teacher: &Tokenizer) -> Shared {
        let ids = |tokenizer: &Tokenizer| 0..tokenizer.vocab_size() as u32;
        let mut known: HashMap<Vec<u8>, u32> = HashMap::new();
        for id in ids(student) {
            if let Some(bytes) = student.bytes_of(id) {
                known.entry(bytes).or_insert(id);
            }
        }
        let first = |id: u32| {
            if teacher.eos() == Some(id) {
                return student.eos();
            }
            let bytes = teacher.bytes_of(id).filter(|bytes| !bytes.is_empty())?;
            known.get(&bytes).copied().or_else(|| first_token(student, &bytes))
        };
        let firsts: Vec<Option<u32>> = ids(teacher).map(first).collect();
        let mut all: Vec<u32> = firsts.iter().flatten().copied().collect();
        all.sort_unstable();
        all.dedup();
        let place = |id: u32| all.binary_search(&id).ok().map(|at| at as u32);
        let first = firsts.iter().map(|id| id.and_then(place)).collect();
        Shared { student: all, first, size: student.vocab_size() }
    }

    /// Tokens of the student's that are known.
    pub fn len(&self) -> usize {
        self.student.len()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.student.is_empty()
    }
}

/// The token with which a tokenizer begins a piece of a text.
fn first_token(tokenizer: &Tokenizer, bytes: &[u8]) -> Option<u32> {
    // After a line's end, so that no space is put before it.
    let ids = tokenizer.encode(&format!("\n{}", std::str::from_utf8(bytes).ok()?), false).ok()?;
    let mut text = Vec::new();
    for id in ids {
        let before = text.len();
        text.extend(tokenizer.bytes_of(id)?);
        if before > 0 && text[before - 1] == b'\n' && bytes.starts_with(&text[before..]) {
            return Some(id);
        }
    }
    None
}

/// Such a teacher.
pub struct Translated<'a> {
    teacher: Teacher,
    how: Distilling,
    tokenizers: [&'a Tokenizer; 2],
    shared: Shared,
    /// For every row of the batch at hand, the teacher's that ends at the same place of the text.
    rows: Vec<Option<usize>>,
    logs: Vec<f32>,
}

impl<'a> Translated<'a> {
    /// Takes a teacher. `tokenizers` are the student's and its own.
    ///
    /// # Errors
    /// If both share so little that nothing can be learned, or there is no memory for it.
    pub fn new(model: Model, tokenizers: [&'a Tokenizer; 2], guidance: &Guidance) -> crate::Result<Translated<'a>> {
        let shared = Shared::of(tokenizers[0], tokenizers[1]);
        // Most of what is said has to be comparable.
        if shared.len() * 10 < shared.size {
            return Err(crate::Error::Asked(format!(
                "of the student's {} tokens only {} begin what one of the teacher's {} says: too few to learn from",
                shared.size,
                shared.len(),
                shared.first.len()
            )));
        }
        let (rows, logs) = Default::default();
        Ok(Translated { teacher: Teacher::new(model, guidance)?, how: guidance.how(), tokenizers, shared, rows, logs })
    }

    /// What can be learned of a text and what cannot, in words.
    ///
    /// # Errors
    /// If the teacher's tokenizer fails.
    pub fn report(&self, sample: &Tokens) -> Result<String> {
        let (_, rows) = self.translate(sample)?;
        let met = 100.0 * rows.iter().flatten().count() as f64 / rows.len().max(1) as f64;
        let named = |id: &u32| self.shared.student.binary_search(id).is_ok();
        let targets: Vec<u32> = sample.targets.iter().flatten().copied().collect();
        let said = 100.0 * targets.iter().filter(|id| named(id)).count() as f64 / targets.len().max(1) as f64;
        let mut missing: Vec<String> = Vec::new();
        for token in targets.iter().filter(|id| !named(id)).filter_map(|id| self.tokenizers[0].token_of(*id)) {
            if missing.len() < 5 && !missing.contains(&token) {
                missing.push(token);
            }
        }
        let missing = if missing.is_empty() {
            String::new()
        } else {
            format!("; without one are for example {}", missing.join(" "))
        };
        Ok(format!(
            "the teacher has another vocabulary: {} of the student's {} tokens have a counterpart among its {} \
             ({said:.1} % of the text){missing}; its tokens tell of {met:.1} % of the predictions, and elsewhere the \
             student learns from the text alone",
            self.shared.len(),
            self.shared.size,
            self.shared.first.len()
        ))
    }

    /// A batch in the teacher's tokens, and for every row of the batch the row that ends at the same place, where the
    /// teacher's next token is not shorter than what is predicted: from a shorter one nothing follows for it.
    fn translate(&self, batch: &Tokens) -> Result<(Tokens, Vec<Option<usize>>)> {
        let [student, teacher] = self.tokenizers;
        let mut out = Tokens::default();
        let mut rows = Vec::new();
        let (mut first, mut row) = (0, 0);
        for sequence in &batch.sequences {
            let (ends, text) = spelled(student, sequence);
            let targets = &batch.targets[row..row + sequence.len()];
            row += sequence.len();
            // A piece may begin or end within a letter.
            let from = (0..text.len().min(4)).find(|i| text[*i] & 0xc0 != 0x80).unwrap_or(0);
            let whole = match std::str::from_utf8(&text[from..]) {
                Ok(whole) => whole,
                Err(e) => std::str::from_utf8(&text[from..from + e.valid_up_to()]).unwrap_or_default(),
            };
            let begins = student.bos().is_some() && sequence.first().copied() == student.bos();
            let ids = teacher.encode(whole, begins);
            let mut ids = ids.map_err(|e| Error::Asked(format!("the teacher's tokenizer fails: {e}")))?;
            if teacher.adds_eos() && ids.last().copied() == teacher.eos() {
                ids.pop();
            }
            let (own, all) = spelled(teacher, &ids);
            // Some tokenizers put a space before a text.
            let before = all.len().saturating_sub(whole.len());
            let own: Vec<usize> = own.iter().map(|end| end.saturating_sub(before) + from).collect();
            let places: HashMap<usize, usize> = own.iter().enumerate().map(|(row, end)| (*end, row)).collect();
            let tells = |end: &usize, target: &Option<u32>| {
                let row = *places.get(end)?;
                let target = (*target)?;
                let reaches = own.get(row + 1).is_some_and(|next| {
                    let len = student.bytes_of(target).map_or(0, |bytes| bytes.len());
                    len > 0 && *next >= end + len
                });
                (reaches || student.eos() == Some(target)).then_some(first + row)
            };
            rows.extend(ends.iter().zip(targets).map(|(end, target)| tells(end, target)));
            first += ids.len();
            out.targets.extend(std::iter::repeat_n(None, ids.len()));
            out.sequences.push(ids);
        }
        Ok((out, rows))
    }
}

/// Where each token of a sequence ends in the text, and the text.
fn spelled(tokenizer: &Tokenizer, ids: &[u32]) -> (Vec<usize>, Vec<u8>) {
    let mut text = Vec::new();
    let end = |id: &u32| {
        text.extend(tokenizer.bytes_of(*id).unwrap_or_default());
        text.len()
    };
    let ends = ids.iter().map(end).collect();
    (ends, text)
}

impl Aim for Translated<'_> {
    fn begin(&mut self, batch: &Tokens) -> Result<()> {
        let mut own;
        (own, self.rows) = self.translate(batch)?;
        // Of no text there is nothing to read.
        own.sequences.retain(|s| !s.is_empty());
        if own.sequences.is_empty() { Ok(()) } else { self.teacher.begin(&own) }
    }

    fn rows(
        &mut self,
        rows: Range<usize>,
        logits: &mut Tensor,
        targets: &[Option<u32>],
        factor: f32,
        losses: &mut [f32],
    ) -> Result<()> {
        let met: Vec<usize> = self.rows[rows.clone()].iter().flatten().copied().collect();
        let count = self.shared.len();
        self.logs.clear();
        if !met.is_empty() {
            let said = self.teacher.logits(&met)?;
            for row in 0..met.len() {
                let logits = said.row(row);
                let highest = logits.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
                let scaled = |l: f32| (l - highest) / self.how.temperature;
                let total = logits.iter().map(|l| f64::from(scaled(*l)).exp()).sum::<f64>().ln() as f32;
                let from = self.logs.len();
                self.logs.resize(from + count, 0.0);
                let sums = &mut self.logs[from..];
                for (l, first) in logits.iter().zip(&self.shared.first) {
                    if let Some(first) = first {
                        sums[*first as usize] += (scaled(*l) - total).exp();
                    }
                }
                sums.iter_mut().for_each(|p| *p = p.max(f32::MIN_POSITIVE).ln());
            }
        }
        let mut next = 0..met.len();
        let places: Vec<Option<usize>> = self.rows[rows].iter().map(|row| row.and_then(|_| next.next())).collect();
        let listed = |row: usize| {
            let at = places[row]?;
            Some(Listed { ids: &self.shared.student, logs: &self.logs[at * count..(at + 1) * count] })
        };
        ops::distil_listed(self.how, logits, listed, targets, factor, losses);
        Ok(())
    }
}
