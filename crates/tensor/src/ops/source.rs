//! The rows of a weight as the panels that kernels read: as they are packed, opened, or decoded.

use crate::{
    Rounding, Weight,
    kernels::{Tile, kernels},
    lines::Lines,
    packed::{Form, InputKind, Inputs, Span, form::LANES},
};

/// What a product reads.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Wanted {
    pub kind: InputKind,
    pub rounding: Option<Rounding>,
}

/// The rows of a weight as panels.
pub(super) struct Source<'a> {
    rows: Rows<'a>,
    rounding: Option<Rounding>,
    /// Are panels opened before tokens pass over them?
    opened: bool,
}

/// How they lie.
enum Rows<'a> {
    Packed(&'a crate::packed::Packed),
    Stored(&'a Weight),
}

impl<'a> Source<'a> {
    pub fn of(weight: &'a Weight, rounding: Option<Rounding>, tokens: usize) -> Source<'a> {
        match weight {
            Weight::Packed(packed) => {
                let form = packed.form();
                // Kernels of codes round inputs themselves, and more finely.
                let rounding = rounding.filter(|_| !matches!(form, Form::Codes(_)));
                let opened = kernels().codes.opens(form, tokens);
                Source { rows: Rows::Packed(packed), rounding, opened }
            }
            other => Source { rows: Rows::Stored(other), rounding, opened: false },
        }
    }

    pub fn form(&self) -> Form {
        match &self.rows {
            Rows::Packed(p) if self.opened => p.form().opened(),
            Rows::Packed(p) => p.form(),
            Rows::Stored(_) => Form::F32,
        }
    }

    pub fn wanted(&self) -> Wanted {
        Wanted { kind: InputKind::of(self.form(), kernels()), rounding: self.rounding }
    }

    pub fn rows(&self) -> usize {
        match &self.rows {
            Rows::Packed(p) => p.rows(),
            Rows::Stored(w) => w.rows(),
        }
    }

    pub fn panel_bytes(&self) -> usize {
        match &self.rows {
            Rows::Packed(p) if self.opened => self.form().panel_bytes(p.cols()),
            Rows::Packed(p) => p.panel_bytes(),
            Rows::Stored(w) => 4 * LANES * w.cols(),
        }
    }

    /// Decodes the panels of a weight that is not packed, and opens those of one that is where that pays.
    pub fn decode(&self, first: usize, panels: usize, scratch: &mut Decode) {
        let bytes = self.panel_bytes();
        match &self.rows {
            Rows::Packed(p) if self.opened => {
                for (i, out) in scratch.room(first, panels * bytes).chunks_exact_mut(bytes).enumerate() {
                    // SAFETY: the weight has this panel, and an opened one takes so many bytes.
                    unsafe { (kernels().codes.open)(p.form(), p.cols(), p.panel(first + i), out.as_mut_ptr()) }
                }
            }
            Rows::Packed(_) => {}
            Rows::Stored(w) => {
                let cols = w.cols();
                let mut rows = std::mem::take(&mut scratch.rows);
                rows.resize(LANES * cols, 0.0);
                for (i, out) in scratch.room(first, panels * bytes).chunks_exact_mut(bytes.max(1)).enumerate() {
                    let row = (first + i) * LANES;
                    let held = LANES.min(w.rows() - row);
                    (0..held).for_each(|r| w.decode_row(row + r, &mut rows[r * cols..(r + 1) * cols]));
                    let rows = bytemuck::cast_slice(&rows[..held * cols]);
                    (kernels().codes.pack_panel)(crate::Storage::F32, cols, rows, out);
                }
                scratch.rows = rows;
            }
        }
    }

    /// Do kernels read the weight itself?
    pub fn is_read_in_place(&self) -> bool {
        matches!(&self.rows, Rows::Packed(_)) && !self.opened
    }

    pub fn is_packed_floats(&self) -> bool {
        matches!(&self.rows, Rows::Packed(p) if p.form().is_cut_into_steps())
    }

    /// Chunks of a panel; for floats, steps.
    pub fn length(&self) -> usize {
        match &self.rows {
            Rows::Packed(p) => self.form().length(p.cols()),
            Rows::Stored(w) => w.cols(),
        }
    }

    /// A tile of the panels from `first` on, as yet without inputs; `decoded` holds those that had to be.
    pub fn tile(&self, first: usize, decoded: &Decode) -> Tile {
        let weights = match &self.rows {
            Rows::Packed(p) if !self.opened => p.panel(first),
            _ => decoded.panels.as_ptr().cast::<u8>().wrapping_add((first - decoded.first) * self.panel_bytes()),
        };
        Tile::new(self.form(), weights, self.panel_bytes(), self.length())
    }

    /// Multiplies the inputs of one tile with panels `first..first + panels`; sums go to `out` `[panels][width][LANES]`.
    pub fn run(
        &self,
        inputs: &Inputs,
        span: &Span,
        first: usize,
        panels: usize,
        decoded: &Decode,
        out: &mut Lines<f32>,
    ) {
        out.resize(panels * span.width * LANES);
        let mut tile = self.tile(first, decoded);
        tile.steps = Tile::block(span.width);
        // SAFETY: the weight holds these panels, the inputs a tile of this width and kind, and `out` a sum for every token
        // and lane.
        unsafe { tile.part(0..panels, 0..self.length(), inputs.tile(span), span.width, out.as_mut_ptr()) }
    }
}

/// What panels are decoded, or opened, in.
#[derive(Default)]
pub(super) struct Decode {
    rows: Vec<f32>,
    /// The first of them.
    first: usize,
    panels: Lines<u8>,
}

impl Decode {
    /// Room for so many bytes of panels from `first` on.
    fn room(&mut self, first: usize, bytes: usize) -> &mut [u8] {
        self.first = first;
        self.panels.resize(bytes);
        &mut self.panels
    }
}
