//! Kernels: slices in, slices out, one table per instruction set, chosen once per process.
//!
//! `generic` says what each kernel means; every other table agrees with it (see the tests). Bodies that are
//! plain loops stand once in `once` and are compiled for each instruction set. Sums run in one order that
//! depends on the length alone, so AVX2, AVX-512 and NEON give the same bits; `generic` has no fused multiply-add
//! and differs in the last one, and so does AMX in products of brain floats.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_lanes;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_lanes;
mod compile;
mod float_tile;
mod generic;
mod generic_lanes;
mod holes;
mod lanes;
mod learn;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_lanes;
mod once;
mod opened;
mod peak;
mod soften;
mod tile;

pub(crate) use lanes::Lanes;
pub use peak::Arithmetic;
pub use soften::Softening;
pub use tile::Tile;
pub(crate) use tile::input_chunk;

use crate::{
    Storage, Tensor,
    grid::{Block, Grid},
    ops::{AdamW, Asked},
    packed::{Form, InputKind, Span},
};
use std::{ops::Range, sync::OnceLock};

/// Products of packed floats.
pub struct FloatTiles {
    /// Runs a tile.
    ///
    /// # Safety
    /// The pointers hold what [`Tile`] says, and its width is one of `widths`.
    pub run: unsafe fn(&Tile),
    /// Tokens of the tiles that there are, rising from 1; see [`FloatTiles::widths_of`].
    pub widths: &'static [usize],
    /// The same of tiles of brain floats.
    pub brain_widths: &'static [usize],
    /// Steps of brain floats that lie side by side for each token of a tile; see [`FloatTiles::together_of`].
    pub together: usize,
    /// Multiplies in registers, so many turns of [`Arithmetic::operations`].
    pub spin: fn(Arithmetic, usize) -> f32,
    /// Replaces the scores of a chunk, `[64 / 16][width][16]`, by `exp(cap tanh(score / cap) - highest)` where they are
    /// seen and by 0 elsewhere, and brings each query's highest score and sum up to date. The last argument is
    /// scratch for as many numbers as there are queries.
    pub soften: Soften,
}

impl FloatTiles {
    /// Tokens of the tiles of a form, rising from 1.
    pub fn widths_of(&self, form: Form) -> &'static [usize] {
        if form == Form::Bf16 { self.brain_widths } else { self.widths }
    }

    /// Steps of a form that lie side by side for each token of a tile: its inputs are
    /// `[steps / together][tokens][together]`.
    pub fn together_of(&self, form: Form) -> usize {
        if form == Form::Bf16 { self.together } else { 1 }
    }
}

/// Input, weight, epsilon, gradient of the output, of the input, of the weight.
pub type NormGradient = fn(&[f32], &[f32], f32, &[f32], &mut [f32], &mut [f32]);

/// Scores, gradients of probabilities, the first position, a cap, and the queries.
pub type AttentionGradient = fn(&mut [f32], &mut [f32], usize, Option<f32>, &[Asked]);

/// A step, values, gradients, first and second moments.
pub type AdamWStep = fn(AdamW, &mut [f32], &[f32], &mut [f32], &mut [f32]);

/// Scores, width, cap, queries, scratch: see [`FloatTiles::soften`].
pub type Soften = fn(&mut [f32], usize, Option<f32>, &mut [Softening], &mut [f32]);

/// A block, values, their importance, codes.
pub type Round = fn(&Block, &[f32], Option<&[f32]>, &mut [u8]);

/// Products of packed codes.
pub struct CodeTiles {
    /// Runs a tile.
    ///
    /// # Safety
    /// The pointers hold what [`Tile`] says, and its width is one of `widths`.
    pub run: unsafe fn(&Tile),
    /// Tokens of the tiles that there are, rising from 1.
    pub widths: &'static [usize],
    /// Tokens from which on weights are asked for before they are read.
    pub busy: usize,
    /// Are products of 8-bit codes those of the codes less 128?
    pub signed: bool,
    /// Packs the stored rows of a panel: storage, columns, rows one after the other, panel.
    pub pack_panel: fn(Storage, usize, &[u8], &mut [u8]),
    /// Tokens from which on a panel without holes is opened before they pass over it.
    pub opens_from: usize,
    /// Opens a panel of a form and so many columns: it then lies as [`Form::opened`] says, and gives the same sums.
    ///
    /// # Safety
    /// The first pointer holds such a panel, the second room for the opened one.
    pub open: unsafe fn(Form, usize, *const u8, *mut u8),
    /// Rounds and packs the inputs of a tile of codes.
    pub pack_codes: fn(&Tensor, Span, InputKind, &mut [u32]),
    /// Turns rows of words into the tokens of a tile: rows, columns, tokens, `[columns][tokens]`.
    pub pack_words: fn(&[u32], usize, usize, &mut [u32]),
    /// Reads bytes.
    pub read: fn(&[u8]) -> f32,
}

