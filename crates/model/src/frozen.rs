//! Products of gradients with the transposes of matrices that do not learn and stay as they are stored: codes too
//! (QLoRA, arXiv 2305.14314).
//!
//! A block of rows at a time is decoded and laid out across, so that no matrix is ever whole in floats.

use crate::{Error, Result};
use rayon::prelude::*;
use std::collections::BTreeMap;
use tensor::{
    Linear, Tensor, Weight,
    ops::{self, Operand},
    packed::{Form, Packed, Turn},
};

/// Rows that are decoded together; the order of summation follows from it.
const ROWS: usize = 512;

/// Memory for such products, used again from one to the next.
#[derive(Default)]
pub(crate) struct Frozen {
    rows: Tensor,
    /// The columns of the gradient that belong to these rows.
    part: Operand,
    /// Blocks laid out across, by their shapes.
    blocks: BTreeMap<[usize; 2], Linear>,
}

impl Frozen {
    /// Becomes `(gain * dy) W`: `[tokens, outputs]` and `[outputs, inputs]` give `[tokens, inputs]`; with `add` it is added
    /// to `out`.
    pub fn product(
        &mut self,
        form: Form,
        dy: &Tensor,
        gain: Option<&[f32]>,
        weight: &Weight,
        out: &mut Tensor,
        add: bool,
    ) -> Result<()> {
        let (outputs, inputs) = (weight.rows(), weight.cols());
        if let Some(low) = weight.low_rank() {
            match low.rest() {
                Some(rest) => self.product(form, dy, gain, rest, out, add)?,
                None if add => {}
                None => clear(out, dy.rows(), inputs),
            }
            if low.rank() == 0 {
                return Ok(());
            }
            let mut between = Tensor::default();
            self.product(form, dy, gain, low.up(), &mut between, false)?;
            return self.product(form, &between, None, low.down(), out, true);
        }
        if !add {
            clear(out, dy.rows(), inputs);
        }
        for first in (0..outputs).step_by(ROWS) {
            let rows = ROWS.min(outputs - first);
            self.rows.reset(rows, inputs);
            let each = self.rows.as_mut_slice().par_chunks_mut(inputs.max(1)).enumerate();
            each.for_each(|(row, values)| weight.decode_row(first + row, values));
            let part = self.part.values_mut();
            part.reset(dy.rows(), rows);
            for token in 0..dy.rows() {
                let (to, from) = (part.row_mut(token), &dy.row(token)[first..first + rows]);
                match gain {
                    Some(gain) => to.iter_mut().zip(from.iter().zip(&gain[first..])).for_each(|(t, (d, g))| *t = d * g),
                    None => to.copy_from_slice(from),
                }
            }
            ops::add_product(&mut self.part, across(&mut self.blocks, &self.rows, form)?, out);
        }
        Ok(())
    }
}

fn clear(out: &mut Tensor, rows: usize, cols: usize) {
    out.reset(rows, cols);
    ops::clear(out.as_mut_slice());
}

/// A block of rows, laid out across in memory that held one of its shape before.
fn across<'a>(blocks: &'a mut BTreeMap<[usize; 2], Linear>, rows: &Tensor, form: Form) -> Result<&'a Linear> {
    let full = |source| Error::NoRoom { bytes: 4 * rows.as_slice().len(), source };
    let fresh = || Packed::of(rows, form, Turn::Across).map(|p| Linear::new(Weight::Packed(p))).map_err(full);
    let shape = [rows.rows(), rows.cols()];
    match blocks.entry(shape) {
        std::collections::btree_map::Entry::Vacant(place) => Ok(place.insert(fresh()?)),
        std::collections::btree_map::Entry::Occupied(held) => {
            let linear = held.into_mut();
            if let Weight::Packed(packed) = &mut linear.weight {
                packed.refill(rows, Turn::Across).map_err(full)?;
            }
            Ok(linear)
        }
    }
}
