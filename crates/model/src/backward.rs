//! The gradient: the one forward pass, walked back.
//!
//! The model's matrices are packed as floats; products of gradients read their transposes, which [`Backward`] holds.
//! What a block's gradient needs is what its forward pass leaves in [`Kept`]: cheap things (norms, gated products) are
//! made again. Where activations are checkpointed (arXiv 1604.06174), a block leaves only its input and runs again.
//!
//! A matrix that was never given its values does not learn: it stays as the model stores it.

mod block;
mod head;

pub use block::BlockBackward;

use crate::{Aim, Bucket, Change, Flow, Kept, Likelihood, Model, Parameters, Result, Site, Tokens};
use block::{Out, Way};
use std::collections::BTreeMap;
use tensor::{
    Tensor,
    ops::{self, Gram, Operand, Squares},
    packed::Form,
};

/// How much of the loss a gradient is of, and of which.
pub struct Asked<'a> {
    /// Which loss.
    pub aim: &'a mut dyn Aim,
    /// Gradients are of so many times its sum.
    pub factor: f32,
}

/// Is told of buckets whose gradients are final, and may do with these what it likes.
pub type Tell<'a> = &'a mut dyn FnMut(Bucket, &mut Parameters);

/// What walking back takes, used again from step to step.
pub struct Backward {
    way: Way,
    flow: Flow,
    /// What blocks left: each of them, or the last that ran where activations are checkpointed.
    kept: Vec<Kept>,
    /// Inputs of blocks that run again.
    entries: Vec<Tensor>,
    head: Operand,
    some: Tensor,
    losses: Vec<f32>,
    listed: Vec<usize>,
}

impl Backward {
    /// For a model whose matrices that learn are packed as floats of `form`; [`Backward::refresh`] and
    /// [`Backward::refresh_adapter`] give it the values.
    pub fn new(model: &Model, form: Form) -> Backward {
        let layers = usize::from(model.spec.layers());
        Backward {
            way: Way::new(model, form),
            flow: Flow::default(),
            kept: (0..layers).map(|_| Kept::default()).collect(),
            entries: Vec::new(),
            head: Operand::default(),
            some: Tensor::default(),
            losses: Vec::new(),
            listed: Vec::new(),
        }
    }

    /// From here on blocks leave only their inputs and run again on the way back: the same numbers in less memory.
    pub fn checkpoint_activations(&mut self) {
        if self.entries.is_empty() {
            self.entries.resize_with(self.kept.len(), Tensor::default);
            self.kept.truncate(1);
        }
    }

    /// From here on keeps the second moments of the gradients of what the matrices of blocks return.
    pub fn watch_outputs(&mut self) {
        self.way.moments.get_or_insert_default();
    }

    /// From here on keeps their squares alone, which takes less memory.
    pub fn watch_squares(&mut self) {
        self.way.squares.get_or_insert_default();
    }

    /// What was kept of each matrix: the sum of `g g^T` over tokens since [`Backward::watch_outputs`], that of `g^2` since
    /// [`Backward::watch_squares`].
    pub fn watched(self) -> (BTreeMap<Site, Gram>, BTreeMap<Site, Squares>) {
        (self.way.moments.unwrap_or_default(), self.way.squares.unwrap_or_default())
    }

