//! The product of activations with a stored weight.

use crate::{
    Tensor, Weight,
    kernels::{PANEL, PanelProduct, kernels},
    threads::Shared,
};
use rayon::prelude::*;

/// Values of the depth that one kernel call sums: a panel block then stays in the first-level caches.
const DEPTH_BLOCK: usize = 512;

/// Up to so many tokens, rows are multiplied as they lie; beyond, packing them into panels pays.
const FEW: usize = 3;

/// Products of fewer multiplications are done before another worker has heard of them.
const SMALL: usize = 1 << 15;

/// `y = x W^T`: `[tokens, inputs]` and `[outputs, inputs]` give `[tokens, outputs]`.
///
/// Each output is one sum in rising input order with `f32` accumulation, whatever the batch.
///
/// # Panics
/// If the inner sizes differ, which is the caller's fault.
pub fn matmul(x: &Tensor, w: &Weight) -> Tensor {
    assert_eq!(x.cols(), w.cols(), "inner sizes of a product");
    let (tokens, depth, outputs) = (x.rows(), x.cols(), w.rows());
    let mut y = Tensor::zeros(tokens, outputs);
    if tokens == 0 || depth == 0 {
        return y;
    }
    let shared = Shared::new(y.as_mut_slice());
    let panel = |scratch: &mut Scratch, p: usize| {
        let first = p * PANEL;
        let width = PANEL.min(outputs - first);
        scratch.product(x, w, first, width);
        for t in 0..tokens {
            // SAFETY: `y` outlives the loop and panel `p` alone writes columns `first..first + width`.
            let out = unsafe { shared.slice(t * outputs + first, width) };
            out.copy_from_slice(&scratch.out[t * PANEL..t * PANEL + width]);
        }
    };
    let panels = outputs.div_ceil(PANEL);
    if tokens * depth * outputs < SMALL {
        let mut scratch = Scratch::default();
        (0..panels).for_each(|p| panel(&mut scratch, p));
    } else {
        (0..panels).into_par_iter().for_each_init(Scratch::default, panel);
    }
    y
}

/// What one worker reuses from panel to panel.
#[derive(Default)]
struct Scratch {
    rows: Vec<f32>,
    panel: Vec<f32>,
    out: Vec<f32>,
}

impl Scratch {
    /// The product of all tokens with outputs `first..first + width`, in `self.out` `[tokens, PANEL]`.
    fn product(&mut self, x: &Tensor, w: &Weight, first: usize, width: usize) {
        let (tokens, depth) = (x.rows(), x.cols());
        self.rows.resize(PANEL * depth, 0.0);
        for r in 0..width {
            w.decode_row(first + r, &mut self.rows[r * depth..(r + 1) * depth]);
        }
        self.rows[width * depth..].fill(0.0);
        self.out.clear();
        self.out.resize(tokens * PANEL, 0.0);
        if tokens <= FEW {
            for (t, out) in self.out.chunks_exact_mut(PANEL).enumerate() {
                (kernels().rows)(x.row(t), &self.rows, out);
            }
            return;
        }
        self.panel.resize(PANEL * depth, 0.0);
        pack(&self.rows, depth, &mut self.panel);
        for from in (0..depth).step_by(DEPTH_BLOCK) {
            let depth_here = DEPTH_BLOCK.min(depth - from);
            let product = PanelProduct {
                x: &x.as_slice()[from..],
                x_stride: depth,
                tokens,
                depth: depth_here,
                panel: &self.panel[from * PANEL..],
            };
            (kernels().panel)(&product, &mut self.out);
        }
    }
}

/// Transposes `[PANEL, depth]` into `[depth, PANEL]`, eight columns at a time so that reads stay in cache lines.
fn pack(rows: &[f32], depth: usize, panel: &mut [f32]) {
    const STEP: usize = 8;
    let whole = depth / STEP * STEP;
    for k0 in (0..whole).step_by(STEP) {
        for r in 0..PANEL {
            let from: &[f32] = &rows[r * depth + k0..r * depth + k0 + STEP];
            for (k, v) in from.iter().enumerate() {
                panel[(k0 + k) * PANEL + r] = *v;
            }
        }
    }
    for k in whole..depth {
        for r in 0..PANEL {
            panel[k * PANEL + r] = rows[r * depth + k];
        }
    }
}

/// The same product as plain loops: the twin that tests hold [`matmul`] to.
pub fn matmul_naive(x: &Tensor, w: &Weight) -> Tensor {
    let dense = w.to_tensor();
    let mut y = Tensor::zeros(x.rows(), w.rows());
    for t in 0..x.rows() {
        for o in 0..w.rows() {
            y.row_mut(t)[o] = x.row(t).iter().zip(dense.row(o)).map(|(a, b)| a * b).sum();
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Storage, grid::Grid};

    fn wave(rows: usize, cols: usize, step: f32) -> Tensor {
        Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| (i as f32 * step).sin()).collect())
    }

    #[test]
    fn agrees_with_plain_loops_in_every_storage() {
        let mut storages = vec![Storage::F32, Storage::F16, Storage::Bf16];
        storages.extend(Grid::GGUF.iter().map(|g| Storage::Grid(*g)));
        storages.push(Storage::Grid(Grid::Int { bits: 3, group: 32, asymmetric: false }));
        for storage in storages {
            for (tokens, outputs) in [(1, 1), (3, 70), (40, 33)] {
                let (x, w) = (wave(tokens, 768, 0.13), wave(outputs, 768, 0.71));
                let w = Weight::encode(&w, storage, None).unwrap();
                let (got, want) = (matmul(&x, &w), matmul_naive(&x, &w));
                for (a, b) in got.as_slice().iter().zip(want.as_slice()) {
                    assert!((a - b).abs() < 2e-4 * (1.0 + b.abs()), "{storage} {a} {b}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_batch() {
        let (x, w) = (wave(37, 600, 0.13), Weight::from_tensor(wave(50, 600, 0.7)));
        let all = matmul(&x, &w);
        for t in [0, 11, 36] {
            assert_eq!(matmul(&x.select_rows(&[t]), &w).as_slice(), all.row(t));
        }
    }
}
