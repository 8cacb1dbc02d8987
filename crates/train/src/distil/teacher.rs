//! A teacher beside the student.

use super::{Guidance, hidden::Hidden, relations::Relations};
use model::{Aim, Error, Flow, Heads, Model, Parameters, Result, Spec, Tokens};
use std::ops::Range;
use tensor::{
    Tensor,
    ops::{self, Distilling, Memory, Operand},
};

/// A teacher that reads the same tokens first, and its logits are made again row by row.
pub struct Teacher {
    model: Model,
    how: Distilling,
    hidden: Option<Hidden>,
    relations: Option<Relations>,
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
        let (hidden, relations, flow, memories, head, logits) = Default::default();
        Ok(Teacher { model, how: guidance.how(), hidden, relations, flow, memories, head, logits })
    }

    /// Shows of its inside what is asked for, to a student of this shape.
    #[must_use]
    pub fn showing(self, guidance: &Guidance, student: &Spec) -> Teacher {
        let spec = &self.model.spec;
        let hidden = guidance.hidden.map(|weight| Hidden::new(weight, student.layers(), spec.layers()));
        let relations = guidance.relations.map(|weight| Relations::new(weight, student, spec));
        Teacher { hidden, relations, ..self }
    }

    /// Its logits after some of a batch's tokens.
    pub(super) fn logits(&mut self, rows: &[usize]) -> Result<&Tensor> {
        self.model.final_into(&self.flow, rows, self.head.values_mut())?;
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
        if let Some(hidden) = &mut self.hidden {
            hidden.begin(&batch.targets);
        }
        if let Some(relations) = &mut self.relations {
            relations.begin(&batch.targets);
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
            if let Some(hidden) = &mut self.hidden {
                hidden.hear(layer, self.flow.residual());
            }
        }
        if let Some(relations) = &mut self.relations {
            relations.hear(self.flow.heads());
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
        let (how, listed) = (self.how, rows.collect::<Vec<usize>>());
        ops::distil(how, logits, self.logits(&listed)?, targets, factor, losses);
        Ok(())
    }

    fn take(&mut self, values: &Parameters) {
        if let Some(hidden) = &mut self.hidden {
            hidden.take(values);
        }
    }

    fn looks_at(&self, _: u16) -> bool {
        self.hidden.is_some()
    }

    fn output(&mut self, layer: u16, output: &Tensor, gradient: &mut Tensor, factor: f32, into: &mut Parameters) {
        if let Some(hidden) = &mut self.hidden {
            hidden.output(layer, output, gradient, factor, &mut into.projections);
        }
    }

    fn attended(&mut self, layer: u16, heads: Heads<'_>, gradients: [&mut Tensor; 3], factor: f32) {
        if let Some(relations) = &self.relations {
            relations.attended(layer, heads, gradients, factor);
        }
    }
}
