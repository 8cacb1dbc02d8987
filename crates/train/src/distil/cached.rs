//! What a teacher said of a text, kept in a file: the likeliest tokens of each prediction, with their probabilities. The
//! student then learns without the teacher.
//!
//! The file: eight bytes that name it, the length of a header (4 bytes), the header (JSON), then for every prediction, in
//! the order of the text, the log-probabilities of its `top_k` likeliest tokens (16-bit floats), and these tokens (two
//! bytes each, or four where the vocabulary needs them). It grows from front to back, so one that was cut off is gone on
//! with.

use super::{Guidance, Teacher};
use crate::{Error, Result, Sequences, progress, progress::Progress};
use half::f16;
use model::{Aim, Tokens};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    ops::Range,
    path::{Path, PathBuf},
};
use tensor::{
    Bytes, Tensor,
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

/// What a teacher said, as an aim.
pub struct Cached {
    path: PathBuf,
    about: About,
    records: Bytes,
    how: Distilling,
    /// The prediction of each row of the batch at hand.
    places: Vec<usize>,
    /// What was said of some rows: tokens, and the logarithms of their probabilities.
    ids: Vec<u32>,
    logs: Vec<f32>,
}

impl Cached {
    /// Opens a file that is finished.
    ///
    /// # Errors
    /// If it is not, or is of another text.
    pub fn open(path: &Path, text: &str, guidance: &Guidance) -> Result<Cached> {
        let bad = |reason: String| Error::Data { path: path.into(), reason };
        let (about, start) = About::of(path)?;
        if about.text != text {
            return Err(bad(
                "holds what a teacher said of another text or context; name another file, or remove it".into()
            ));
        }
        if about.temperature != guidance.temperature {
            let kept = &about.temperature;
            return Err(bad(format!("holds probabilities at --temperature {kept}, not {}", guidance.temperature)));
        }
        let file = Bytes::map(path).map_err(formats::Error::io(path, "map it"))?;
        let records = file.len() as u64 - start.min(file.len() as u64);
        let want = about.predictions as u64 * about.record() as u64;
        if records != want {
            let said = records / about.record() as u64;
            return Err(bad(format!(
                "holds what a teacher said of {said} of {} predictions; give --teacher to go on with it",
                about.predictions
            )));
        }
        let records = file.slice(start as usize..file.len()).ok_or_else(|| bad("is cut off".into()))?;
        let how = guidance.how();
        Ok(Cached { path: path.into(), about, records, how, places: Vec::new(), ids: Vec::new(), logs: Vec::new() })
    }

    /// What it is about.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// Writes a file, or goes on with one that was cut off: `teacher` reads the text from front to back.
    ///
    /// # Errors
    /// If one of another teacher or text lies there, it cannot be written, or the job was interrupted.
    pub fn fill(
        path: &Path,
        about: &About,
        teacher: &mut Teacher,
        sequences: &Sequences,
        part: usize,
        bar: &dyn Progress,
    ) -> Result<()> {
        let io = |what| move |e| Error::File(formats::Error::io(path, what)(e));
        let mut said = 0;
        if path.is_file() {
            let (found, start) = About::of(path)?;
            if &found != about {
                let reason = "holds what a teacher said of another text, or another teacher, or with another --top-k, \
                              --context or --temperature; name another file, or remove it";
                return Err(Error::Data { path: path.into(), reason: reason.into() });
            }
            let len = fs::metadata(path).map_err(io("read it"))?.len().saturating_sub(start);
            said = (len / about.record() as u64) as usize;
            // A record that was cut off is written again.
            let file = OpenOptions::new().write(true).open(path).map_err(io("write it"))?;
            file.set_len(start + said as u64 * about.record() as u64).map_err(io("write it"))?;
        } else {
            let header = serde_json::to_vec(about).map_err(|e| Error::Asked(e.to_string()))?;
            formats::atomic::check_room(path, about.predictions as u64 * about.record() as u64)?;
            let start = [MAGIC.as_slice(), &(header.len() as u32).to_le_bytes(), &header].concat();
            formats::atomic::write_bytes(path, &start)?;
        }
        if said >= about.predictions {
            return Ok(());
        }
        bar.begin("the teacher reads", about.predictions as u64);
        let mut file = OpenOptions::new().append(true).open(path).map_err(io("write it"))?;
        let mut passed = 0;
        let mut out = Vec::new();
        for batch in sequences.all(part) {
            let rows = batch.targets.len();
            let skip = said.saturating_sub(passed).min(rows);
            passed += rows;
            bar.advance(rows as u64);
            if skip == rows {
                continue;
            }
            progress::check()?;
            teacher.begin(&batch)?;
            for first in (skip..rows).step_by(ROWS) {
                let logits = teacher.logits(first..rows.min(first + ROWS))?;
                out.clear();
                (0..logits.rows()).for_each(|row| record(about, logits.row(row), &mut out));
                file.write_all(&out).map_err(io("write it"))?;
            }
        }
        file.sync_all().map_err(io("write it"))
    }
}

/// The likeliest tokens of a row.
fn record(about: &About, logits: &[f32], out: &mut Vec<u8>) {
    let temperature = about.temperature;
    let top = ops::top(logits, about.top_k);
    let highest = logits[top[0]];
    let sum: f64 = logits.iter().map(|l| f64::from((l - highest) / temperature).exp()).sum();
    let total = sum.ln();
    for id in &top {
        let log = f64::from((logits[*id] - highest) / temperature) - total;
        out.extend(f16::from_f64(log.max(-60000.0)).to_le_bytes());
    }
    for id in &top {
        out.extend(&(*id as u32).to_le_bytes()[..about.id_bytes()]);
    }
}

impl Aim for Cached {
    fn begin(&mut self, batch: &Tokens) -> model::Result<()> {
        self.places.clear();
        for (sequence, place) in batch.sequences.iter().zip(&batch.places) {
            self.places.extend(*place..place + sequence.len());
        }
        match self.places.len() == batch.targets.len() && self.places.iter().all(|p| *p < self.about.predictions) {
            true => Ok(()),
            false => Err(model::Error::Asked(format!("{} holds nothing of these tokens", self.path.display()))),
        }
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
        for place in &self.places[rows] {
            let (logs, ids) = self.records[place * record..(place + 1) * record].split_at(2 * top_k);
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
