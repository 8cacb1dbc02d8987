//! GPTQ (arXiv 2210.17323): rounds column by column and lets the columns that follow make up for the error.
//!
//! With `H` the mean of `x x^T` and `H^-1 = U^T U`, rounding column `j` by `e` costs `e^2 / U_jj^2` and is best
//! answered by moving column `k` by `-e U_jk / U_jj`. A block's scales are fitted when rounding reaches it, on
//! the moved values, each column weighed by what its rounding costs; so the method works on every grid.

use super::{Method, Plan, Rewrite, options, prune::masks};
use crate::{Error, Needs, Result, Stats};
use faer::{Mat, Par, Side, linalg::solvers::Solve};
use model::Site;
use rayon::prelude::*;
use serde::Deserialize;
use tensor::{
    Bytes, Pattern, Storage, Tensor, Weight,
    grid::{Block, Cost, Grid, SPAN},
    ops,
};

/// The method.
pub static GPTQ: Method = Method {
    name: "gptq",
    about: "Rounds column by column; later columns make up for the error on the calibration data.",
    paper: "arXiv 2210.17323",
    cost: "one pass over the calibration data and inputs^3 operations per matrix",
    build: |o| Ok(Plan::EachMatrix(Box::new(Gptq::read("gptq", o)?))),
};

/// Rows that one task rounds together, so that they share each row of `U` from the cache.
const ROWS: usize = 8;
/// Columns of which those that go are chosen together, as far as the pattern divides them.
const CHOSEN: usize = 128;
/// Columns whose errors are carried to the rest in one go.
const LAZY: usize = 64;

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Gptq {
    /// Part of the mean diagonal that is added to it.
    damping: f64,
    /// Round the columns with the largest inputs first; scales are then fitted beforehand.
    activation_order: bool,
    /// How far to make up for what the changed inputs of a matrix differ from the original's: 0 is not at all, 1 wholly.
    #[serde(skip)]
    pub(super) asymmetry: f64,
}

impl Default for Gptq {
    fn default() -> Self {
        Gptq { damping: 0.01, activation_order: false, asymmetry: 0.0 }
    }
}

impl Rewrite for Gptq {
    fn needs(&self) -> Needs {
        Needs { gram: true, shift: self.asymmetry > 0.0, ..Needs::default() }
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight> {
        let cols = weight.cols();
        let (Storage::Grid(grid), true) = (storage.dense(), storage.fits(cols)) else {
            return Weight::encode(weight, storage, None).map_err(super::at(site));
        };
        let gram = stats.gram.as_ref().filter(|g| g.cols() == cols && g.rows() > 0);
        let gram = gram.ok_or_else(|| Error::Site { site, reason: "no calibration data reached it".into() })?;
        let moved = match stats.shift.as_ref().filter(|_| self.asymmetry > 0.0) {
            Some(shift) => Some(self.towards_the_original(site, weight, gram.mean(), &shift.mean())?),
            None => None,
        };
        let weight = moved.as_ref().unwrap_or(weight);
        let gram = gram.mean();
        let holes = match storage {
            Storage::Sparse(sparse) => Some((sparse, masks(sparse.pattern(), weight, |j| gram[j * cols + j]))),
            _ => None,
        };
        let hessian = Hessian::new(site, gram, cols, grid.span(), self)?;
        let width = storage.row_bytes(cols);
        let mut bytes = vec![0u8; weight.rows() * width];
        bytes.par_chunks_mut(ROWS * width).enumerate().for_each(|(chunk, out)| {
            let first = chunk * ROWS;
            let rows: Vec<&[f32]> = (first..first + out.len() / width).map(|r| weight.row(r)).collect();
            let Some((sparse, masks)) = &holes else { return hessian.round(grid, &rows, &[], out) };
            let (size, keep) = (grid.row_bytes(cols), &masks[first..first + rows.len()]);
            let mut dense = vec![0u8; rows.len() * size];
            hessian.round(grid, &rows, keep, &mut dense);
            let rows = dense.chunks_exact(size).zip(keep).zip(out.chunks_exact_mut(width));
            rows.for_each(|((dense, keep), out)| sparse.compact(dense, keep, out));
        });
        Weight::new(storage, weight.rows(), cols, Bytes::from_vec(bytes)).map_err(super::at(site))
    }
}

impl Gptq {
    /// Reads options, of `gptq` or of a method that rounds like it.
    pub(super) fn read(method: &str, table: toml::Table) -> Result<Gptq> {
        let gptq = options::<Gptq>(method, table)?;
        if !(gptq.damping > 0.0 && gptq.damping <= 1.0) {
            let reason = "`damping` must be above 0 and at most 1".into();
            return Err(Error::Options { method: method.into(), reason });
        }
        Ok(gptq)
    }

