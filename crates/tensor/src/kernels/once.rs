//! Kernels written once as plain loops and compiled for every instruction set.
//!
//! No loop asks for a fused multiply-add, so all instruction sets give the same bits.

use crate::grid::{Block, Grid};

const LANES: usize = 16;

/// Folds sixteen lanes by halves: the one order in which lanes are summed.
#[inline(always)]
pub fn fold(lanes: [f32; LANES]) -> f32 {
    let mut v = lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            v[i] += v[i + half];
        }
        half /= 2;
    }
    v[0]
}

/// `exp(x)` within two units in the last place for `x <= 0` and the whole range that `f32` holds
/// (Cephes' polynomial on the remainder of a division by ln 2).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.336_54, 88.722_83);
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer without a call.
    const MAGIC: f32 = 12_582_912.0;
    let shifted = x * LOG2E + MAGIC;
    let n = shifted - MAGIC;
    let r = (x - n * LN2_HI) - n * LN2_LO;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 0.166_666_66;
    p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    // Two factors keep the exponent in range at both ends.
    // The whole number is read from the bits: a conversion that saturates would be done one by one.
    let n = shifted.to_bits().wrapping_sub(MAGIC.to_bits()) as i32;
    let half = n >> 1;
    let two = |e: i32| f32::from_bits(((e + 127) as u32) << 23);
    y * two(half) * two(n - half)
}

/// `tanh(x)` through [`exp`].
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let e = exp(-2.0 * x.abs());
    let t = (1.0 - e) / (1.0 + e);
    // Below 0.03 the quotient loses digits; the series does not.
    let small = x.abs() * (1.0 - x * x / 3.0);
    let t = if x.abs() < 0.03 { small } else { t };
    t.copysign(x)
}

#[inline(always)]
pub fn silu(x: &mut [f32]) {
    for v in x {
        *v /= 1.0 + exp(-*v);
    }
}

#[inline(always)]
pub fn gelu_tanh(x: &mut [f32]) {
    const C: f32 = 0.797_884_6;
    for v in x {
        *v = 0.5 * *v * (1.0 + tanh(C * (*v + 0.044_715 * *v * *v * *v)));
    }
}

#[inline(always)]
pub fn soft_cap(x: &mut [f32], cap: f32) {
    for v in x {
        *v = cap * tanh(*v / cap);
    }
}

#[inline(always)]
pub(super) fn lanes(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut sum = [0f32; LANES];
    let whole = x.chunks_exact(LANES);
    let rest = whole.remainder();
    for c in whole {
        for i in 0..LANES {
            sum[i] += f(c[i]);
        }
    }
    for (s, v) in sum.iter_mut().zip(rest) {
        *s += f(*v);
    }
    fold(sum)
}

#[inline(always)]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (lanes(x, |v| v * v) / x.len() as f32 + eps).sqrt();
    for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
        *o = v * scale * w;
    }
}

#[inline(always)]
pub fn layer_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = lanes(x, |v| v) / x.len() as f32;
    let variance = lanes(x, |v| (v - mean) * (v - mean)) / x.len() as f32;
    let scale = 1.0 / (variance + eps).sqrt();
    for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
        *o = (v - mean) * scale * w;
    }
}

#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = [0f32; LANES];
    let n = a.len().min(b.len());
    let whole = n / LANES * LANES;
    for (x, y) in a[..whole].chunks_exact(LANES).zip(b[..whole].chunks_exact(LANES)) {
        for i in 0..LANES {
            sum[i] += x[i] * y[i];
        }
    }
    for i in whole..n {
        sum[i - whole] += a[i] * b[i];
    }
    fold(sum)
}

#[inline(always)]
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

#[inline(always)]
pub fn exp_sum(x: &mut [f32], max: f32) -> f32 {
    let mut sum = [0f32; LANES];
    let mut whole = x.chunks_exact_mut(LANES);
    for c in &mut whole {
        for i in 0..LANES {
            c[i] = exp(c[i] - max);
            sum[i] += c[i];
        }
    }
    for (s, v) in sum.iter_mut().zip(whole.into_remainder()) {
        *v = exp(*v - max);
        *s += *v;
    }
    fold(sum)
}

#[inline(always)]
pub fn decode_row(grid: Grid, bytes: &[u8], out: &mut [f32]) {
    grid.decode_blocks(bytes, out);
}

#[inline(always)]
pub fn fit(grid: Grid, x: &[f32], importance: Option<&[f32]>) -> Block {
    grid.search(x, importance)
}

/// See [`super::Kernels::round`].
#[inline(always)]
pub fn round(block: &Block, x: &[f32], importance: Option<&[f32]>, codes: &mut [u8]) {
    block.round_here(x, importance, codes);
}

