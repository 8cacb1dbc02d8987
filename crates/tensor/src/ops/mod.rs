//! Operations on activations: the only place that knows where numbers live.
//!
//! Order of summation: of a product it depends on its depth, of attention on the position, never on the
//! batch, the tiling or the number of threads; so batched, cached and plain decoding give the same bits.

mod activation;
mod adafactor;
mod attention;
mod attention_gradient;
mod distil;
mod eight_bit;
mod gradient;
mod loss;
mod mean_key;
mod memory;
mod norm;
mod passes;
mod product;
mod product_gradient;
mod relation;
mod rope;
mod source;
mod stats;
mod update;

pub use activation::{Activation, add_to, gate_to, scale, soft_cap};
pub use adafactor::{Adafactor, adafactor, adafactor_vector};
pub use attention::{AttentionShape, attention};
pub use attention_gradient::{Asked, Attended, attention_gradient};
pub use distil::{Distilling, Likeness, Listed, distil, distil_listed};
pub use eight_bit::{EightBit, adamw_eight_bit, lion_eight_bit};
pub use gradient::{
    Normed, activation_gradient, column_sums, gate_gradient, norm_gradient, rope_gradient, soft_cap_gradient,
};
pub use loss::{argmax, cross_entropy, divergence, log_prob, softmax, top};
pub use memory::{KeyValue, Memory};
pub use norm::{NormKind, norm, norm_heads, norm_rows};
pub use product::{Operand, Target, add_product, gated, matmul, matmul_naive, products};
pub use product_gradient::{Columns, weight_gradient};
pub use relation::{Relating, relation_gradient};
pub use rope::{Rotation, rope};
pub use stats::{Cross, Gram, Squares, absolute_maxima};
pub use update::{AdamW, Lion, adamw, add_slices, clear, copy_slices, lion, round_to_halves, squared_norm};

use crate::{
    Tensor,
    threads::{self, Shared},
};

/// Values that are worked on before another worker has heard of them.
const SMALL: usize = 1 << 13;

/// Runs `f(row number, row)` for every row, on all workers where there is enough to do.
fn each_row(x: &mut Tensor, f: impl Fn(usize, &mut [f32]) + Sync) {
    let (rows, cols) = (x.rows(), x.cols());
    let shared = Shared::new(x.as_mut_slice());
    // SAFETY: `x` outlives the section and each task has rows of its own.
    each_index(rows, cols, |t| f(t, unsafe { shared.slice(t * cols, cols) }));
}

/// Runs `f` for the numbers of `rows` rows of `cols` values, a run of rows to a task, on all workers where there is enough to do.
fn each_index(rows: usize, cols: usize, f: impl Fn(usize) + Sync) {
    if rows * cols <= SMALL {
        return (0..rows).for_each(f);
    }
    // Tasks of some microseconds: shorter ones would cost as much to hand out.
    let run = (SMALL / cols.max(1)).clamp(1, rows.div_ceil(4 * threads::count()).max(1));
    threads::each(rows.div_ceil(run), &|i| (i * run..rows.min((i + 1) * run)).for_each(&f));
}
