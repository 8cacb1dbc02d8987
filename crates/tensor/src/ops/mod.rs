//! Operations on activations: the only place that knows where numbers live.
//!
//! Order of summation: of a product it depends on its depth, of attention on the position, never on the
//! batch, the tiling or the number of threads; so batched, cached and plain decoding give the same bits.

mod activation;
mod attention;
mod attention_gradient;
mod gradient;
mod loss;
mod memory;
mod norm;
mod product;
mod product_gradient;
mod rope;
mod stats;
mod update;

pub use activation::{Activation, add_to, gate_to, scale, soft_cap};
pub use attention::{AttentionShape, attention};
pub use attention_gradient::{Asked, Attended, attention_gradient};
pub use gradient::{
    Normed, activation_gradient, column_sums, gate_gradient, norm_gradient, rope_gradient, soft_cap_gradient,
};
pub use loss::{argmax, cross_entropy, divergence, log_prob, top};
pub use memory::{KeyValue, Memory};
pub use norm::{NormKind, norm, norm_heads, norm_rows};
pub use product::{Operand, Target, gated, matmul, matmul_naive, products};
pub use product_gradient::{Columns, weight_gradient};
pub use rope::{Rotation, rope};
pub use stats::{Gram, absolute_maxima};
pub use update::{AdamW, adamw, add_slices, squared_norm};

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
    // SAFETY: `x` outlives the section and each task has a row of its own.
    let run = |t: usize| f(t, unsafe { shared.slice(t * cols, cols) });
    if rows * cols <= SMALL { (0..rows).for_each(run) } else { threads::each(rows, &run) }
}