impl CodeTiles {
    /// Are panels of a form opened before so many tokens pass over them?
    pub fn opens(&self, form: Form, tokens: usize) -> bool {
        /// Filling holes costs about what a tile of tokens does.
        const HOLES: usize = 16;
        match form {
            _ if form.pattern().is_some() => tokens >= HOLES,
            Form::Codes(_) => tokens >= self.opens_from,
            _ => false,
        }
    }
}

/// The kernels of one instruction set.
pub struct Kernels {
    /// Its name, as `PLANISH_ISA` spells it.
    pub isa: &'static str,
    /// Products of packed floats.
    pub floats: FloatTiles,
    /// Products of packed codes.
    pub codes: CodeTiles,
    /// Decodes a row of a grid.
    pub decode_row: fn(Grid, &[u8], &mut [f32]),
    /// Fits the scales of a block of a grid.
    pub fit: fn(Grid, &[f32], Option<&[f32]>) -> Block,
    /// Rounds values to a block, by their importance where a codebook has them together; see [`Block::round_all`].
    pub round: Round,
    /// Root-mean-square norm of a row: `x / sqrt(mean(x^2) + eps) * weight`.
    pub rms_norm: fn(&[f32], &[f32], f32, &mut [f32]),
    /// Layer norm of a row: `(x - mean) / sqrt(var + eps) * weight`.
    pub layer_norm: fn(&[f32], &[f32], f32, &mut [f32]),
    /// Dot product in sixteen lanes.
    pub dot: fn(&[f32], &[f32]) -> f32,
    /// `y += a * x`.
    pub axpy: fn(f32, &[f32], &mut [f32]),
    /// Replaces `x` by `exp(x - max)` and returns the sum of the results, in sixteen lanes.
    pub exp_sum: fn(&mut [f32], f32) -> f32,
    /// Rounds values to brain floats, two to a word; a missing second one is zero.
    pub brain_pairs: fn(&[f32], &mut [u32]),
    /// Adds a head's key to rows `[rows][head_dim]`, in row `i` turned by cosines and sines `[2][half]` of entry `i`; the
    /// channels from `2 * half` on do not turn.
    pub add_turned: fn(&mut [f32], &[f32], &[f32], usize),
    /// `x = x * sigmoid(x)`.
    pub silu: fn(&mut [f32]),
    /// `x = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
    pub gelu_tanh: fn(&mut [f32]),
    /// `x = cap * tanh(x / cap)`.
    pub soft_cap: fn(&mut [f32], f32),
    /// Rounds some rows of the columns from one on, so many, to floats of a form: `[rows][width]`, or brain floats
    /// `[rows / 2][width][2]`, with zeros where there are no more columns or no second row.
    pub columns: fn(&Tensor, Range<usize>, usize, usize, Form, &mut [u32]),
    /// Rounds rows of sixteen floats to brain floats, two rows to a line: `[rows / 2][16][2]`; a missing second one is zeros.
    pub brain_weave: fn(&[f32], &mut [u32]),
    /// Of `rms_norm` (input, weight, epsilon): adds to the gradients of the input and of the weight (the last two) what
    /// the gradient of the output (the fourth) gives.
    pub rms_norm_gradient: NormGradient,
    /// The same of `layer_norm`.
    pub layer_norm_gradient: NormGradient,
    /// Replaces scores by probabilities and the gradients of these by those of the scores; see [`learn::attention_gradient`].
    pub attention_gradient: AttentionGradient,
    /// Replaces `x` by the slope of `silu` there; its values go to the second argument.
    pub silu_slope: fn(&mut [f32], &mut [f32]),
    /// The same of `gelu_tanh`.
    pub gelu_tanh_slope: fn(&mut [f32], &mut [f32]),
    /// A step of AdamW: values, gradients, first and second moments.
    pub adamw: AdamWStep,
}