    /// The matrix without the values that a pattern leaves out, and what remains of each row: column by column those go that cost
    /// least, and the columns that follow make up for them (SparseGPT, arXiv 2301.00774).
    pub(super) fn thin(
        &self,
        site: Site,
        weight: &Tensor,
        pattern: Pattern,
        gram: Vec<f64>,
    ) -> Result<(Tensor, Vec<Vec<bool>>)> {
        let (rows, cols) = (weight.rows(), weight.cols());
        let hessian = Hessian::new(site, gram, cols, 1, self)?;
        let mut out = weight.clone();
        let together = pattern.rows().max(ROWS) / pattern.rows() * pattern.rows();
        let masks = out.as_mut_slice().par_chunks_mut(together * cols);
        let masks: Vec<Vec<bool>> = masks.flat_map_iter(|rows| hessian.thin(pattern, rows)).collect();
        debug_assert_eq!(masks.len(), rows);
        Ok((out, masks))
    }

    /// The matrix whose outputs on the changed inputs `x` come nearest to those that the original has on its own `o`:
    /// with `H` the mean of `x x^T` it is `W + W E[(o - x) x^T] (H + damping)^-1`, and whatever is rounded is measured
    /// from there.
    fn towards_the_original(&self, site: Site, weight: &Tensor, h: Vec<f64>, shift: &[f64]) -> Result<Tensor> {
        let cols = weight.cols();
        let mean = (0..cols).map(|j| h[j * cols + j]).sum::<f64>() / cols as f64;
        let damped = |damping: f64| {
            Mat::from_fn(cols, cols, |i, j| h[i * cols + j] + if i == j { damping * mean + 1e-30 } else { 0.0 })
        };
        let factor = [self.damping, 10.0 * self.damping, 1.0].iter().find_map(|d| damped(*d).llt(Side::Lower).ok());
        let reason = "its inputs have no usable second moments (are some of them infinite or not a number?)";
        let factor = factor.ok_or_else(|| Error::Site { site, reason: reason.into() })?;
        // Rows of the answer are columns of `(H + damping)^-1 shift^T`.
        let turned = Mat::from_fn(cols, cols, |i, j| shift[j * cols + i]);
        let by = factor.solve(&turned);
        let by: Vec<f32> = (0..cols)
            .flat_map(|i| (0..cols).map(move |j| (i, j)))
            .map(|(i, j)| (self.asymmetry * by[(i, j)]) as f32)
            .collect();
        let by = Weight::from_tensor(Tensor::from_vec(cols, cols, by));
        let mut moved = ops::matmul(weight, &by);
        moved.as_mut_slice().iter_mut().zip(weight.as_slice()).for_each(|(m, w)| *m += w);
        Ok(moved)
    }
}

/// What rounding needs to know of the inputs.
struct Hessian {
    cols: usize,
    /// Position to column: the order of rounding.
    order: Vec<usize>,
    /// Is that the natural order?
    natural: bool,
    /// `U / U_jj` by rows, in the order of rounding, `[cols, cols]`.
    carry: Vec<f32>,
    /// What an error in a column costs: `1 / U_jj^2`, by column.
    cost: Vec<f32>,
}

impl Hessian {
    /// `span` columns stay together.
    fn new(site: Site, mut h: Vec<f64>, cols: usize, span: usize, options: &Gptq) -> Result<Hessian> {
        for j in 0..cols {
            // A column that no input reaches costs nothing; a unit keeps it out of the way.
            if h[j * cols + j] == 0.0 {
                h[j * cols + j] = 1.0;
            }
        }
        let mut order: Vec<usize> = (0..cols).collect();
        if options.activation_order {
            let size = |first: usize| (first..first + span).map(|j| h[j * cols + j]).sum::<f64>();
            let mut spans: Vec<(f64, usize)> = (0..cols).step_by(span).map(|first| (size(first), first)).collect();
            spans.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            order = spans.into_iter().flat_map(|(_, first)| first..first + span).collect();
        }
        let lower = inverse_factor(site, h, cols, &order, options.damping)?;
        // Reversed, the inverse of the lower factor is `U`.
        let upper = |j: usize, k: usize| lower[(cols - 1 - j, cols - 1 - k)];
        let mut carry = vec![0f32; cols * cols];
        let mut cost = vec![0f32; cols];
        for j in 0..cols {
            let d = upper(j, j);
            cost[order[j]] = (1.0 / (d * d)) as f32;
            for k in j..cols {
                carry[j * cols + k] = (upper(j, k) / d) as f32;
            }
        }
        Ok(Hessian { cols, order, natural: !options.activation_order, carry, cost })
    }

