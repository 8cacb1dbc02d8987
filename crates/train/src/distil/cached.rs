//! What a teacher said of a text, kept in a file: the likeliest tokens of each prediction, with their probabilities. The
//! student then learns without the teacher.
//!
//! The file: eight bytes that name it, the length of a header (4 bytes), the header (JSON), then for every prediction, in
//! the order of the text, the log-probabilities of its `top_k` likeliest tokens (16-bit floats), and these tokens (two
//! bytes each, or four where the vocabulary needs them); zeros where nothing was said yet. The first lesson fills it as it
//! goes, so a teacher reads only what is learned, and nothing twice.

use super::{Guidance, Teacher};
use crate::{Error, Result};
use half::f16;
use model::{Aim, Tokens};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    io::Read,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};
use tensor::{
    Tensor,
    ops::{self, Distilling, Listed},
};

/// The first bytes of a file.
const MAGIC: &[u8; 8] = b"PLANTEA1";
/// Rows whose logits are in memory at once.
const ROWS: usize = 512;

/// What a file holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// Which teacher: the hash of its files.
    pub teacher: String,
    /// Which text, cut how: the hash of its tokens and the context.
    pub text: String,
    /// How many predictions there are.
    pub predictions: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Tokens kept of each prediction.
    pub top_k: usize,
    /// What the logits were divided by.
    pub temperature: f32,
}

impl About {
    /// Bytes of a prediction.
    fn record(&self) -> usize {
        self.top_k * (2 + self.id_bytes())
    }

    fn id_bytes(&self) -> usize {
        if self.vocab <= 1 << 16 { 2 } else { 4 }
    }

    /// What a file is about, and where its records begin.
    ///
    /// # Errors
    /// If it cannot be read, or is no such file.
    pub fn of(path: &Path) -> Result<(About, u64)> {
        let read = |e| Error::File(formats::Error::io(path, "read it")(e));
        let bad = |reason: &str| Error::Data { path: path.into(), reason: reason.into() };
        let mut file = File::open(path).map_err(read)?;
        let mut start = [0u8; 12];
        let known = file.read_exact(&mut start).is_ok() && start.starts_with(MAGIC);
        if !known {
            return Err(bad(
                "is not what a teacher said; `planish distill --teacher MODEL --teacher-cache FILE` makes one",
            ));
        }
        let len = u32::from_le_bytes([start[8], start[9], start[10], start[11]]);
        let mut header = Vec::new();
        file.take(u64::from(len).min(1 << 16)).read_to_end(&mut header).map_err(read)?;
        let about: About = serde_json::from_slice(&header).map_err(|e| bad(&format!("has a damaged header: {e}")))?;
        if about.top_k == 0 || about.top_k > about.vocab || about.vocab > 1 << 30 {
            return Err(bad("has a damaged header: no such number of tokens"));
        }
        Ok((about, 12 + u64::from(len)))
    }
}

/// What a teacher said, as an aim. A teacher that is there speaks where nothing was said yet.
pub struct Cached {
    path: PathBuf,
    about: About,
    /// Where the records begin.
    start: u64,
    file: File,
    teacher: Option<Teacher>,
    how: Distilling,
    /// Records of the rows of the batch at hand.
    records: Vec<u8>,
    /// What was said of some rows: tokens, and the logarithms of their probabilities.
    ids: Vec<u32>,
    logs: Vec<f32>,
}

impl Cached {
    /// Opens a file, or begins one where there is a teacher.
    ///
    /// # Errors
    /// If it is of another text or teacher, or cannot be written.
    pub fn open(path: &Path, about: &About, teacher: Option<Teacher>, guidance: &Guidance) -> Result<Cached> {
        let io = |what| move |e| Error::File(formats::Error::io(path, what)(e));
        if teacher.is_some() && !path.is_file() {
            let header = serde_json::to_vec(about).map_err(|e| Error::Asked(e.to_string()))?;
            formats::atomic::check_room(path, about.predictions as u64 * about.record() as u64)?;
            let start = [MAGIC.as_slice(), &(header.len() as u32).to_le_bytes(), &header].concat();
            formats::atomic::write_bytes(path, &start)?;
        }
        let (found, start) = About::of(path)?;
        if &found != about {
            let reason = "holds what a teacher said of another text, or another teacher, or with another --top-k, --context \
                          or --temperature; name another file, or remove it";
            return Err(Error::Data { path: path.into(), reason: reason.into() });
        }
        let file = OpenOptions::new().read(true).write(teacher.is_some()).open(path).map_err(io("open it"))?;
        if teacher.is_some() {
            // What nothing was said of yet is zeros, and takes no room.
            file.set_len(start + about.predictions as u64 * about.record() as u64).map_err(io("write it"))?;
        }
        let (records, ids, logs) = Default::default();
        Ok(Cached { path: path.into(), about: found, start, file, teacher, how: guidance.how(), records, ids, logs })
    }

