//! The gradient of a product's weight: `dW = dYᵀ X`, with the tile kernels of the product itself.
//!
//! The tokens are what is summed over, in rising order, so `X` and `dY` are packed column by column. The gradient of
//! the input, `dX = dY W`, is a product with the transposed weight ([`crate::packed::Packed::of`]).

use super::passes::passes;
use crate::{
    Tensor,
    kernels::{Tile, kernels},
    lines::Lines,
    packed::{Form, InputKind, Inputs, few_rows, form::LANES},
    threads::{self, Shared},
};

/// A matrix `[tokens, cols]` whose columns are the lanes of panels.
#[derive(Clone, Debug, Default)]
pub struct Columns {
    form: Option<Form>,
    tokens: usize,
    cols: usize,
    data: Lines<u32>,
}

/// Tokens that a task packs.
const RUN: usize = 64;

impl Columns {
    /// Packs `x` as floats of `form` ([`Form::F32`] or [`Form::Bf16`]), in memory that is used again.
    pub fn pack(&mut self, x: &Tensor, form: Form) {
        let (steps, panels) = (form.length(x.rows()), x.cols().div_ceil(LANES));
        (self.form, self.tokens, self.cols) = (Some(form), x.rows(), x.cols());
        self.data.resize(panels * steps * LANES);
        let shared = Shared::new(&mut self.data);
        threads::each(x.rows().div_ceil(RUN), &|run| {
            let rows = run * RUN..x.rows().min((run + 1) * RUN);
            for rows in few_rows(rows) {
                let first = form.length(rows.start);
                let count = form.length(rows.end) - first;
                for panel in 0..panels {
                    // SAFETY: `data` outlives the section; this task alone writes these steps.
                    let out = unsafe { shared.slice((panel * steps + first) * LANES, count * LANES) };
                    (kernels().columns)(x, rows.clone(), panel * LANES, LANES, form, out);
                }
            }
        });
    }

    /// Their panels from a step on, and the words of one.
    pub(super) fn panels(&self, step: usize) -> (&[u32], usize) {
        (&self.data[step * LANES..], self.steps() * LANES)
    }

    fn steps(&self) -> usize {
        self.form.map_or(0, |form| form.length(self.tokens))
    }
}

/// Panels and tiles of inputs of a task: enough that what is read for it is small beside what is done with it.
const PANELS: usize = 6;
const TILES: usize = 12;

/// The same where there are more workers than such tasks: small matrices are cut smaller. No sum depends on it.
fn task(panels: usize, tiles: usize) -> [usize; 2] {
    let [mut a, mut b] = [PANELS, TILES];
    while (a > 2 || b > 2) && panels.div_ceil(a) * tiles.div_ceil(b) < threads::TASKS * threads::count() {
        // Kernels run panels in pairs.
        if b >= a { b = (b / 2).max(2) } else { a = (a / 4 * 2).max(2) }
    }
    // Tasks of one size end together.
    [a, tiles.div_ceil(tiles.div_ceil(b).max(1)).max(1)]
}

/// Adds `dyᵀ x` to `gradient` `[outputs, inputs]`; `dy` was packed by [`Inputs::pack_columns`].
///
/// # Panics
/// If the shapes differ, which is the caller's fault.
pub fn weight_gradient(x: &Columns, dy: &Inputs, gradient: &mut Tensor) {
    let Some(form) = x.form else { return };
    assert_eq!((gradient.cols(), dy.cols()), (x.cols, x.tokens), "inputs and tokens of a weight's gradient");
    assert_eq!(gradient.rows(), dy.spans().last().map_or(0, |s| s.first + s.width), "outputs of a weight's gradient");
    assert!(dy.kind() == Some(InputKind::of(form, kernels())), "kinds of a weight's gradient");
    let (cols, length) = (x.cols, x.steps());
    let panels = cols.div_ceil(LANES);
    let [wide, high] = task(panels, dy.spans().len());
    let groups = panels.div_ceil(wide);
    let out = Shared::new(gradient.as_mut_slice());
    threads::each(groups * dy.spans().len().div_ceil(high), &|i| {
        let (group, tiles) = (i % groups, i / groups);
        let (first, end) = (group * wide, panels.min((group + 1) * wide));
        let spans = &dy.spans()[tiles * high..dy.spans().len().min((tiles + 1) * high)];
        let weights = x.data[first * length * LANES..].as_ptr().cast();
        let mut tile = Tile::new(form, weights, length * form.step_bytes(), length);
        (tile.steps, tile.add) = ([LANES, cols], true);
        let whole = end.min(cols / LANES);
        passes(form, length, whole - first.min(whole), spans, &mut |panels, span, steps| {
            // SAFETY: `gradient` outlives the section; this task alone writes these columns of these rows.
            let out = unsafe { out.at(span.first * cols + (first + panels.start) * LANES) };
            // SAFETY: `x` holds the panels, `dy` the inputs of the span, and `gradient` a value for every lane.
            unsafe { tile.part(panels, steps, dy.tile(span), span.width, out) }
        });
        // The last panel may have lanes without a column.
        for panel in whole.max(first)..end {
            let at = panel * LANES;
            for span in spans {
                let mut sums = [0f32; 2 * LANES * LANES];
                assert!(span.width <= 2 * LANES, "tokens of a tile");
                let own = Tile { steps: Tile::block(span.width), ..tile };
                // SAFETY: as above; `sums` has a value for every token and lane.
                unsafe {
                    own.part(panel - first..panel - first + 1, 0..length, dy.tile(span), span.width, sums.as_mut_ptr())
                }
                for (t, sums) in sums.chunks_exact(LANES).take(span.width).enumerate() {
                    // SAFETY: `gradient` outlives the section; this task alone writes these columns of this row.
                    let out = unsafe { out.slice((span.first + t) * cols + at, cols - at) };
                    out.iter_mut().zip(sums).for_each(|(o, s)| *o += s);
                }
            }
        }
    });
}