impl Kernels {
    /// Runs a tile of any form.
    ///
    /// # Safety
    /// The pointers hold what [`Tile`] says, and its width is one that its form has.
    pub unsafe fn tile(&self, tile: &Tile) {
        // SAFETY: the caller's.
        unsafe { if matches!(tile.form, Form::Codes(_)) { (self.codes.run)(tile) } else { (self.floats.run)(tile) } }
    }
}

/// The fastest table that this machine runs, or the one that `PLANISH_ISA` names.
pub fn kernels() -> &'static Kernels {
    static CHOSEN: OnceLock<&'static Kernels> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let asked = std::env::var("PLANISH_ISA").unwrap_or_default();
        let best = available().last().unwrap_or(&generic::KERNELS);
        available().find(|k| k.isa == asked).unwrap_or(best)
    })
}

/// Every table that this machine runs, slowest first.
pub fn available() -> impl DoubleEndedIterator<Item = &'static Kernels> {
    let mut all = vec![&generic::KERNELS];
    #[cfg(target_arch = "x86_64")]
    {
        all.extend(avx2::kernels());
        all.extend(avx512::kernels());
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    all.extend(amx::kernels());
    #[cfg(target_arch = "aarch64")]
    all.extend(neon::kernels());
    all.into_iter()
}

/// Checks that `PLANISH_ISA`, where set, names a table that this machine runs.
///
/// # Errors
/// A sentence that lists the names that would do.
pub fn check_isa() -> Result<(), String> {
    let Ok(asked) = std::env::var("PLANISH_ISA") else { return Ok(()) };
    let names: Vec<_> = available().map(|k| k.isa).collect();
    if asked.is_empty() || names.contains(&asked.as_str()) {
        return Ok(());
    }
    Err(format!("PLANISH_ISA={asked}: this machine runs {}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize, step: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * step).sin()).collect()
    }

    fn close(isa: &str, what: &str, got: &[f32], want: &[f32]) {
        for (i, (a, b)) in got.iter().zip(want).enumerate() {
            assert!((a - b).abs() <= 2e-5 * (1.0 + b.abs()), "{isa} {what}[{i}]: {a} {b}");
        }
    }

    #[test]
    fn row_kernels_agree_with_generic() {
        for n in [1, 15, 16, 17, 64, 100, 257] {
            let (x, w) = (wave(n, 0.37), wave(n, 0.91));
            let g = &generic::KERNELS;
            for k in available() {
                let rows = |k: &Kernels| {
                    let mut out = vec![vec![0.0; n]; 2];
                    (k.rms_norm)(&x, &w, 1e-5, &mut out[0]);
                    (k.layer_norm)(&x, &w, 1e-5, &mut out[1]);
                    for f in [k.silu, k.gelu_tanh] {
                        let mut y: Vec<f32> = x.iter().map(|v| v * 5.0).collect();
                        f(&mut y);
                        out.push(y);
                    }
                    let mut y = x.clone();
                    let sum = (k.exp_sum)(&mut y, 1.0);
                    y.push(sum);
                    out.push(y);
                    let mut y: Vec<f32> = (0..4 * 64).map(|i| 3.0 * x[i % n]).collect();
                    let query = |from, to, highest| Softening { from, to, highest, sum: 1.0, shrink: 0.0 };
                    let mut queries = [query(3, 60, 1.0), query(0, 64, f32::NEG_INFINITY), query(7, 7, 2.0)];
                    (k.floats.soften)(&mut y, 4, Some(2.0), &mut queries, &mut [0.0; 3]);
                    y.truncate(3 * 16);
                    y.extend(queries.iter().flat_map(|q| [q.highest, q.sum, q.shrink]));
                    out.push(y);
                    let mut y = x.clone();
                    (k.axpy)(0.3, &w, &mut y);
                    y.push((k.dot)(&x, &w));
                    out.push(y);
                    let mut y: Vec<f32> = x.iter().map(|v| v * 90.0).collect();
                    (k.soft_cap)(&mut y, 30.0);
                    out.push(y);
                    out.concat()
                };
                close(k.isa, "rows", &rows(k), &rows(g));
            }
        }
    }
}
