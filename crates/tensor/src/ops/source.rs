//! The rows of a weight as the panels that kernels read: as they are packed, decoded, or with their holes filled.

use crate::{
    Rounding, Weight,
    kernels::{Tile, kernels},
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
    /// Are holes filled before tokens pass over a panel?
    filled: bool,
}

/// Tokens from which on holes are filled first, which costs about what a tile of tokens does.
const FILLED: usize = 16;

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
                Source { rows: Rows::Packed(packed), rounding, filled: tokens >= FILLED && form.pattern().is_some() }
            }
            other => Source { rows: Rows::Stored(other), rounding, filled: false },
        }
    }

    pub fn form(&self) -> Form {
        match &self.rows {
            Rows::Packed(p) if self.filled => p.form().filled(),
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
            Rows::Packed(p) if self.filled => self.form().panel_bytes(p.cols()),
            Rows::Packed(p) => p.panel_bytes(),
            Rows::Stored(w) => 4 * LANES * w.cols(),
        }
    }

    /// Decodes the panels of a weight that is not packed, and fills the holes of one that is.
    pub fn decode(&self, first: usize, panels: usize, scratch: &mut Decode) {
        let w = match &self.rows {
            Rows::Packed(p) if self.filled => {
                let bytes = self.panel_bytes();
                scratch.panels.resize(panels * bytes / 4, 0.0);
                for (i, out) in scratch.panels.chunks_exact_mut(bytes / 4).enumerate() {
                    // SAFETY: the weight has this panel, and a filled one takes so many bytes.
                    unsafe {
                        (kernels().codes.fill)(p.form(), p.cols(), p.panel(first + i), out.as_mut_ptr().cast());
                    }
                }
                return;
            }
            Rows::Packed(_) => return,
            Rows::Stored(w) => w,
        };
        let cols = w.cols();
        scratch.rows.resize(LANES * cols, 0.0);
        scratch.panels.resize(panels * LANES * cols, 0.0);
        for p in 0..panels {
            let row = (first + p) * LANES;
            let rows = LANES.min(w.rows() - row);
            for r in 0..rows {
                w.decode_row(row + r, &mut scratch.rows[r * cols..(r + 1) * cols]);
            }
            let panel = &mut scratch.panels[p * LANES * cols..(p + 1) * LANES * cols];
            let rows = bytemuck::cast_slice(&scratch.rows[..rows * cols]);
            (kernels().codes.pack_panel)(crate::Storage::F32, cols, rows, bytemuck::cast_slice_mut(panel));
        }
    }

    /// Do kernels read the weight itself?
    pub fn is_read_in_place(&self) -> bool {
        matches!(&self.rows, Rows::Packed(_)) && !self.filled
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

    /// A tile of the panels from `first` on, as yet without inputs; `decoded` are those that had to be.
    pub fn tile(&self, first: usize, decoded: &[f32]) -> Tile {
        let weights = match &self.rows {
            Rows::Packed(p) if !self.filled => p.panel(first),
            _ => decoded.as_ptr().cast(),
        };
        Tile::new(self.form(), weights, self.panel_bytes(), self.length())
    }

    /// Multiplies the inputs of one tile with panels `first..first + panels`; sums go to `out` `[panels][width][LANES]`.
    pub fn run(&self, inputs: &Inputs, span: &Span, first: usize, panels: usize, decoded: &[f32], out: &mut Vec<f32>) {
        out.resize(panels * span.width * LANES, 0.0);
        let mut tile = self.tile(first, decoded);
        tile.steps = Tile::block(span.width);
        // SAFETY: the weight holds these panels, the inputs a tile of this width and kind, and `out` a sum for every token
        // and lane.
        unsafe { tile.part(0..panels, 0..self.length(), inputs.tile(span), span.width, out.as_mut_ptr()) }
    }
}

/// What panels are decoded in.
#[derive(Default)]
pub(super) struct Decode {
    rows: Vec<f32>,
    pub panels: Vec<f32>,
}
