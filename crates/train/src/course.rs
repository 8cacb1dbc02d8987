//! A course: steps over data with a schedule, validation, checkpoints, and an early end where nothing is gained.

use crate::{
    Error, Learner, Result, Scaling, Schedule, Sequences, checkpoint, distil::Policy, progress, progress::Progress,
    ranks,
};
use model::{Aim, Tokens};
use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    time::Instant,
};

/// What a course is to do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Learning rates, and with them the number of steps.
    pub schedule: Schedule,
    /// Predictions of a step.
    pub predictions: usize,
    /// Predictions that are in memory together.
    pub part: usize,
    /// Steps between validations.
    pub validate_every: u64,
    /// Validations without a better loss after which it ends; 0 never.
    pub patience: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
}

/// What was measured at a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Steps taken.
    pub step: u64,
    /// Mean loss of the step's predictions, nats.
    pub loss: f64,
    /// Learning rate.
    pub rate: f64,
    /// Norm of the gradient before it was clipped; 0 where the step was skipped.
    pub norm: f64,
    /// Mean loss of the validation, where it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<f64>,
}

/// How a course went; nothing in it depends on the clock.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Predictions that were learned from.
    pub predictions: u64,
    /// Validation before the first step.
    pub before: Option<f64>,
    /// Step and loss of the best validation.
    pub best: Option<(u64, f64)>,
    /// Validations since then.
    pub worse: u64,
    /// Did it end before its last step, since nothing was gained any more?
    pub ended_early: bool,
    /// Steps that were skipped, since a gradient was too large for 16-bit floats.
    #[serde(default)]
    pub skipped: u64,
    /// Every step.
    pub points: Vec<Point>,
}

/// A learner at work.
pub struct Course<'a> {
    /// Who learns.
    pub learner: Learner,
    /// From what.
    pub sequences: Sequences,
    /// What it is measured on.
    pub validation: Vec<Tokens>,
    /// What is learned from them.
    pub aim: Box<dyn Aim + 'a>,
    /// Does the learner write a part of the texts itself?
    pub policy: Option<Policy>,
    /// How.
    pub plan: Plan,
    /// Where checkpoints go; nowhere for short courses.
    pub directory: Option<&'a Path>,
    record: Record,
    /// Predictions a second of each step of this run.
    speeds: Vec<f64>,
}

