//! Portable kernels, and the meaning of each.

use super::{
    Kernels,
    compile::{code_tiles, float_tiles},
    generic_lanes::Generic,
    once,
};

/// The table that every machine runs.
pub static KERNELS: Kernels = Kernels {
    isa: "generic",
    floats: FLOATS,
    codes: CODES,
    decode_row: once::decode_row,
    fit: once::fit,
    round: once::round,
    rms_norm: once::rms_norm,
    layer_norm: once::layer_norm,
    dot: once::dot,
    axpy: once::axpy,
    exp_sum: once::exp_sum,
    brain_pairs: once::brain_pairs,
    add_turned: once::add_turned,
    silu: once::silu,
    gelu_tanh: once::gelu_tanh,
    soft_cap: once::soft_cap,
    columns: once::columns,
    brain_weave: once::brain_weave,
    rms_norm_gradient: once::rms_norm_gradient,
    layer_norm_gradient: once::layer_norm_gradient,
    attention_gradient: once::attention_gradient,
    silu_slope: once::silu_slope,
    gelu_tanh_slope: once::gelu_tanh_slope,
    adamw: once::adamw,
};

float_tiles!(Generic, [1 x 1 4 x 1]);
code_tiles!(Generic, [1 x 1 4 x 1]);