    /// Rounds some rows into `out`; `keep` says of each which values may be anything but zero, or is empty.
    fn round(&self, grid: Grid, rows: &[&[f32]], keep: &[Vec<bool>], out: &mut [u8]) {
        let (cols, len) = (self.cols, grid.block_len_in(self.cols));
        let (width, size) = (grid.row_bytes(cols), grid.block_bytes_in(cols));
        let mut work = Work {
            w: rows.iter().flat_map(|r| self.order.iter().map(|j| r[*j])).collect(),
            codes: vec![0; rows.len() * cols],
            blocks: Vec::new(),
        };
        let blocks = cols.div_ceil(len);
        for (r, row) in rows.iter().enumerate() {
            let beforehand = |b| (!self.natural).then(|| self.fit(grid, row, keep.get(r), b * len));
            work.blocks.extend((0..blocks).map(beforehand));
        }
        let mut errors = vec![0f32; rows.len() * LAZY];
        for from in (0..cols).step_by(LAZY) {
            let to = (from + LAZY).min(cols);
            for (r, errors) in errors.chunks_mut(LAZY).enumerate() {
                self.round_columns(grid, (r, keep.get(r)), from..to, errors, &mut work);
            }
            for p in from..to {
                let carry = &self.carry[p * cols + to..(p + 1) * cols];
                for (r, errors) in errors.chunks(LAZY).enumerate() {
                    let e = errors[p - from];
                    let rest = &mut work.w[r * cols + to..(r + 1) * cols];
                    rest.iter_mut().zip(carry).for_each(|(w, c)| *w -= e * c);
                }
            }
        }
        for r in 0..rows.len() {
            for b in 0..blocks {
                let (from, to) = (b * len, ((b + 1) * len).min(cols));
                let at = r * width + b * size;
                if let Some(block) = &work.blocks[r * blocks + b] {
                    let codes = &work.codes[r * cols + from..r * cols + to];
                    grid.encode(block, codes, &mut out[at..at + size]);
                }
            }
        }
    }

    /// Takes values out of some rows, one after the other in `rows`; what remains of each.
    fn thin(&self, pattern: Pattern, rows: &mut [f32]) -> Vec<Vec<bool>> {
        let cols = self.cols;
        let count = rows.len() / cols.max(1);
        let mut keep = vec![vec![false; cols]; count];
        let mut errors = vec![0f32; count * CHOSEN];
        for from in (0..cols).step_by(CHOSEN / pattern.unit() * pattern.unit()) {
            let to = (from + CHOSEN / pattern.unit() * pattern.unit()).min(cols);
            let width = to - from;
            // What is left out of these columns is chosen on values that have made up for all columns before them.
            for first in (0..count).step_by(pattern.rows()) {
                let group = first..count.min(first + pattern.rows());
                let squares = |j: usize| group.clone().map(|r| f64::from(rows[r * cols + j]).powi(2)).sum::<f64>();
                let worth = |j: usize| squares(j) * f64::from(self.cost[j]);
                let chosen = match pattern {
                    Pattern::Of { .. } => pattern.choose(&(from..to).map(worth).collect::<Vec<f64>>()),
                    // As many remain in the row as the pattern says; how many of them here, the row decides.
                    Pattern::Share { .. } => {
                        let all: Vec<f64> = (0..cols)
                            .map(|j| match j < from {
                                true if keep[first][j] => f64::INFINITY,
                                true => -1.0,
                                false => worth(j),
                            })
                            .collect();
                        pattern.choose(&all)[from..to].to_vec()
                    }
                };
                group.for_each(|r| keep[r][from..to].copy_from_slice(&chosen));
            }
            for r in 0..count {
                let (row, errors) = (&mut rows[r * cols..(r + 1) * cols], &mut errors[r * CHOSEN..(r + 1) * CHOSEN]);
                for p in from..to {
                    let e = if keep[r][p] { 0.0 } else { std::mem::take(&mut row[p]) };
                    errors[p - from] = e;
                    if e != 0.0 {
                        self.carry_on(p..p + 1, to, &[e], row);
                    }
                }
            }
            for p in from..to {
                let carry = &self.carry[p * cols + to..(p + 1) * cols];
                for (r, errors) in errors.chunks(CHOSEN).enumerate() {
                    let e = errors[..width][p - from];
                    let rest = &mut rows[r * cols + to..(r + 1) * cols];
                    rest.iter_mut().zip(carry).for_each(|(w, c)| *w -= e * c);
                }
            }
        }
        keep
    }

    fn fit(&self, grid: Grid, row: &[f32], keep: Option<&Vec<bool>>, from: usize) -> Block {
        let to = (from + grid.block_len_in(self.cols)).min(self.cols);
        let Some(keep) = keep else { return grid.fit(&row[from..to], Some(&self.cost[from..to])) };
        let held: Vec<f32> = row[from..to].iter().zip(&keep[from..]).map(|(x, k)| if *k { *x } else { 0.0 }).collect();
        grid.fit(&held, Some(&self.cost[from..to]))
    }

