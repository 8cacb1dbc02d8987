//! The gradient of a product's weight: `dW = dYᵀ X`, with the tile kernels of the product itself.
//!
//! The tokens are what is summed over, in rising order, so `X` and `dY` are packed column by column. The gradient of
//! the input, `dX = dY W`, is a product with the transposed weight ([`crate::packed::Packed::of`]).

use crate::{
    Tensor,
    kernels::{Tile, kernels},
    packed::{Form, InputKind, Inputs, form::LANES, pack_columns},
    threads::{self, Shared},
};
use std::cell::RefCell;

/// A matrix `[tokens, cols]` whose columns are the lanes of panels.
#[derive(Clone, Debug, Default)]
pub struct Columns {
    form: Option<Form>,
    tokens: usize,
    cols: usize,
    data: Vec<u32>,
}

/// Tokens that are packed together: as many as stay in the first-level cache.
const RUN: usize = 64;

impl Columns {
    /// Packs `x` as floats of `form` ([`Form::F32`] or [`Form::Bf16`]), in memory that is used again.
    pub fn pack(&mut self, x: &Tensor, form: Form) {
        let (steps, panels) = (form.length(x.rows()), x.cols().div_ceil(LANES));
        (self.form, self.tokens, self.cols) = (Some(form), x.rows(), x.cols());
        self.data.resize(panels * steps * LANES, 0);
        let shared = Shared::new(&mut self.data);
        threads::each(x.rows().div_ceil(RUN), &|run| {
            let rows = run * RUN..x.rows().min((run + 1) * RUN);
            let first = form.length(rows.start);
            let count = form.length(rows.end) - first;
            for panel in 0..panels {
                // SAFETY: `data` outlives the section; this task alone writes these steps.
                let out = unsafe { shared.slice((panel * steps + first) * LANES, count * LANES) };
                pack_columns(x, rows.clone(), panel * LANES, LANES, form, out);
            }
        });
    }

    fn steps(&self) -> usize {
        self.form.map_or(0, |form| form.length(self.tokens))
    }
}

/// Panels and tiles of inputs of a task: what of both stays in the second-level cache.
const PANELS: usize = 4;
const TILES: usize = 4;

/// Adds `dyᵀ x` to `gradient` `[outputs, inputs]`; `dy` was packed by [`Inputs::pack_columns`].
///
/// # Panics
/// If the shapes differ, which is the caller's fault.
pub fn weight_gradient(x: &Columns, dy: &Inputs, gradient: &mut Tensor) {
    let Some(form) = x.form else { return };
    assert_eq!((gradient.cols(), dy.cols()), (x.cols, x.tokens), "inputs and tokens of a weight's gradient");
    assert_eq!(gradient.rows(), dy.spans().last().map_or(0, |s| s.first + s.width), "outputs of a weight's gradient");
    assert!(dy.kind() == Some(InputKind::of(form, kernels())), "kinds of a weight's gradient");
    let (cols, steps) = (x.cols, x.steps());
    let panels = cols.div_ceil(LANES);
    let groups = panels.div_ceil(PANELS);
    let out = Shared::new(gradient.as_mut_slice());
    threads::each(groups * dy.spans().len().div_ceil(TILES), &|i| {
        let (group, tiles) = (i % groups, i / groups);
        let (first, end) = (group * PANELS, panels.min((group + 1) * PANELS));
        SUMS.with_borrow_mut(|sums| {
            for span in dy.spans().iter().skip(tiles * TILES).take(TILES) {
                sums.clear();
                sums.resize((end - first) * span.width * LANES, 0.0);
                let tile = Tile {
                    form,
                    weights: x.data[first * steps * LANES..].as_ptr().cast(),
                    panel_bytes: steps * LANES * 4,
                    panels: end - first,
                    length: steps,
                    inputs: dy.tile(span),
                    width: span.width,
                    out: sums.as_mut_ptr(),
                };
                // SAFETY: `x` holds the panels, `dy` the inputs of the span, and `sums` a sum for every lane.
                unsafe { kernels().tile(&tile) }
                for (panel, sums) in (first..end).zip(sums.chunks_exact(span.width * LANES)) {
                    let at = panel * LANES;
                    let len = LANES.min(cols - at);
                    for (t, sums) in sums.chunks_exact(LANES).enumerate() {
                        // SAFETY: `gradient` outlives the section; this task alone writes these columns of this row.
                        let out = unsafe { out.slice((span.first + t) * cols + at, len) };
                        out.iter_mut().zip(sums).for_each(|(o, s)| *o += s);
                    }
                }
            }
        });
    });
}

thread_local! {
    static SUMS: RefCell<Vec<f32>> = RefCell::default();
}
