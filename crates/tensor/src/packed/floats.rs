//! Matrices of floats that are packed again and again: the weights of a model that learns.

use super::{Form, Packed, form::LANES, halved};
use crate::{
    Storage, Tensor,
    bytes::Pages,
    kernels::kernels,
    threads::{self, Shared},
};
use std::{cell::RefCell, io, ops::Range};

/// Which way round a matrix is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// As it is: its rows become outputs.
    Straight,
    /// Transposed: its columns become outputs.
    Across,
}

impl Packed {
    /// Packs `x` as floats of `form`, which is not [`Form::F16`] and no codes.
    ///
    /// # Errors
    /// If the system has no memory for it.
    pub fn of(x: &Tensor, form: Form, turn: Turn) -> io::Result<Packed> {
        let [rows, cols] = match turn {
            Turn::Straight => [x.rows(), x.cols()],
            Turn::Across => [x.cols(), x.rows()],
        };
        let storage = if form == Form::Bf16 { Storage::Bf16 } else { Storage::F32 };
        let bytes = Pages::new(form.bytes(rows, cols))?.freeze();
        let mut packed = Packed { storage, form, rows, cols, bytes };
        packed.refill(x, turn)?;
        Ok(packed)
    }

    /// Packs other values of the same shape in place; where clones share the memory, they keep it as it is.
    ///
    /// # Errors
    /// If the system has no memory for a copy.
    pub fn refill(&mut self, x: &Tensor, turn: Turn) -> io::Result<()> {
        let (form, panel) = (self.form, self.panel_bytes());
        if self.bytes.as_mut_slice().is_none() {
            self.bytes = Pages::new(form.bytes(self.rows, self.cols))?.freeze();
        }
        let Some(bytes) = self.bytes.as_mut_slice() else { return Ok(()) };
        let shared = Shared::new(bytes);
        threads::each(self.rows.div_ceil(LANES), &|i| {
            // SAFETY: the memory outlives the section and has a place for every panel; this task alone writes this one.
            let out = unsafe { shared.slice(i * panel, panel) };
            match turn {
                Turn::Straight => {
                    pack_rows(x, i * LANES..x.rows().min((i + 1) * LANES), self.storage, out);
                    if form == Form::Half {
                        halve(bytemuck::cast_slice_mut(out));
                    }
                }
                Turn::Across => {
                    let out = &mut bytemuck::cast_slice_mut(out)[..form.length(x.rows()) * LANES];
                    (kernels().columns)(x, 0..x.rows(), i * LANES, LANES, form, out);
                }
            }
        });
        Ok(())
    }
}

thread_local! {
    static ROWS: RefCell<Vec<u32>> = RefCell::default();
}

/// Some rows, sixteen at most, as a panel of `storage`, 32-bit or brain floats.
pub(crate) fn pack_rows(x: &Tensor, rows: Range<usize>, storage: Storage, out: &mut [u8]) {
    let cols = x.cols();
    let values = &x.as_slice()[rows.start * cols..rows.end * cols];
    if storage == Storage::F32 {
        return (kernels().codes.pack_panel)(storage, cols, bytemuck::cast_slice(values), out);
    }
    ROWS.with_borrow_mut(|words| {
        // An odd row ends in half a word, which the next row takes: then all of them are one run.
        words.resize(values.len().div_ceil(2), 0);
        (kernels().brain_pairs)(values, words);
        let bytes: &[u8] = bytemuck::cast_slice(words);
        (kernels().codes.pack_panel)(storage, cols, &bytes[..2 * values.len()], out);
    });
}

/// Rounds 32-bit floats to 16-bit ones.
fn halve(words: &mut [u32]) {
    words.iter_mut().for_each(|v| *v = halved(f32::from_bits(*v)).to_bits());
}
