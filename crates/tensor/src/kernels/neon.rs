//! NEON kernels.

use super::{
    Kernels,
    compile::{code_tiles, float_tiles},
    neon_lanes::Neon,
    once::instantiate,
};
use std::arch::is_aarch64_feature_detected;

/// The tables, slowest first, that this machine has the instructions for.
pub fn kernels() -> impl Iterator<Item = &'static Kernels> {
    let plain = is_aarch64_feature_detected!("neon").then_some(&KERNELS);
    let dot = is_aarch64_feature_detected!("dotprod").then_some(&WITH_DOT);
    plain.into_iter().chain(dot)
}

const TABLE: Kernels = Kernels {
    isa: "neon",
    floats: FLOATS,
    codes: CODES,
    decode_row,
    fit,
    round,
    rms_norm,
    layer_norm,
    dot,
    axpy,
    exp_sum,
    brain_pairs,
    add_turned,
    silu,
    gelu_tanh,
    soft_cap,
    columns,
    brain_weave,
    rms_norm_gradient,
    layer_norm_gradient,
    attention_gradient,
    silu_slope,
    gelu_tanh_slope,
    adamw,
};

static KERNELS: Kernels = TABLE;
/// The same with products of bytes in fours.
static WITH_DOT: Kernels = Kernels { isa: "neon-dotprod", floats: with_dot::FLOATS, codes: with_dot::CODES, ..TABLE };

instantiate!("neon");
float_tiles!(Neon<false>, "neon", [1 x 2 2 x 2 4 x 1]);
code_tiles!(Neon<false>, "neon", [1 x 1 2 x 1 4 x 1]);

mod with_dot {
    use super::{Neon, code_tiles, float_tiles};
    float_tiles!(Neon<true>, "neon,dotprod", [1 x 2 2 x 2 4 x 1]);
    code_tiles!(Neon<true>, "neon,dotprod", [1 x 1 2 x 1 4 x 1]);
}
