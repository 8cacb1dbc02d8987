//! What is learned: tokens, and what is asked of the logits after each of them.

use crate::{Parameters, Result};
use std::ops::Range;
use tensor::{Tensor, ops};

/// Sequences and what should follow each of their tokens.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    /// The sequences, each from position 0.
    pub sequences: Vec<Vec<u32>>,
    /// For every token of every sequence the one to be predicted from it; `None` counts for nothing.
    pub targets: Vec<Option<u32>>,
    /// Which of all predictions of the text the first one of each sequence is; empty where nobody asks.
    pub places: Vec<usize>,
}

impl Tokens {
    /// How many predictions count.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|t| t.is_some()).count()
    }
}

/// What attention reads in a block.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    /// Queries, keys and values of all heads, as turned by the rotary embedding, `[tokens, heads x channels]`.
    pub values: [&'a Tensor; 3],
    /// Tokens of each sequence.
    pub rows: &'a [usize],
}

/// What is learned from logits.
pub trait Aim {
    /// A batch begins.
    ///
    /// # Errors
    /// If it cannot be prepared.
    fn begin(&mut self, batch: &Tokens) -> Result<()>;

    /// Replaces the logits of some rows of the batch by the gradient of `factor` times their loss; writes the negative
    /// log-likelihood of each row's target (nats) to `losses`, and nothing where there is none.
    ///
    /// # Errors
    /// If what they are compared with cannot be computed.
    fn rows(
        &mut self,
        rows: Range<usize>,
        logits: &mut Tensor,
        targets: &[Option<u32>],
        factor: f32,
        losses: &mut [f32],
    ) -> Result<()>;

    /// Takes the values that learn as they are now: it may learn some beside the model.
    fn take(&mut self, _: &Parameters) {}

    /// Does it look at what a block returns?
    fn looks_at(&self, _layer: u16) -> bool {
        false
    }

    /// Adds the gradient of `factor` times what it makes of a block's output, `[tokens, dim]`, to `gradient`, and that of
    /// what it learns beside the model to `into`.
    fn output(&mut self, _layer: u16, _output: &Tensor, _gradient: &mut Tensor, _factor: f32, _into: &mut Parameters) {}

    /// Adds the gradients of `factor` times what it makes of a block's queries, keys and values to theirs.
    fn attended(&mut self, _layer: u16, _heads: Heads<'_>, _gradients: [&mut Tensor; 3], _factor: f32) {}
}

/// To make the targets likely.
pub struct Likelihood;

impl Aim for Likelihood {
    fn begin(&mut self, _: &Tokens) -> Result<()> {
        Ok(())
    }

    fn rows(
        &mut self,
        _: Range<usize>,
        logits: &mut Tensor,
        targets: &[Option<u32>],
        factor: f32,
        losses: &mut [f32],
    ) -> Result<()> {
        ops::cross_entropy(logits, targets, factor, losses);
        Ok(())
    }
}
