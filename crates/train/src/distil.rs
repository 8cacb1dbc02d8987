//! A student learns what a teacher would say (arXiv 1503.02531).

use model::{Aim, Error, Flow, Model, Result, Tokens};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use tensor::{
    Tensor,
    ops::{self, Distilling, Likeness, Memory, Operand},
};

/// Which divergence of the student from the teacher is made small.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Divergence {
    /// `KL(teacher || student)`.
    Forward,
    /// `KL(student || teacher)`.
    Reverse,
    /// The Jensen-Shannon divergence.
    JensenShannon,
}

impl Divergence {
    /// All, with their names.
    pub const ALL: [(&str, Divergence); 3] = [
        ("forward", Divergence::Forward),
        ("reverse", Divergence::Reverse),
        ("jensen-shannon", Divergence::JensenShannon),
    ];

    fn likeness(self) -> Likeness {
        match self {
            Divergence::Forward => Likeness::Forward,
            Divergence::Reverse => Likeness::Reverse,
            Divergence::JensenShannon => Likeness::Between,
        }
    }
}

/// How a student learns from its teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guidance {
    /// Which divergence.
    pub divergence: Divergence,
    /// Both distributions are flattened by it.
    pub temperature: f32,
    /// Share of the divergence in the loss; the rest is the likelihood of the text.
    pub share: f32,
    /// Blocks of the teacher that the student began as, where it was made from them.
    pub layers: Option<Vec<u16>>,
}

/// A teacher beside the student: it reads the same tokens first, and its logits are made again row by row.
pub struct Teacher {
    model: Model,
    how: Distilling,
    flow: Flow,
    memories: Vec<Vec<Memory>>,
    head: Operand,
    logits: Tensor,
}

impl Teacher {
    /// Takes a teacher, whose weights are laid out for speed.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(mut model: Model, guidance: &Guidance) -> Result<Teacher> {
        model.pack()?;
        let how = Distilling {
            likeness: guidance.divergence.likeness(),
            temperature: guidance.temperature,
            share: guidance.share,
        };
        let (flow, head, logits) = Default::default();
        Ok(Teacher { model, how, flow, memories: Vec::new(), head, logits })
    }
}

impl Aim for Teacher {
    fn begin(&mut self, batch: &Tokens) -> Result<()> {
        let longest = batch.sequences.iter().map(Vec::len).max().unwrap_or(0);
        if longest > self.model.spec.context {
            let reason =
                format!("the teacher reads {} tokens at most, and a sequence has {longest}", self.model.spec.context);
            return Err(Error::Asked(format!("{reason}; lower --context")));
        }
        let past = vec![0; batch.sequences.len()];
        self.model.restart(&mut self.flow, batch.sequences.iter().map(Vec::as_slice), &past)?;
        self.memories.resize_with(usize::from(self.model.spec.layers()), Vec::new);
        for layer in 0..self.model.spec.layers() {
            let memories = &mut self.memories[usize::from(layer)];
            memories.iter_mut().for_each(|m| m.truncate(0));
            memories.truncate(batch.sequences.len());
            memories.extend(self.model.memory(layer, &self.flow).into_iter().skip(memories.len()));
            self.model.block(layer, &mut self.flow, memories, &mut ())?;
        }
        Ok(())
    }

    fn rows(
        &mut self,
        rows: Range<usize>,
        logits: &mut Tensor,
        targets: &[Option<u32>],
        factor: f32,
        losses: &mut [f32],
    ) -> Result<()> {
        let listed: Vec<usize> = rows.collect();
        self.model.final_into(&self.flow, &listed, self.head.values_mut())?;
        self.model.head_into(&mut self.head, &mut self.logits, &mut ())?;
        ops::distil(self.how, logits, &self.logits, targets, factor, losses);
        Ok(())
    }
}
