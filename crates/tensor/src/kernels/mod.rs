//! Kernels: slices in, slices out, one table per instruction set, chosen once per process.
//!
//! `generic` says what each kernel means; every other table agrees with it (see the tests). Bodies that are
//! plain loops stand once in `once` and are compiled for each instruction set. Sums run in one order that
//! depends on the length alone, so AVX2 and AVX-512 give the same bits; `generic` has no fused multiply-add
//! and differs in the last one.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod generic;
mod once;

use crate::grid::{Block, Grid};
use std::sync::OnceLock;

/// Outputs that one panel of a packed weight holds side by side.
pub const PANEL: usize = 32;

/// The kernels of one instruction set.
pub struct Kernels {
    /// Its name, as `PLANISH_ISA` spells it.
    pub isa: &'static str,
    /// `out[t][o] += sum_k x[t][k] * panel[k][o]` for all tokens `t`, in rising `k`.
    pub panel: fn(&PanelProduct<'_>, &mut [f32]),
    /// `out[o] = sum_k x[k] * rows[o][k]` in rising `k`, for the [`PANEL`] rows of `rows` `[PANEL, depth]`: the same
    /// sums as `panel`, for so few tokens that packing does not pay.
    pub rows: fn(&[f32], &[f32], &mut [f32]),
    /// Decodes a row of a grid.
    pub decode_row: fn(Grid, &[u8], &mut [f32]),
    /// Fits the scales of a block of a grid.
    pub fit: fn(Grid, &[f32], Option<&[f32]>) -> Block,
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
    /// `x = x * sigmoid(x)`.
    pub silu: fn(&mut [f32]),
    /// `x = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
    pub gelu_tanh: fn(&mut [f32]),
    /// `x = cap * tanh(x / cap)`.
    pub soft_cap: fn(&mut [f32], f32),
}

/// The operands of [`Kernels::panel`]: a block of inputs against one packed panel of weights.
pub struct PanelProduct<'a> {
    /// Inputs: row `t` starts at `t * x_stride`.
    pub x: &'a [f32],
    /// Values from one row of `x` to the next.
    pub x_stride: usize,
    /// Rows.
    pub tokens: usize,
    /// Length of the sum.
    pub depth: usize,
    /// `[depth, PANEL]`.
    pub panel: &'a [f32],
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
    fn panels_agree_with_the_plain_sum_on_every_isa() {
        for (tokens, depth) in [(1, 1), (1, 64), (5, 33), (12, 512), (31, 100)] {
            let (x, panel) = (wave(tokens * depth, 0.11), wave(depth * PANEL, 0.7));
            let product = PanelProduct { x: &x, x_stride: depth, tokens, depth, panel: &panel };
            let mut want = wave(tokens * PANEL, 0.3);
            for t in 0..tokens {
                for o in 0..PANEL {
                    want[t * PANEL + o] += (0..depth).map(|k| x[t * depth + k] * panel[k * PANEL + o]).sum::<f32>();
                }
            }
            for k in available() {
                let mut got = wave(tokens * PANEL, 0.3);
                (k.panel)(&product, &mut got);
                close(k.isa, "panel", &got, &want);
            }
        }
    }

    #[test]
    fn a_panel_product_does_not_depend_on_the_number_of_tokens() {
        let (tokens, depth) = (29, 77);
        let (x, panel) = (wave(tokens * depth, 0.11), wave(depth * PANEL, 0.7));
        for k in available() {
            let mut all = vec![0.0; tokens * PANEL];
            (k.panel)(&PanelProduct { x: &x, x_stride: depth, tokens, depth, panel: &panel }, &mut all);
            for t in 0..tokens {
                let mut one = vec![0.0; PANEL];
                let x = &x[t * depth..];
                (k.panel)(&PanelProduct { x, x_stride: depth, tokens: 1, depth, panel: &panel }, &mut one);
                assert_eq!(one, &all[t * PANEL..(t + 1) * PANEL], "{} token {t}", k.isa);
            }
        }
    }

    #[test]
    fn unpacked_rows_give_the_same_bits_as_panels() {
        for depth in [1, 7, 64, 333] {
            let (x, rows) = (wave(depth, 0.11), wave(depth * PANEL, 0.7));
            let mut panel = vec![0.0; depth * PANEL];
            for (i, v) in rows.iter().enumerate() {
                panel[i % depth * PANEL + i / depth] = *v;
            }
            for k in available() {
                let (mut a, mut b) = (vec![0.0; PANEL], vec![0.0; PANEL]);
                (k.panel)(&PanelProduct { x: &x, x_stride: depth, tokens: 1, depth, panel: &panel }, &mut a);
                (k.rows)(&x, &rows, &mut b);
                assert_eq!(a, b, "{} {depth}", k.isa);
            }
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

    #[test]
    fn avx2_and_avx512_give_the_same_bits() {
        let tables: Vec<_> = available().filter(|k| k.isa != "generic").collect();
        let (x, panel) = (wave(7 * 200, 0.11), wave(200 * PANEL, 0.7));
        let run = |k: &Kernels| {
            let mut out = vec![0.0; 7 * PANEL];
            (k.panel)(&PanelProduct { x: &x, x_stride: 200, tokens: 7, depth: 200, panel: &panel }, &mut out);
            out.push((k.dot)(&x, &panel[..x.len()]));
            out
        };
        for pair in tables.windows(2) {
            assert_eq!(run(pair[0]), run(pair[1]), "{} {}", pair[0].isa, pair[1].isa);
        }
    }
}