    /// Takes over the values of a matrix: into the model, packed, and transposed for the way back.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn refresh(&mut self, model: &mut Model, site: Site, values: &Tensor) -> Result<()> {
        self.way.refresh(model, site, values)
    }

    /// Takes over the values of an adapter: into the model, and across for the way back.
    ///
    /// # Errors
    /// If it does not fit its site, or there is no memory for it.
    pub fn refresh_adapter(&mut self, model: &mut Model, site: Site, change: Change<'_>) -> Result<()> {
        self.way.refresh_adapter(model, site, change)
    }

    /// Runs a batch forth and back: adds the gradient of `factor` times the summed loss to `into`, and returns the summed
    /// negative log-likelihood, without the factor, in nats.
    ///
    /// # Errors
    /// If a token is not in the vocabulary or a sequence is longer than the context.
    pub fn run(
        &mut self,
        model: &Model,
        batch: &Tokens,
        aim: &mut dyn Aim,
        factor: f32,
        into: &mut Parameters,
    ) -> Result<f64> {
        self.run_telling(model, batch, Asked { aim, factor }, into, &mut |_, _| {})
    }

    /// [`Backward::run`] that tells of each bucket as soon as its gradients are final, while the others are still made.
    ///
    /// # Errors
    /// As [`Backward::run`].
    pub fn run_telling(
        &mut self,
        model: &Model,
        batch: &Tokens,
        asked: Asked<'_>,
        into: &mut Parameters,
        tell: Tell<'_>,
    ) -> Result<f64> {
        let mut flow = std::mem::take(&mut self.flow);
        asked.aim.begin(batch)?;
        let result = self.forth_and_back(model, &mut flow, batch, asked, into, tell);
        self.flow = flow;
        result
    }

    /// The summed negative log-likelihood of a batch, nats.
    ///
    /// # Errors
    /// As [`Backward::run`].
    pub fn loss(&mut self, model: &Model, batch: &Tokens) -> Result<f64> {
        let mut flow = std::mem::take(&mut self.flow);
        let result = self.forth(model, &mut flow, batch).and_then(|()| {
            let rows = |first| first..flow.tokens().min(first + head::ROWS);
            let pieces = (0..flow.tokens()).step_by(head::ROWS).map(rows);
            let mut asked = Asked { aim: &mut Likelihood, factor: 0.0 };
            pieces.map(|rows| self.logits(model, &flow, rows, &batch.targets, &mut asked)).sum()
        });
        self.flow = flow;
        result
    }

    fn forth_and_back(
        &mut self,
        model: &Model,
        flow: &mut Flow,
        batch: &Tokens,
        asked: Asked<'_>,
        into: &mut Parameters,
        tell: Tell<'_>,
    ) -> Result<f64> {
        self.forth(model, flow, batch)?;
        let Asked { aim, factor } = asked;
        let loss = self.head(model, flow, &batch.targets, Asked { aim: &mut *aim, factor }, into)?;
        tell(Bucket::Head, into);
        for layer in (0..model.spec.layers()).rev() {
            if aim.looks_at(layer) {
                let next = usize::from(layer) + 1;
                // What a block returns the next one begins with.
                let output = match self.entries.get(next).or_else(|| self.kept.get(next).map(|kept| &kept.entry)) {
                    Some(entry) => entry,
                    None => flow.residual(),
                };
                aim.output(layer, output, self.way.dx.values_mut(), factor, into);
            }
            self.block(model, layer, flow, Asked { aim: &mut *aim, factor }, into)?;
            tell(Bucket::Block(layer), into);
        }
        self.embedding(model, batch, into)?;
        tell(Bucket::Embedding, into);
        Ok(loss)
    }

    fn forth(&mut self, model: &Model, flow: &mut Flow, batch: &Tokens) -> Result<()> {
        let past = vec![0; batch.sequences.len()];
        model.restart(flow, batch.sequences.iter().map(Vec::as_slice), &past)?;
        for layer in 0..model.spec.layers() {
            if let Some(entry) = self.entries.get_mut(usize::from(layer)) {
                entry.copy_from(flow.residual());
            }
            let place = self.place(layer);
            self.way.run_block(model, layer, flow, &mut self.kept[place])?;
        }
        Ok(())
    }
    /// Where what a block leaves is kept.
    fn place(&self, layer: u16) -> usize {
        if self.entries.is_empty() { usize::from(layer) } else { 0 }
    }

    /// Walks back through a block.
    fn block(
        &mut self,
        model: &Model,
        layer: u16,
        flow: &mut Flow,
        asked: Asked<'_>,
        into: &mut Parameters,
    ) -> Result<()> {
        let place = self.place(layer);
        // What the last block left is still there.
        if let Some(entry) = self.entries.get(usize::from(layer)).filter(|_| layer + 1 < model.spec.layers()) {
            flow.stand_at(entry);
            self.way.run_block(model, layer, flow, &mut self.kept[place])?;
        }
        self.way.block(model, layer, flow, &mut self.kept[place], asked, into)
    }

    /// Adds the gradient of the residual stream to the rows of the embedding, and to those of learned positions.
    fn embedding(&mut self, model: &Model, batch: &Tokens, into: &mut Parameters) -> Result<()> {
        if let Some(table) = into.matrices.get_mut(&Site::POSITION) {
            let mut row = 0;
            for sequence in &batch.sequences {
                for position in 0..sequence.len() {
                    add(table.row_mut(position), self.way.dx.values().row(row));
                    row += 1;
                }
            }
        }
        if let Some(scale) = model.spec.embed_scale {
            ops::scale(self.way.dx.values_mut(), scale);
        }
        let Some(table) = into.matrices.get_mut(&Site::EMBED) else { return Ok(()) };
        for (row, token) in batch.sequences.iter().flatten().enumerate() {
            add(table.row_mut(*token as usize), self.way.dx.values().row(row));
        }
        Ok(())
    }
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(t, f)| *t += f);
}