    fn place(&self, prediction: usize) -> u64 {
        self.start + prediction as u64 * self.about.record() as u64
    }

    /// Lets the teacher speak of some sequences, whose records begin at these rows of the batch.
    fn ask(&mut self, sequences: &[(usize, usize)], batch: &Tokens) -> model::Result<()> {
        let record = self.about.record();
        let Some(teacher) = &mut self.teacher else {
            let reason = "does not hold what a teacher said of these parts of the text: give --teacher to go on with it, or \
                          the --seed, --steps and --batch that it was made with";
            return Err(model::Error::Asked(format!("{} {reason}", self.path.display())));
        };
        let mut asked = Tokens::default();
        for (i, _) in sequences {
            asked.sequences.push(batch.sequences[*i].clone());
        }
        asked.targets.resize(asked.sequences.iter().map(Vec::len).sum(), None);
        teacher.begin(&asked)?;
        let mut said = vec![0u8; asked.targets.len() * record];
        for (chunk, out) in said.chunks_mut(ROWS * record).enumerate() {
            let listed: Vec<usize> = (0..out.len() / record).map(|row| chunk * ROWS + row).collect();
            let logits = teacher.logits(&listed)?;
            out.par_chunks_mut(record).enumerate().for_each(|(row, out)| write(&self.about, logits.row(row), out));
        }
        let mut rest = &said[..];
        for (i, row) in sequences {
            let own;
            (own, rest) = rest.split_at(batch.sequences[*i].len() * record);
            self.records[row * record..row * record + own.len()].copy_from_slice(own);
            let at = self.place(batch.places[*i]);
            let failed = |e| model::Error::from(formats::Error::io(&self.path, "write it")(e));
            self.file.write_all_at(own, at).map_err(failed)?;
        }
        Ok(())
    }
}

/// The record of a row: its likeliest tokens.
fn write(about: &About, logits: &[f32], out: &mut [u8]) {
    let top = ops::top(logits, about.top_k);
    let highest = logits[top[0]];
    let scaled = |id: usize| f64::from((logits[id] - highest) / about.temperature);
    let total = (0..logits.len()).map(|id| scaled(id).exp()).sum::<f64>().ln();
    let (logs, ids) = out.split_at_mut(2 * about.top_k);
    for (out, id) in logs.as_chunks_mut::<2>().0.iter_mut().zip(&top) {
        *out = f16::from_f64((scaled(*id) - total).max(-60000.0)).to_le_bytes();
    }
    for (out, id) in ids.chunks_exact_mut(about.id_bytes()).zip(&top) {
        out.copy_from_slice(&(*id as u32).to_le_bytes()[..about.id_bytes()]);
    }
}

impl Aim for Cached {
    fn begin(&mut self, batch: &Tokens) -> model::Result<()> {
        let record = self.about.record();
        let mut missing = Vec::new();
        self.records.clear();
        self.records.resize(batch.targets.len() * record, 0);
        let mut row = 0;
        for (i, (sequence, place)) in batch.sequences.iter().zip(&batch.places).enumerate() {
            let own = row * record..(row + sequence.len()) * record;
            let at = self.place(*place);
            // A file that was cut off says nothing of what is missing to it.
            let whole = self.file.read_exact_at(&mut self.records[own.clone()], at).is_ok();
            if !whole || self.records[own].chunks_exact(record).any(|r| r.iter().all(|byte| *byte == 0)) {
                missing.push((i, row));
            }
            row += sequence.len();
        }
        if missing.is_empty() { Ok(()) } else { self.ask(&missing, batch) }
    }

    fn rows(
        &mut self,
        rows: Range<usize>,
        logits: &mut Tensor,
        targets: &[Option<u32>],
        factor: f32,
        losses: &mut [f32],
    ) -> model::Result<()> {
        let (top_k, record, width) = (self.about.top_k, self.about.record(), self.about.id_bytes());
        self.ids.clear();
        self.logs.clear();
        for own in self.records[rows.start * record..rows.end * record].chunks_exact(record) {
            let (logs, ids) = own.split_at(2 * top_k);
            self.logs.extend(logs.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()));
            let id = |bytes: &[u8]| bytes.iter().rev().fold(0u32, |id, byte| id << 8 | u32::from(*byte));
            self.ids.extend(ids.chunks_exact(width).map(id));
        }
        if self.ids.iter().any(|id| *id as usize >= logits.cols()) || self.logs.iter().any(|l| l.is_nan()) {
            let reason = "holds tokens that are not in the vocabulary; it is damaged: remove it, and give --teacher";
            return Err(model::Error::Asked(format!("{} {reason}", self.path.display())));
        }
        let (ids, logs) = (&self.ids, &self.logs);
        let listed = |row: usize| {
            let own = row * top_k..(row + 1) * top_k;
            Some(Listed { ids: &ids[own.clone()], logs: &logs[own] })
        };
        ops::distil_listed(self.how, logits, listed, targets, factor, losses);
        Ok(())
    }
}
