//! `Runner`: a model at work on texts whose caches it continues, in memory that it uses again from step to step.

use crate::{Cache, Flow, Model, Operation, Profile, Result};
use tensor::{
    Tensor,
    ops::{Memory, Operand},
    threads,
};

/// Which positions' logits a step returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None: more tokens follow.
    Nothing,
    /// The last of each sequence.
    Last,
    /// Every token that was fed, sequence after sequence.
    All,
}

/// Feeds tokens to caches, step by step.
pub struct Runner<'m> {
    model: &'m Model,
    flow: Flow,
    normed: Operand,
    logits: Tensor,
    /// Memories of the block that runs, one per sequence, on loan from the caches.
    memory: Vec<Memory>,
    past: Vec<usize>,
    runs: Vec<usize>,
    rows: Vec<usize>,
    /// Does a token take so little that other workers would only be in the way?
    alone: bool,
}

/// Stored bytes of a block up to which one worker runs a token faster than several that have to meet four times.
const ALONE: usize = 400 << 10;

impl<'m> Runner<'m> {
    /// A runner of `model`.
    pub fn new(model: &'m Model) -> Runner<'m> {
        let blocks = model.linears.iter().filter(|(s, _)| s.layer.is_some()).map(|(_, l)| l.weight.size_bytes());
        let alone = blocks.sum::<usize>() <= ALONE * usize::from(model.spec.layers().max(1));
        Runner {
            model,
            flow: Flow::default(),
            normed: Operand::default(),
            logits: Tensor::default(),
            memory: Vec::new(),
            past: Vec::new(),
            runs: Vec::new(),
            rows: Vec::new(),
            alone,
        }
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Feeds each sequence's next tokens to its cache; returns logits `[rows, vocab]`.
    ///
    /// Where a longer text turns earlier keys otherwise, its whole text runs again and counts as fed.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or a text grows beyond the learned positions; the caches then hold what
    /// they held.
    pub fn step<S: AsRef<[u32]>>(&mut self, sequences: &[S], caches: &mut [Cache], wanted: Wanted) -> Result<&Tensor> {
        let tokens: usize = sequences.iter().map(|s| s.as_ref().len()).sum();
        if self.alone && tokens <= 4 {
            return threads::limited(1, || self.step_here(sequences, caches, wanted));
        }
        self.step_here(sequences, caches, wanted)
    }

    fn step_here<S: AsRef<[u32]>>(&mut self, sequences: &[S], caches: &mut [Cache], wanted: Wanted) -> Result<&Tensor> {
        let model = self.model;
        self.runs.clear();
        for (sequence, cache) in sequences.iter().zip(caches.iter_mut()) {
            self.runs.push(cache.feed(&model.spec, sequence.as_ref()));
        }
        self.past.clear();
        self.past.extend(caches.iter().zip(&self.runs).map(|(c, run)| c.len() - run));
        let fed = caches.iter().zip(&self.past).map(|(c, past)| &c.tokens()[*past..]);
        if let Err(e) = model.restart(&mut self.flow, fed, &self.past) {
            caches.iter_mut().zip(&self.past).for_each(|(c, past)| c.tokens.truncate(*past));
            return Err(e);
        }
        for layer in 0..model.spec.layers() {
            let at = usize::from(layer);
            let lend = |c: &mut Cache| std::mem::replace(&mut c.blocks[at], Memory::new(model.key_value, 0, 0));
            self.memory.clear();
            self.memory.extend(caches.iter_mut().map(lend));
            let run = model.block(layer, &mut self.flow, &mut self.memory, &mut ());
            for (cache, memory) in caches.iter_mut().zip(self.memory.drain(..)) {
                cache.blocks[at] = memory;
            }
            run?;
        }
        if wanted == Wanted::Nothing {
            self.logits.reset(0, model.spec.vocab);
            return Ok(&self.logits);
        }
        self.rows.clear();
        let mut end = 0;
        for (run, sequence) in self.runs.iter().zip(sequences) {
            end += run;
            let first = if wanted == Wanted::All { end - sequence.as_ref().len() } else { end.saturating_sub(1) };
            self.rows.extend(first..end);
        }
        model.final_into(&self.flow, &self.rows, self.normed.values_mut())?;
        self.flow.lap(Operation::Norm);
        model.head_into(&mut self.normed, &mut self.logits, &mut ())?;
        self.flow.lap(Operation::Head);
        Ok(&self.logits)
    }

    /// Feeds a prompt to a cache, so many tokens at a time that its activations stay small; returns the logits after
    /// its last token, `[1, vocab]`.
    ///
    /// # Errors
    /// As [`Runner::step`].
    pub fn read(&mut self, prompt: &[u32], cache: &mut Cache) -> Result<&Tensor> {
        let cache = std::slice::from_mut(cache);
        let last = prompt.len().saturating_sub(1) / PIECE * PIECE;
        for piece in prompt[..last].chunks(PIECE) {
            self.step(&[piece], cache, Wanted::Nothing)?;
        }
        self.step(&[&prompt[last..]], cache, Wanted::Last)
    }

    /// Times every operation from here on; returns what was timed before.
    pub fn profile(&mut self) -> Option<Profile> {
        self.flow.profile()
    }
}

/// Tokens of a prompt that run together.
const PIECE: usize = 512;