impl<'a> Course<'a> {
    /// A course that has not begun.
    pub fn new(
        learner: Learner,
        sequences: Sequences,
        validation: Vec<Tokens>,
        aim: Box<dyn Aim + 'a>,
        plan: Plan,
        directory: Option<&'a Path>,
    ) -> Course<'a> {
        let (policy, record, speeds) = Default::default();
        Course { learner, sequences, validation, aim, policy, plan, directory, record, speeds }
    }

    /// How it went so far.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Predictions a second: the median over this run's steps, validation and checkpoints not counted.
    pub fn speed(&self) -> f64 {
        let mut speeds = self.speeds.clone();
        speeds.sort_by(f64::total_cmp);
        speeds.get(speeds.len() / 2).copied().unwrap_or(0.0)
    }

    /// Runs to the end, from the last checkpoint where there is one. The learner then holds the values of the best
    /// validation, or of the last step where there is none; of several ranks, that of rank 0 does, which alone writes.
    ///
    /// # Errors
    /// If numbers are no longer finite, a file cannot be written, or it is interrupted; checkpoints stay.
    pub fn run(&mut self, bar: &dyn Progress) -> Result<()> {
        self.resume()?;
        let steps = self.plan.schedule.steps;
        bar.begin("learning", steps);
        bar.done_before(self.learner.steps());
        if self.record.before.is_none() && !self.validation.is_empty() {
            self.record.before = Some(self.learner.loss(&self.validation)?);
        }
        while self.learner.steps() < steps && !self.record.ended_early {
            if ranks::any(&**self.learner.ranks(), progress::stopped())? {
                self.save()?;
                return Err(Error::Interrupted);
            }
            self.step(bar)?;
            bar.advance(1);
            let done = self.learner.steps();
            if done.is_multiple_of(self.plan.checkpoint_every) && done < steps {
                self.save()?;
            }
        }
        self.take_best()
    }

    /// Tells of ranks that have nothing to learn.
    fn tell_of_idle(&self, parts: usize, bar: &dyn Progress) {
        let size = self.learner.ranks().size();
        if parts < size && self.speeds.is_empty() {
            bar.note(&format!(
                "{} of {size} ranks have nothing to learn: a step's sequences are learned in {parts} part(s); cut them \
                 smaller with --part N, the sequences of a part, or take a larger --batch",
                size - parts
            ));
        }
    }

    fn step(&mut self, bar: &dyn Progress) -> Result<()> {
        let begin = Instant::now();
        let done = self.learner.steps();
        let rate = self.plan.schedule.at(done);
        let mut parts = next_parts(&mut self.sequences, &self.plan);
        if let Some(policy) = &self.policy {
            policy.write(&self.learner, &mut parts)?;
        }
        self.tell_of_idle(parts.len(), bar);
        let count: u64 = parts.iter().map(|p| p.counted() as u64).sum();
        let from = self.record.predictions;
        let stepped = self.learner.step(&parts, self.aim.as_mut(), rate).map_err(|e| match e {
            Error::NotFinite { step, what, .. } => Error::NotFinite { step, what, from, to: from + count },
            other => other,
        })?;
        self.record.predictions += count;
        self.speeds.push(count as f64 / begin.elapsed().as_secs_f64());
        let step = done + 1;
        let last = step == self.plan.schedule.steps;
        let due = step.is_multiple_of(self.plan.validate_every) || last;
        let validation =
            (due && !self.validation.is_empty()).then(|| self.learner.loss(&self.validation)).transpose()?;
        self.record.skipped += u64::from(stepped.skipped);
        self.record.points.push(Point { step, loss: stepped.loss, rate, norm: stepped.norm, validation });
        if let Some(loss) = validation {
            self.compare(step, loss)?;
        }
        Ok(())
    }

    /// Keeps the values where they are the best so far.
    fn compare(&mut self, step: u64, loss: f64) -> Result<()> {
        if self.record.best.is_none_or(|(_, best)| loss < best) {
            (self.record.best, self.record.worse) = (Some((step, loss)), 0);
            if let Some(path) = self.file("best").filter(|_| self.writes()) {
                checkpoint::write(&path, checkpoint::pieces("values", self.learner.values()), &step)?;
            }
        } else {
            self.record.worse += 1;
            self.record.ended_early = self.plan.patience > 0 && self.record.worse >= self.plan.patience;
        }
        Ok(())
    }

    fn file(&self, name: &str) -> Option<PathBuf> {
        self.directory.map(|d| d.join(format!("{name}.safetensors")))
    }

    /// Is this the rank that writes?
    fn writes(&self) -> bool {
        self.learner.ranks().rank() == 0
    }

    fn save(&self) -> Result<()> {
        let Some(path) = self.file("checkpoint").filter(|_| self.writes()) else { return Ok(()) };
        let about = (self.learner.steps(), self.learner.scaling(), &self.record);
        checkpoint::write(&path, self.learner.pieces(), &about)?;
        self.learner.ranks().saved(self.learner.steps());
        Ok(())
    }

    /// Goes on from the checkpoint, where rank 0 sees one.
    fn resume(&mut self) -> Result<()> {
        let Some(path) = self.file("checkpoint") else { return Ok(()) };
        if !ranks::any(&**self.learner.ranks(), self.writes() && path.is_file())? {
            return Ok(());
        }
        self.record = self.learner.restore(|pieces| checkpoint::read::<(u64, Scaling, Record)>(&path, pieces))?;
        let steps = self.learner.steps();
        self.learner.ranks().saved(steps);
        // What was learned before is passed over.
        for _ in 0..steps {
            next_parts(&mut self.sequences, &self.plan);
        }
        Ok(())
    }

    fn take_best(&mut self) -> Result<()> {
        let Some(path) = self.file("best").filter(|p| self.writes() && p.is_file()) else { return Ok(()) };
        let best = self.record.best.map(|(step, _)| step);
        if best == Some(self.learner.steps()) {
            return Ok(());
        }
        let mut values = self.learner.values().zeros();
        let _: u64 = checkpoint::read(&path, checkpoint::pieces_mut("values", &mut values))?;
        self.learner.set_values(values)
    }
}

/// The parts of the next step.
fn next_parts(sequences: &mut Sequences, plan: &Plan) -> Vec<Tokens> {
    let mut left = plan.predictions;
    let mut parts = Vec::new();
    loop {
        let part = sequences.batch(left.min(plan.part));
        left = left.saturating_sub(part.targets.len());
        let full = part.targets.is_empty() || left == 0 || parts.len() + 1 >= plan.predictions.div_ceil(plan.part);
        parts.push(part);
        if full {
            return parts;
        }
    }
}