    /// Rounds the columns of a span from position `p` on together, which is column `col` of its block.
    fn round_span(&self, block: &Block, col: usize, p: usize, row: &[f32], codes: &mut [u8], errors: &mut [f32]) {
        let carry: [[f32; SPAN]; SPAN] = std::array::from_fn(|i| {
            let row = &self.carry[(p + i) * self.cols + p..][..SPAN];
            std::array::from_fn(|j| if j > i { row[j] } else { 0.0 })
        });
        let each: [f32; SPAN] = std::array::from_fn(|i| self.cost[self.order[p + i]]);
        let x: [f32; SPAN] = std::array::from_fn(|i| row[p + i]);
        let (chosen, left) = block.round_span(col, &x, Cost { each: &each, carry: Some(&carry) });
        codes.copy_from_slice(&chosen);
        errors[..SPAN].copy_from_slice(&left);
    }

    /// Carries the errors of some positions on to those after them, up to `to`.
    fn carry_on(&self, from: std::ops::Range<usize>, to: usize, errors: &[f32], row: &mut [f32]) {
        for (p, e) in from.clone().zip(errors) {
            let carry = &self.carry[p * self.cols + from.end..p * self.cols + to];
            row[from.end..to].iter_mut().zip(carry).for_each(|(w, c)| *w -= e * c);
        }
    }

    /// Rounds the columns at positions `range` of one row, carrying errors within the range.
    fn round_columns(
        &self,
        grid: Grid,
        (r, keep): (usize, Option<&Vec<bool>>),
        range: std::ops::Range<usize>,
        errors: &mut [f32],
        work: &mut Work,
    ) {
        let (cols, len) = (self.cols, grid.block_len_in(self.cols));
        let blocks = cols.div_ceil(len);
        for p in range.clone() {
            let col = self.order[p];
            let slot = &mut work.blocks[r * blocks + col / len];
            let row = &mut work.w[r * cols..(r + 1) * cols];
            // In natural order a block is fitted when rounding reaches it, on values that were moved already.
            let block = slot.get_or_insert_with(|| self.fit(grid, row, keep, col / len * len));
            if block.span() > 1 {
                if p.is_multiple_of(SPAN) {
                    let codes = &mut work.codes[r * cols + col..r * cols + col + SPAN];
                    self.round_span(block, col % len, p, row, codes, &mut errors[p - range.start..]);
                    self.carry_on(p..p + SPAN, range.end, &errors[p - range.start..], row);
                }
                continue;
            }
            let w = row[p];
            let mut e = w;
            if keep.is_none_or(|keep| keep[col]) {
                let (code, value) = block.round(col % len, w);
                work.codes[r * cols + col] = code;
                e -= value;
            }
            errors[p - range.start] = e;
            self.carry_on(p..p + 1, range.end, &[e], row);
        }
    }
}

/// The rows being rounded.
struct Work {
    /// Values in the order of rounding, `[rows, cols]`.
    w: Vec<f32>,
    /// Codes by column, `[rows, cols]`.
    codes: Vec<u8>,
    /// Fitted blocks, `[rows, blocks]`.
    blocks: Vec<Option<Block>>,
}

/// The inverse of `L`, where `L L^T` is `H + damping` with rows and columns in the reversed order of rounding.
///
/// Reversed again it is the upper factor `U` of `(H + damping)^-1 = U^T U`, so one factorization and one
/// triangular inverse do. Damping grows tenfold until the factorization succeeds. At most three matrices of
/// `cols^2` doubles are held at once.
fn inverse_factor(site: Site, h: Vec<f64>, cols: usize, order: &[usize], damping: f64) -> Result<Mat<f64>> {
    let mean = (0..cols).map(|j| h[j * cols + j]).sum::<f64>() / cols as f64;
    let at = |i: usize| order[cols - 1 - i];
    let mut damping = damping;
    while damping <= 100.0 {
        let damped =
            Mat::from_fn(cols, cols, |i, j| h[at(i) * cols + at(j)] + if i == j { damping * mean } else { 0.0 });
        let factor = damped.llt(Side::Lower);
        drop(damped);
        if let Ok(llt) = factor {
            drop(h);
            let mut inverse = Mat::<f64>::zeros(cols, cols);
            faer::linalg::triangular_inverse::invert_lower_triangular(inverse.as_mut(), llt.L(), Par::Seq);
            return Ok(inverse);
        }
        damping *= 10.0;
    }
    let reason = "its inputs have no usable second moments (are some of them infinite or not a number?)";
    Err(Error::Site { site, reason: reason.into() })
}