/// See [`super::Kernels::brain_pairs`].
#[inline(always)]
pub fn brain_pairs(x: &[f32], out: &mut [u32]) {
    let brain = |v: f32| u32::from(crate::packed::brain(v));
    let (pairs, rest) = x.as_chunks::<2>();
    for (o, [a, b]) in out.iter_mut().zip(pairs) {
        *o = brain(*a) | brain(*b) << 16;
    }
    if let (Some(v), Some(o)) = (rest.first(), out.get_mut(pairs.len())) {
        *o = brain(*v);
    }
}

/// See [`super::Kernels::add_turned`].
#[inline(always)]
pub fn add_turned(x: &mut [f32], key: &[f32], turns: &[f32], half: usize) {
    let (pairs, still) = key.split_at(2 * half);
    let (low, high) = pairs.split_at(half);
    for (p, row) in x.chunks_exact_mut(key.len()).enumerate() {
        let (cos, sin) = turns[2 * half * p..][..2 * half].split_at(half);
        let (turned, rest) = row.split_at_mut(2 * half);
        let (a, b) = turned.split_at_mut(half);
        for i in 0..half {
            a[i] += cos[i] * low[i] - sin[i] * high[i];
            b[i] += cos[i] * high[i] + sin[i] * low[i];
        }
        rest.iter_mut().zip(still).for_each(|(x, m)| *x += m);
    }
}

pub(crate) use super::learn::{
    adamw, attention_gradient, brain_weave, columns, gelu_tanh_slope, layer_norm_gradient, rms_norm_gradient,
    silu_slope,
};

/// Instantiates every kernel of this file, and of [`super::learn`], inside functions compiled for the instruction sets `$features`.
///
/// The wrappers' `unsafe` is the call of a function whose instruction set was found on this machine: the
/// table is only handed out after that check.
macro_rules! instantiate {
    ($features:literal) => {
        instantiate!(@fns $features,
            rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]);
            layer_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]);
            axpy(a: f32, x: &[f32], y: &mut [f32]);
            silu(x: &mut [f32]);
            gelu_tanh(x: &mut [f32]);
            soft_cap(x: &mut [f32], cap: f32);
            dot(a: &[f32], b: &[f32]) -> f32;
            exp_sum(x: &mut [f32], max: f32) -> f32;
            brain_pairs(x: &[f32], out: &mut [u32]);
            add_turned(x: &mut [f32], key: &[f32], turns: &[f32], half: usize);
            columns(
                x: &crate::Tensor,
                rows: std::ops::Range<usize>,
                at: usize,
                width: usize,
                form: crate::packed::Form,
                out: &mut [u32]
            );
            brain_weave(x: &[f32], out: &mut [u32]);
            rms_norm_gradient(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], dw: &mut [f32]);
            layer_norm_gradient(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], dw: &mut [f32]);
            attention_gradient(
                scores: &mut [f32],
                changes: &mut [f32],
                first: usize,
                cap: Option<f32>,
                asked: &[crate::ops::Asked]
            );
            silu_slope(x: &mut [f32], out: &mut [f32]);
            gelu_tanh_slope(x: &mut [f32], out: &mut [f32]);
            adamw(step: crate::ops::AdamW, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]);
            decode_row(grid: crate::grid::Grid, bytes: &[u8], out: &mut [f32]);
            fit(grid: crate::grid::Grid, x: &[f32], w: Option<&[f32]>) -> crate::grid::Block;
            round(block: &crate::grid::Block, x: &[f32], w: Option<&[f32]>, codes: &mut [u8]);
        );
    };
    (@fns $features:literal, $($name:ident($($arg:ident: $type:ty),*) $(-> $ret:ty)?;)*) => {
        $(#[allow(dead_code, reason = "a table may hold a kernel of its own in its place")]
        fn $name($($arg: $type),*) $(-> $ret)? {
            #[target_feature(enable = $features)]
            fn inner($($arg: $type),*) $(-> $ret)? {
                crate::kernels::once::$name($($arg),*)
            }
            // SAFETY: this table exists only where the processor has these instructions (`kernels`).
            unsafe { inner($($arg),*) }
        })*
    };
}
pub(crate) use instantiate;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_tanh_are_within_a_few_units_in_the_last_place() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) / want - 1.0).abs() < 3e-7, "exp {x}");
            let (got, want) = (f64::from(tanh(x * 0.1)), f64::from(x * 0.1).tanh());
            assert!((got - want).abs() <= 5e-7 * want.abs().max(1e-30), "tanh {} {got} {want}", x * 0.1);
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e9) < 1e-37);
    }
}
