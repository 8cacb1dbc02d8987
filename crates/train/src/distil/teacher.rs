//! A teacher beside the student.

use super::Guidance;
use model::{Aim, Error, Flow, Model, Result, Tokens};
use std::ops::Range;
use tensor::{
    Tensor,
    ops::{self, Distilling, Memory, Operand},
};

/// A teacher that reads the same tokens first, and its logits are made again row by row.
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
        let (flow, head, logits) = Default::default();
        Ok(Teacher { model, how: guidance.how(), flow, memories: Vec::new(), head, logits })
    }

    /// Its logits after some of a batch's tokens.
    pub(super) fn logits(&mut self, rows: Range<usize>) -> Result<&Tensor> {
        let listed: Vec<usize> = rows.collect();
        self.model.final_into(&self.flow, &listed, self.head.values_mut())?;
        self.model.head_into(&mut self.head, &mut self.logits, &mut ())?;
        Ok(&self.logits)
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
        let how = self.how;
        ops::distil(how, logits, self.logits(rows)?, targets, factor, losses);
        Ok(())
    }
}
