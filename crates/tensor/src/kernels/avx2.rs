//! AVX2 kernels.

use super::{
    Kernels,
    avx2_lanes::Avx2,
    compile::{code_tiles, float_tiles},
    once::instantiate,
};

/// The table, where this machine has the instructions.
pub fn kernels() -> Option<&'static Kernels> {
    let runs = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    runs.then_some(&KERNELS)
}

static KERNELS: Kernels = Kernels {
    isa: "avx2",
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

instantiate!("avx2,bmi2,popcnt,fma,f16c");
float_tiles!(Avx2, "avx2,bmi2,popcnt,fma,f16c", [1 x 2 2 x 2 6 x 1]);
code_tiles!(Avx2, "avx2,bmi2,popcnt,fma,f16c", [1 x 1 2 x 1 4 x 1]);
