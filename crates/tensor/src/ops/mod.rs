//! Operations on activations: the only place that knows where numbers live.
//!
//! Order of summation: of a product it depends on its depth, of attention on the position, never on the
//! batch, the tiling or the number of threads; so batched, cached and plain decoding give the same bits.

mod activation;
mod attention;
mod loss;
mod memory;
mod norm;
mod product;
mod rope;
mod stats;

pub use activation::{Activation, add_bias, add_to, gate, scale, soft_cap};
pub use attention::{AttentionShape, Segment, attention};
pub use memory::{KeyValue, Memory};
pub use loss::{argmax, divergence, log_prob, top};
pub use norm::{NormKind, norm, norm_heads};
pub use product::{Operand, Target, gated, matmul, matmul_naive, products};
pub use rope::{Rotation, rope};
pub use stats::{Gram, absolute_maxima, sum};
