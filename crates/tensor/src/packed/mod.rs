//! Packed weights: matrices laid out for the tile kernels, in huge pages, beside inputs that are laid out to match.

pub mod form;
mod inputs;
mod repack;

pub use form::Form;
pub use inputs::{InputKind, Inputs, Span};
pub(crate) use inputs::{brain, pack_inputs};
pub(crate) use repack::pack_panel;

use crate::{
    Bytes, Storage, Weight,
    bytes::Pages,
    kernels::kernels,
    threads::{self, Shared},
};
use form::LANES;
use std::io;

/// A matrix `[rows, cols]` in a packed form.
#[derive(Clone, Debug)]
pub struct Packed {
    storage: Storage,
    form: Form,
    rows: usize,
    cols: usize,
    bytes: Bytes,
}

/// Stored bytes that are packed before their pages are given back.
const SLAB: usize = 16 << 20;

impl Packed {
    /// Packs matrices into one run of huge pages, each in turn; a weight's own bytes are let go as soon as they are
    /// packed. What has no form (see [`Form::of`]) is returned as it is.
    ///
    /// # Errors
    /// If the system has no memory for them.
    pub fn all(weights: Vec<Weight>) -> io::Result<Vec<Weight>> {
        let size = |w: &Weight| match (w, Form::of(w.storage())) {
            (Weight::Packed(_), _) | (_, None) => 0,
            (_, Some(form)) => form.bytes(w.rows(), w.cols()).next_multiple_of(64),
        };
        let mut pages = Pages::new(weights.iter().map(size).sum())?;
        let mut spans = Vec::with_capacity(weights.len());
        let mut at = 0;
        // First those whose stored bytes are memory of our own: while they are still held, little has been packed.
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by_key(|i| weights[*i].bytes().is_mapped());
        let mut weights: Vec<Option<Weight>> = weights.into_iter().map(Some).collect();
        for i in order {
            let Some(weight) = weights[i].take() else { continue };
            let bytes = size(&weight);
            if bytes == 0 {
                weights[i] = Some(weight);
                continue;
            }
            fill(&weight, &mut pages.as_mut_slice()[at..at + bytes]);
            spans.push((i, at, weight.storage(), weight.rows(), weight.cols()));
            at += bytes;
        }
        let bytes = pages.freeze();
        for (i, at, storage, rows, cols) in spans {
            let form = Form::of(storage);
            let span = form.and_then(|form| bytes.slice(at..at + form.bytes(rows, cols)));
            let packed = form.zip(span).map(|(form, bytes)| Packed { storage, form, rows, cols, bytes });
            weights[i] = packed.map(Weight::Packed);
        }
        Ok(weights.into_iter().flatten().collect())
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

/// Packs one matrix, all workers at once, slab by slab.
fn fill(weight: &Weight, out: &mut [u8]) {
    let (storage, cols) = (weight.storage(), weight.cols());
    let Some(form) = Form::of(storage) else { return };
    let (panel, width) = (form.panel_bytes(cols), storage.row_bytes(cols));
    let per_slab = (SLAB / (LANES * width).max(1)).max(1);
    let shared = Shared::new(out);
    let panels = weight.rows().div_ceil(LANES);
    for slab in (0..panels).step_by(per_slab) {
        let end = panels.min(slab + per_slab);
        let source = slab * LANES * width..weight.rows().min(end * LANES) * width;
        weight.bytes().will_need(source.clone());
        threads::each(end - slab, &|i| {
            let first = (slab + i) * LANES;
            let rows = first * width..weight.rows().min(first + LANES) * width;
            // SAFETY: `out` outlives the section and holds every panel; this task alone writes this one.
            let out = unsafe { shared.slice((slab + i) * panel, panel) };
            (kernels().codes.pack_panel)(storage, cols, &weight.bytes()[rows], out);
        });
        weight.bytes().release(source);
    }
}
