//! Packed weights: matrices laid out for the tile kernels, in huge pages, beside inputs that are laid out to match.

mod floats;
pub mod form;
mod inputs;
mod repack;
mod sparse;

pub use floats::Turn;
pub(crate) use floats::pack_rows;
pub use form::Form;
pub use inputs::{InputKind, Inputs, Span};
pub(crate) use inputs::{brain, few_rows, halved, join, pack_codes, put_together, regroup};
pub(crate) use repack::{pack_panel, pack_words};

use crate::{
    Bytes, Storage, Stored, Weight,
    bytes::Pages,
    kernels::kernels,
    threads::{self, Shared},
};
use form::LANES;
use std::{io, ops::Range};

/// A matrix `[rows, cols]` in a packed form.
#[derive(Clone, Debug)]
pub struct Packed {
    storage: Storage,
    form: Form,
    rows: usize,
    cols: usize,
    bytes: Bytes,
}

/// Stored bytes that one task packs before their pages are given back.
const RUN: usize = 1 << 20;

impl Packed {
    /// Packs matrices into one run of huge pages, each in turn; a weight's own bytes are let go as soon as they are
    /// packed. What is packed already is returned as it is; of factors each is packed.
    ///
    /// # Errors
    /// If the system has no memory for them.
    pub fn all(weights: Vec<Weight>) -> io::Result<Vec<Weight>> {
        let counts: Vec<usize> = weights.iter().map(|w| w.parts().len()).collect();
        let mut packed = Packed::each(weights.into_iter().flat_map(Weight::into_parts).collect())?.into_iter();
        let whole = |count| {
            let parts = packed.by_ref().take(count).collect();
            Weight::of_parts(parts).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
        };
        counts.into_iter().map(whole).collect()
    }

    /// Packs matrices none of which is of low rank.
    fn each(weights: Vec<Weight>) -> io::Result<Vec<Weight>> {
        let mut matrices = Vec::with_capacity(weights.len());
        let mut done: Vec<Option<Weight>> = Vec::with_capacity(weights.len());
        let mut size = 0;
        for (i, weight) in weights.into_iter().enumerate() {
            let form = Form::of(weight.storage());
            match weight {
                Weight::Dense(stored) | Weight::Quant(stored) => {
                    let bytes = form.bytes(stored.rows(), stored.cols());
                    matrices.push(Matrix { i, stored, form, place: size..size + bytes });
                    size = (size + bytes).next_multiple_of(64);
                    done.push(None);
                }
                other @ (Weight::Packed(_) | Weight::LowRank(_)) => done.push(Some(other)),
            }
        }
        let mut pages = Pages::new(size)?;
        // First those whose stored bytes are memory of our own, each let go before the next: while they are still
        // held, little has been packed.
        let (mapped, owned): (Vec<Matrix>, Vec<Matrix>) = matrices.into_iter().partition(|m| m.stored.is_mapped());
        let mut packed = Vec::new();
        for matrix in owned {
            fill(std::slice::from_ref(&matrix), pages.as_mut_slice());
            packed.push(matrix.into_place());
        }
        fill(&mapped, pages.as_mut_slice());
        packed.extend(mapped.into_iter().map(Matrix::into_place));
        let bytes = pages.freeze();
        for (i, place, [rows, cols], storage, form) in packed {
            let bytes = bytes.slice(place).unwrap_or_else(|| Bytes::from_vec(Vec::new()));
            done[i] = Some(Weight::Packed(Packed { storage, form, rows, cols, bytes }));
        }
        Ok(done.into_iter().flatten().collect())
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the matrix was stored.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// How it lies.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Bytes in memory.
    pub fn packed_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Bytes of a panel.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.form.panel_bytes(self.cols)
    }

    /// The panel `panel` and those after it.
    pub(crate) fn panel(&self, panel: usize) -> *const u8 {
        self.bytes[panel * self.panel_bytes()..].as_ptr()
    }

    /// Decodes one row into `out` (`[cols]`): the values that its storage decodes to, read back from the panel.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        let panel = &self.bytes[row / LANES * self.panel_bytes()..][..self.panel_bytes()];
        repack::unpack_row(self.form, panel, row % LANES, out);
    }
}

/// A matrix that is packed, and where to.
struct Matrix {
    /// Its number among all weights.
    i: usize,
    stored: Stored,
    form: Form,
    place: Range<usize>,
}

impl Matrix {
    /// What is known of it without its stored bytes, which are let go.
    fn into_place(self) -> (usize, Range<usize>, [usize; 2], Storage, Form) {
        let shape = [self.stored.rows(), self.stored.cols()];
        (self.i, self.place, shape, self.stored.storage(), self.form)
    }
}

/// Packs matrices, all workers at once; mapped pages are given back run by run.
fn fill(matrices: &[Matrix], out: &mut [u8]) {
    let shared = Shared::new(out);
    let run = |m: &Matrix| (RUN / (LANES * m.stored.storage().row_bytes(m.stored.cols())).max(1)).max(1);
    let runs: Vec<(&Matrix, usize)> = matrices
        .iter()
        .flat_map(|m| (0..m.stored.rows().div_ceil(LANES)).step_by(run(m)).map(move |first| (m, first)))
        .collect();
    threads::each(runs.len(), &|i| {
        let (m, first) = runs[i];
        let (stored, panel) = (&m.stored, m.form.panel_bytes(m.stored.cols()));
        let rows = |panels: Range<usize>| panels.start * LANES..stored.rows().min(panels.end * LANES);
        let panels = first..stored.rows().div_ceil(LANES).min(first + run(m));
        stored.will_need(rows(panels.clone()));
        let mut source = Vec::new();
        for p in panels.clone() {
            // Sixteen rows side by side are more than a prefetcher follows; one after the other they are not.
            stored.copy(rows(p..p + 1), &mut source);
            // SAFETY: `out` outlives the section and has a place for every panel; this task alone writes this one.
            let out = unsafe { shared.slice(m.place.start + p * panel, panel) };
            (kernels().codes.pack_panel)(stored.storage(), stored.cols(), &source, out);
        }
        stored.release(rows(panels));
    });
}
