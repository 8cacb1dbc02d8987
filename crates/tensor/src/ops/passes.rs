//! The order in which tiles of inputs pass over panels, so that each level of the caches holds what is read again.
//!
//! No sum depends on it: the steps of a product are added in rising order whatever is done between them.

use crate::packed::{Form, Span};
use std::ops::Range;

/// Panels that a kernel of floats runs side by side.
const PAIR: usize = 2;
/// Tokens from which weights are passed over so often that they should stay in the caches.
pub(super) const MANY: usize = 16;
/// Bytes of such panels that stay in the second-level cache while tiles pass over them: kernels ask for them in time.
const NEAR: usize = 256 << 10;
/// Bytes of inputs that stay in the second-level cache while panels pass over them.
const FAR: usize = 384 << 10;

/// Steps between which no cut is made: those that lie together for any kernel.
const TOGETHER: usize = 16;

/// Called with panels, a tile of inputs, and steps.
type Run<'a> = &'a mut dyn FnMut(Range<usize>, &Span, Range<usize>);

/// Runs `tile(panels, span, steps)` until every tile of inputs has passed over all steps of every panel.
pub(super) fn passes(form: Form, length: usize, panels: usize, spans: &[Span], tile: Run<'_>) {
    if panels == 0 {
        return;
    }
    let tokens = spans.last().map_or(0, |s| s.first + s.width) - spans.first().map_or(0, |s| s.first);
    if !form.is_cut_into_steps() || tokens < MANY {
        // Codes are cheap to read, and what few tokens read comes from memory, in one run.
        return spans.iter().for_each(|span| tile(0..panels, span, 0..length));
    }
    let steps = length.div_ceil((length * form.step_bytes() * PAIR).div_ceil(NEAR).max(1)).next_multiple_of(TOGETHER);
    let tokens = FAR / (4 * steps);
    let mut rest = spans;
    while !rest.is_empty() {
        let first = rest[0].first;
        let (block, later) = rest.split_at(rest.partition_point(|s| s.first < first + tokens.max(1)));
        for from in (0..length.max(1)).step_by(steps) {
            for panel in (0..panels).step_by(PAIR) {
                for span in block {
                    tile(panel..panels.min(panel + PAIR), span, from..length.min(from + steps));
                }
            }
        }
        rest = later;
    }
}
