//! What a method sees that rewrites the matrices of a block together.

use crate::{Result, Rewrite};
use model::{Flow, Model, Site, Spec};
use std::collections::BTreeMap;
use tensor::{Storage, Tensor, Weight};

/// A method that rewrites the matrices of a block together.
pub trait BlockRewrite: Send + Sync {
    /// How matrices outside of blocks are rewritten.
    fn outside(&self) -> &dyn Rewrite;

    /// How those of a block are before the block is: what it begins with.
    fn first(&self) -> &dyn Rewrite;

    /// Stores matrices of a block anew; those that it leaves out stay as they began.
    ///
    /// # Errors
    /// If a storage cannot hold one, or the job was interrupted.
    fn block(&self, block: &Block<'_>) -> Result<BTreeMap<Site, Weight>>;

    /// Most bytes that [`BlockRewrite::block`] holds of a model whose texts have at most `longest` tokens.
    fn memory(&self, spec: &Spec, longest: usize) -> usize;

    /// Tokens that pass a block, forth alone counted as one and forth and back as three, for texts of `mean` tokens and `total` in
    /// all.
    fn passes(&self, mean: f64, total: usize) -> f64;
}

/// A block that is to be rewritten.
pub struct Block<'a> {
    /// Which.
    pub layer: u16,
    /// The model, whose matrices of this block are as they begin.
    pub model: &'a Model,
    /// The block's matrices as they were, and how they are to be stored.
    pub matrices: &'a [(Site, Tensor, Storage)],
    /// What goes in and what should come out.
    pub texts: Texts<'a>,
    /// Start of all random numbers.
    pub seed: u64,
}

/// The calibration texts as a block sees them.
#[derive(Default)]
pub struct Texts<'a> {
    /// What the model as it is gives to the block, some texts at a time, `[tokens, dim]`.
    inputs: Vec<Tensor>,
    /// What the original's block returns to the original.
    outputs: Vec<&'a Tensor>,
    /// Of each text, where it lies: which of these, the first row, and how many.
    places: Vec<[usize; 3]>,
}

impl<'a> Texts<'a> {
    /// Takes what flows hold before a block.
    pub(crate) fn before(flows: &[Flow]) -> Texts<'a> {
        let mut texts = Texts::default();
        for (i, flow) in flows.iter().enumerate() {
            texts.inputs.push(flow.residual().clone());
            let mut first = 0;
            for rows in flow.rows() {
                texts.places.push([i, first, *rows]);
                first += rows;
            }
        }
        texts
    }

    /// Takes what the original's flows hold after it.
    pub(crate) fn after(self, originals: &'a [Flow]) -> Texts<'a> {
        Texts { outputs: originals.iter().map(Flow::residual).collect(), ..self }
    }

    /// What flows held before the block, as they were taken.
    pub(crate) fn inputs(self) -> Vec<Tensor> {
        self.inputs
    }

    /// How many texts.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Tokens of each text.
    pub fn rows(&self) -> impl Iterator<Item = usize> {
        self.places.iter().map(|[_, _, rows]| *rows)
    }

    /// Lays some texts one after the other.
    pub fn lay(&self, which: &[usize], into: &mut Batch) {
        into.rows.clear();
        into.rows.extend(which.iter().map(|text| self.places[*text][2]));
        let (tokens, dim) = (into.rows.iter().sum(), self.inputs.first().map_or(0, Tensor::cols));
        into.inputs.reset(tokens, dim);
        into.outputs.reset(tokens, dim);
        let rows = which.iter().map(|text| self.places[*text]);
        let rows = rows.flat_map(|[part, first, rows]| (first..first + rows).map(move |row| (part, row)));
        for (at, (part, row)) in rows.enumerate() {
            into.inputs.row_mut(at).copy_from_slice(self.inputs[part].row(row));
            into.outputs.row_mut(at).copy_from_slice(self.outputs[part].row(row));
        }
    }
}

/// Some texts, one after the other.
#[derive(Default)]
pub struct Batch {
    /// Tokens of each.
    pub rows: Vec<usize>,
    /// What goes into the block, `[tokens, dim]`.
    pub inputs: Tensor,
    /// What should come out.
    pub outputs: Tensor,
}
