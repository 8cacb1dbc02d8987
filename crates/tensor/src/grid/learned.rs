//! Scales that learn: what a matrix is on a grid whose sub-blocks have given scales and offsets, and how it changes with
//! them (LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576).

use super::{Block, Grid, Table, Zero, block::SUBS, pack::halved};
use crate::{Bytes, Storage, Tensor, Weight, WeightError};
use half::f16;
use rayon::prelude::*;

/// A scale and an offset for every sub-block of a matrix, row by row. A grid without minima takes no notice of offsets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scales {
    /// May be negative where the grid's may.
    pub scale: Vec<f32>,
    /// The value of code 0, less that of `base` steps.
    pub offset: Vec<f32>,
}

/// Values on their way to a grid, and what each is moved by before it is rounded.
#[derive(Clone, Copy)]
pub struct Moved<'a> {
    /// The values.
    pub x: &'a Tensor,
    /// In steps between the levels at each value's place, `[rows, cols]`: half a step reaches the level on its other side.
    pub by: Option<&'a Tensor>,
}

impl<'a> From<&'a Tensor> for Moved<'a> {
    fn from(x: &'a Tensor) -> Moved<'a> {
        Moved { x, by: None }
    }
}

/// One row on its way to a grid.
struct Row<'a> {
    x: &'a [f32],
    by: Option<&'a [f32]>,
    scale: &'a [f32],
    offset: &'a [f32],
}

impl Grid {
    /// Values that share a scale in a row of `cols`.
    pub fn sub_len_in(self, cols: usize) -> usize {
        self.block_len_in(cols).min(Block::empty(self).sub_len as usize)
    }

    /// Has a sub-block an offset of its own?
    pub fn has_offsets(self) -> bool {
        matches!(
            self,
            Grid::Int { zero: Zero::Minimum | Zero::Point, .. }
                | Grid::Q4_1
                | Grid::Q5_1
                | Grid::Q2K
                | Grid::Q4K
                | Grid::Q5K
        )
    }

    /// Sub-blocks of a block of a row of `cols`.
    fn subs_of_block(self, cols: usize) -> usize {
        self.block_len_in(cols) / self.sub_len_in(cols).max(1)
    }

    /// Sub-blocks of a row, those of a short last group included.
    fn subs(self, cols: usize) -> usize {
        cols.div_ceil(self.block_len_in(cols).max(1)) * self.subs_of_block(cols)
    }

    /// The scales that fit a matrix best.
    pub fn fit_scales(self, x: &Tensor) -> Scales {
        let subs = self.subs(x.cols());
        let mut scales = Scales { scale: vec![0.0; x.rows() * subs], offset: vec![0.0; x.rows() * subs] };
        let rows = scales.scale.par_chunks_mut(subs.max(1)).zip(scales.offset.par_chunks_mut(subs.max(1)));
        rows.enumerate().for_each(|(r, (scale, offset))| {
            let own = self.subs_of_block(x.cols());
            let places = scale.chunks_mut(own).zip(offset.chunks_mut(own));
            for (x, (scale, offset)) in x.row(r).chunks(self.block_len_in(x.cols())).zip(places) {
                self.take_scales(&self.fit(x, None), scale, offset);
            }
        });
        scales
    }

    /// The block whose sub-blocks have these scales and offsets, as nearly as its bytes can say so.
    fn block_with(self, scale: &[f32], offset: &[f32]) -> Block {
        let mut block = Block::empty(self);
        // In whole multiples of what the block has.
        let multiple = |v: f32, unit: f32, least: f32, most: f32| match unit == 0.0 {
            true => 0.0,
            false => (v / unit).round_ties_even().clamp(least, most),
        };
        match self {
            Grid::Q2K | Grid::Q4K | Grid::Q5K => {
                let most = if self == Grid::Q2K { 15.0 } else { 63.0 };
                let minimum: [f32; SUBS] = std::array::from_fn(|s| offset.get(s).map_or(0.0, |o| -o));
                block.d = common_unit(scale, most, 1.0, |v, d| multiple(v, d, 0.0, most));
                block.m = common_unit(&minimum[..offset.len()], most, 1.0, |v, m| multiple(v, m, 0.0, most));
                for s in 0..scale.len() {
                    block.steps[s] = multiple(scale[s], value(block.d), 0.0, most) as i8;
                    block.mins[s] = multiple(-offset[s], value(block.m), 0.0, most) as u8;
                }
            }
            Grid::Q3K | Grid::Q6K | Grid::Iq4Xs => {
                let (least, most) = if self == Grid::Q6K { (-128.0, 127.0) } else { (-32.0, 31.0) };
                block.d = common_unit(scale, least, 1.0, |v, d| multiple(v, d, least, most));
                for (step, scale) in block.steps.iter_mut().zip(scale) {
                    *step = multiple(*scale, value(block.d), least, most) as i8;
                }
            }
            _ if let Some(book) = block.book => {
                let most = if book.is_shifted() { 15.0 } else { 31.0 };
                let odd = |v: f32, unit: f32| 2.0 * multiple((v - unit) / 2.0, unit, 0.0, (most - 1.0) / 2.0) + 1.0;
                let part = halved(1.0, self.halvings());
                block.d = common_unit(scale, most, part, odd);
                for s in 0..scale.len() {
                    block.steps[s] = odd(scale[s], part * value(block.d)) as i8;
                    block.mins[s] = u8::from(self == Grid::Iq1S && offset[s] < 0.0);
                }
            }
            Grid::Nvfp4 => {
                for (step, scale) in block.steps.iter_mut().zip(scale) {
                    *step = Table::E4m3.nearest(2.0 * scale.abs()) as i8;
                }
            }
            Grid::Mxfp4 => {
                // The power of two that is nearest by ratio.
                let e = if scale[0].abs() > 0.0 { (scale[0].abs().log2() + 128.0).round() } else { 0.0 };
                block.d = e.clamp(0.0, 254.0) as u16;
            }
            _ => {
                let d = bits(scale[0]);
                (block.d, block.scale[0]) = (d, value(d));
                match self {
                    Grid::Int { zero: Zero::Point, .. } => {
                        let most = f32::from(block.highest());
                        block.mins[0] = multiple(-offset[0], value(d), 1.0, most).max(1.0) as u8;
                    }
                    _ => block.m = if self.has_offsets() { bits(offset[0]) } else { 0 },
                }
            }
        }
        block.derive(self);
        block
    }

    /// What a row of a matrix and its scales make, block by block: where the block begins, and the block.
    fn each_block(self, row: &Row<'_>, mut each: impl FnMut(usize, Block)) {
        let (own, len) = (self.subs_of_block(row.x.len()).max(1), self.block_len_in(row.x.len()));
        let places = row.scale.chunks(own).zip(row.offset.chunks(own));
        for (i, (scale, offset)) in places.enumerate() {
            each(i * len, self.block_with(scale, offset));
        }
    }

    /// The nearest levels to a matrix on a grid with these scales, in `out`, which has its shape.
    ///
    /// # Panics
    /// If there are not as many scales as [`Grid::fit_scales`] makes, which is the caller's fault.
    pub fn levels<'a>(self, values: impl Into<Moved<'a>>, scales: &Scales, out: &mut Tensor) {
        let values = values.into();
        let cols = values.x.cols();
        self.check(values.x, scales);
        out.as_mut_slice().par_chunks_mut(cols.max(1)).enumerate().for_each(|(r, out)| {
            let row = self.row(values, scales, r);
            self.each_block(&row, |from, block| {
                let to = cols.min(from + self.block_len_in(cols));
                let x: Vec<f32> = (0..to - from).map(|i| row.at(from, i, &block)).collect();
                let mut codes = vec![0; x.len()];
                block.round_all(&x, None, &mut codes);
                block.values(&codes, &mut out[from..to]);
            });
        });
    }

    /// From the gradient of [`Grid::levels`] (`dy`) that of the matrix, or of what its values are moved by where they are, in
    /// its place, and that of the scales: what is rounded passes as if it were not, and what lies beyond the levels does not
    /// move. Of values that are moved, those that half a step brings back do not lie beyond.
    ///
    /// # Panics
    /// As [`Grid::levels`].
    pub fn levels_gradient<'a>(
        self,
        values: impl Into<Moved<'a>>,
        scales: &Scales,
        dy: &mut Tensor,
        into: &mut Scales,
    ) {
        let values = values.into();
        let (cols, subs) = (values.x.cols(), self.subs(values.x.cols()));
        self.check(values.x, scales);
        self.check(values.x, into);
        let gradients = into.scale.par_chunks_mut(subs.max(1)).zip(into.offset.par_chunks_mut(subs.max(1)));
        let rows = dy.as_mut_slice().par_chunks_mut(cols.max(1)).zip(gradients);
        rows.enumerate().for_each(|(r, (dy, (dscale, doffset)))| {
            let row = self.row(values, scales, r);
            let (own, sub_len) = (self.subs_of_block(cols), self.sub_len_in(cols));
            self.each_block(&row, |from, block| {
                let to = cols.min(from + self.block_len_in(cols));
                let mut sums = [[0f32; 2]; SUBS];
                let x: Vec<f32> = (0..to - from).map(|i| row.at(from, i, &block)).collect();
                let mut codes = vec![0; x.len()];
                block.round_all(&x, None, &mut codes);
                for (i, dy) in dy[from..to].iter_mut().enumerate() {
                    let (sub, step) = (i / sub_len, row.step(from, i, &block));
                    let [own, of_scale, of_offset] = block.slopes(i, x[i], block.value(i, codes[i]), 0.5 * step);
                    // What a value is moved by grows with the scale.
                    let of_step = if own == 0.0 { 0.0 } else { row.by(from, i) * step / block.scale[sub] };
                    sums[sub][0] += *dy * (of_scale + of_step);
                    sums[sub][1] += *dy * of_offset;
                    *dy *= if row.by.is_some() { own * step } else { own };
                }
                let first = from / sub_len;
                for (sub, [scale, offset]) in sums.iter().take(own).enumerate() {
                    dscale[first + sub] = *scale;
                    doffset[first + sub] = if self.has_offsets() { *offset } else { 0.0 };
                }
            });
        });
    }

    /// The gradient of each level of a table from that of [`Grid::levels`]: rows are summed one after the other.
    ///
    /// # Panics
    /// As [`Grid::levels`].
    pub fn table_gradient<'a>(self, values: impl Into<Moved<'a>>, scales: &Scales, dy: &Tensor) -> Vec<f32> {
        let values = values.into();
        let cols = values.x.cols();
        self.check(values.x, scales);
        let (sub_len, count) =
            (self.sub_len_in(cols), Block::empty(self).table.map_or(0, |table| table.levels().len()));
        let of_row = |r: usize| {
            let (row, dy, mut sums) = (self.row(values, scales, r), dy.row(r), vec![0f32; count]);
            self.each_block(&row, |from, block| {
                let to = cols.min(from + self.block_len_in(cols));
                let x: Vec<f32> = (0..to - from).map(|i| row.at(from, i, &block)).collect();
                let mut codes = vec![0; x.len()];
                block.round_all(&x, None, &mut codes);
                for (i, (code, dy)) in codes.iter().zip(&dy[from..to]).enumerate() {
                    sums[usize::from(*code)] += dy * block.scale[i / sub_len];
                }
            });
            sums
        };
        let rows: Vec<Vec<f32>> = (0..values.x.rows()).into_par_iter().map(of_row).collect();
        let mut sums = vec![0f32; count];
        rows.iter().for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, own)| *sum += own));
        sums
    }

    /// The matrix that [`Grid::levels`] makes, as codes.
    ///
    /// # Errors
    /// If rows do not divide into blocks.
    ///
    /// # Panics
    /// As [`Grid::levels`].
    pub fn encode_levels<'a>(self, values: impl Into<Moved<'a>>, scales: &Scales) -> Result<Weight, WeightError> {
        let values = values.into();
        let (rows, cols) = (values.x.rows(), values.x.cols());
        if !self.fits(cols) {
            return Err(WeightError::Row { cols, storage: Storage::Grid(self), block: self.block_len() });
        }
        self.check(values.x, scales);
        let width = self.row_bytes(cols);
        let mut bytes = vec![0u8; rows * width];
        bytes.par_chunks_mut(width.max(1)).enumerate().for_each(|(r, out)| {
            let row = self.row(values, scales, r);
            let (len, size) = (self.block_len_in(cols), self.block_bytes_in(cols));
            let mut codes = vec![0u8; len];
            self.each_block(&row, |from, block| {
                let to = cols.min(from + self.block_len_in(cols));
                let x: Vec<f32> = (0..to - from).map(|i| row.at(from, i, &block)).collect();
                block.round_all(&x, None, &mut codes[..to - from]);
                let place = from / len * size;
                self.encode(&block, &codes[..to - from], &mut out[place..place + size]);
            });
        });
        Weight::new(Storage::Grid(self), rows, cols, Bytes::from_vec(bytes))
    }

    fn check(self, x: &Tensor, scales: &Scales) {
        let want = x.rows() * self.subs(x.cols());
        assert_eq!([scales.scale.len(), scales.offset.len()], [want; 2], "scales of a matrix");
    }

    fn row<'a>(self, values: Moved<'a>, scales: &'a Scales, r: usize) -> Row<'a> {
        let subs = self.subs(values.x.cols());
        let own = r * subs..(r + 1) * subs;
        let by = values.by.map(|by| by.row(r));
        Row { x: values.x.row(r), by, scale: &scales.scale[own.clone()], offset: &scales.offset[own] }
    }

    /// The scales of a matrix that is stored on this grid, `[rows, cols]` in `bytes`.
    ///
    /// # Panics
    /// If `bytes` are not those of such a matrix, which is the caller's fault.
    pub fn scales_of(self, bytes: &[u8], rows: usize, cols: usize) -> Scales {
        assert_eq!(bytes.len(), rows * self.row_bytes(cols), "bytes of a matrix");
        let subs = rows * self.subs(cols);
        let mut scales = Scales { scale: vec![0.0; subs], offset: vec![0.0; subs] };
        let own = self.subs_of_block(cols).max(1);
        let places = scales.scale.chunks_mut(own).zip(scales.offset.chunks_mut(own));
        for (bytes, (scale, offset)) in bytes.chunks_exact(self.block_bytes_in(cols).max(1)).zip(places) {
            self.take_scales(&super::pack::header(self, bytes), scale, offset);
        }
        scales
    }

    /// The scales and offsets of a block's sub-blocks.
    fn take_scales(self, block: &Block, scale: &mut [f32], offset: &mut [f32]) {
        scale.copy_from_slice(&block.scale[..scale.len()]);
        offset.copy_from_slice(&block.offset[..offset.len()]);
        match self {
            Grid::Int { zero: Zero::Point, .. } => offset[0] = block.scale[0] * f32::from(block.base),
            // Which way the levels of a sub-block are shifted stays as it was fitted.
            Grid::Iq1S => offset.iter_mut().zip(block.mins).for_each(|(o, m)| *o = -f32::from(m)),
            _ => {}
        }
    }

    /// Scales whose outermost levels are the outermost values of each sub-block, and zero.
    pub fn range_scales(self, x: &Tensor) -> Scales {
        let (cols, empty) = (x.cols(), Block::empty(self));
        let (subs, sub_len, mut scales) = (self.subs(cols), self.sub_len_in(cols), Scales::default());
        let ends = match empty.table {
            Some(table) => table.ends(),
            None => (f32::from(empty.base), f32::from(empty.base) + f32::from(empty.highest)),
        };
        for r in 0..x.rows() {
            for sub in 0..subs {
                let own = (sub * sub_len).min(cols)..((sub + 1) * sub_len).min(cols);
                let range = x.row(r)[own].iter().fold((0f32, 0f32), |(low, high), x| (low.min(*x), high.max(*x)));
                let (scale, offset) = match self.has_offsets() {
                    true => ((range.1 - range.0) / f32::from(empty.highest), range.0),
                    // The lowest code reaches furthest, so it takes the largest value, whatever its sign.
                    false if range.1 > -range.0 => (range.1 / ends.0, -0.0),
                    false => (range.0 / ends.0, -0.0),
                };
                scales.scale.push(scale);
                scales.offset.push(offset);
            }
        }
        scales
    }

    /// The values nearest to a matrix that are rounded to what `codes`, decoded, stand for on a grid of these scales; those of
    /// other codes only `reach` (0 to 1) of the way from their level to where the next one begins.
    ///
    /// # Panics
    /// As [`Grid::levels`].
    pub fn held_to(self, codes: &Tensor, x: &Tensor, scales: &Scales, reach: f32) -> Tensor {
        let cols = x.cols();
        self.check(x, scales);
        let mut out = codes.clone();
        out.as_mut_slice().par_chunks_mut(cols.max(1)).enumerate().for_each(|(r, out)| {
            let row = self.row(x.into(), scales, r);
            self.each_block(&row, |from, block| {
                let to = cols.min(from + self.block_len_in(cols));
                for (i, (out, x)) in out[from..to].iter_mut().zip(&row.x[from..to]).enumerate() {
                    let (code, level) = block.round(i, *out);
                    if block.round(i, *x).0 == code {
                        *out = *x;
                    } else {
                        // As near as tells on which side.
                        let sub = i / block.sub_len as usize;
                        let aside = 1e-5 * level.abs() + 1e-7 * block.scale[sub].abs();
                        let near = level + aside.copysign(x - level);
                        *out = level + 0.5 * reach * block.step(i, near).copysign(x - level);
                    }
                }
            });
        });
        out
    }
}

impl Row<'_> {
    /// What a value of a block that begins at `from` is moved by, in steps.
    #[inline(always)]
    fn by(&self, from: usize, i: usize) -> f32 {
        self.by.map_or(0.0, |by| by[from + i])
    }

    /// A step at a value's place; 0 where none is moved.
    #[inline(always)]
    fn step(&self, from: usize, i: usize, block: &Block) -> f32 {
        if self.by.is_some() { block.step(i, self.x[from + i]) } else { 0.0 }
    }

    /// The value that is rounded.
    #[inline(always)]
    fn at(&self, from: usize, i: usize, block: &Block) -> f32 {
        self.x[from + i] + self.by(from, i) * self.step(from, i, block)
    }
}

fn bits(v: f32) -> u16 {
    f16::from_f32(if v.is_finite() { v.clamp(-65504.0, 65504.0) } else { 0.0 }).to_bits()
}

fn value(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

/// The 16-bit float of which, times `part`, all of `values` are nearest to whole multiples (`nearest`, of a value and the
/// unit): scales that a block had give the block's own again. The largest becomes a multiple between 3/4 of `most` and `most`.
fn common_unit(values: &[f32], most: f32, part: f32, nearest: impl Fn(f32, f32) -> f32) -> u16 {
    let extreme = values.iter().fold(0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    // Where multiples have both signs the other end may hold the largest.
    let ends: &[f32] = if most < 0.0 { &[most, -most - 1.0] } else { &[most] };
    let mut best = (f32::INFINITY, bits(extreme / most / part));
    for end in ends {
        for below in 0..=(end.abs() / 4.0).min(24.0) as usize {
            let candidate = bits(extreme / (end - (below as f32).copysign(*end)) / part);
            let unit = part * value(candidate);
            let off = |v: &f32| (v - unit * nearest(*v, unit)).powi(2);
            let error: f32 = values.iter().map(off).sum();
            if error < best.0 {
                best = (error, candidate);
            }
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{all, noise},
        *,
    };

    fn matrix(grid: Grid) -> Tensor {
        let cols = 2 * grid.block_len_in(80);
        Tensor::from_vec(3, cols, noise(3 * cols, 11))
    }

    #[test]
    fn codes_are_what_was_learned_and_fitted_scales_lose_no_more_than_rounding() {
        for grid in all() {
            let x = matrix(grid);
            let scales = grid.fit_scales(&x);
            let mut levels = x.clone();
            grid.levels(&x, &scales, &mut levels);
            let codes = grid.encode_levels(&x, &scales).unwrap();
            assert_eq!(codes.to_tensor().as_slice(), levels.as_slice(), "{}", grid.name());
            let error =
                |y: &Tensor| -> f32 { x.as_slice().iter().zip(y.as_slice()).map(|(a, b)| (a - b) * (a - b)).sum() };
            let rounded = Weight::encode(&x, Storage::Grid(grid), None).unwrap().to_tensor();
            let ratio = error(&levels) / error(&rounded).max(1e-12);
            assert!(ratio < 1.01, "{}: {ratio} of rounding's error", grid.name());
        }
    }

    #[test]
    fn stored_scales_are_those_that_were_fitted_and_codes_are_held_to() {
        for grid in all() {
            let x = matrix(grid);
            let codes = Weight::encode(&x, Storage::Grid(grid), None).unwrap();
            let scales = grid.scales_of(codes.bytes(), x.rows(), x.cols());
            assert_eq!(scales, grid.fit_scales(&x), "{}", grid.name());
            // Levels that another matrix was rounded to, on the same scales.
            let other = Tensor::from_vec(x.rows(), x.cols(), noise(x.as_slice().len(), 12));
            let (mut levels, mut held) = (x.clone(), x.clone());
            grid.levels(&other, &scales, &mut levels);
            for reach in [0.0, 0.5, 0.99] {
                grid.levels(&grid.held_to(&levels, &x, &scales, reach), &scales, &mut held);
                assert_eq!(held.as_slice(), levels.as_slice(), "{} {reach}", grid.name());
            }
        }
    }

    #[test]
    fn the_range_of_a_matrix_is_what_its_levels_reach() {
        for grid in all() {
            let x = matrix(grid);
            let mut levels = x.clone();
            grid.levels(&x, &grid.range_scales(&x), &mut levels);
            let most = |x: &Tensor| x.as_slice().iter().fold(0f32, |m, x| m.max(x.abs()));
            // Whole-number scales of sub-blocks, and powers of two, cannot say it exactly.
            let part = if matches!(grid, Grid::Mxfp4 | Grid::Q2K) { 0.5 } else { 0.9 };
            assert!(most(&levels) > part * most(&x), "{}", grid.name());
        }
    }

    #[test]
    fn half_a_step_reaches_the_level_on_the_other_side() {
        for grid in all().into_iter().filter(|grid| grid.span() == 1) {
            let x = matrix(grid);
            let scales = grid.fit_scales(&x);
            let levels = |by: f32| {
                let by = Tensor::from_vec(x.rows(), x.cols(), vec![by; x.as_slice().len()]);
                let mut out = x.clone();
                grid.levels(Moved { x: &x, by: Some(&by) }, &scales, &mut out);
                out
            };
            let [low, near, high] = [-0.499, 0.0, 0.499].map(levels);
            let mut nearest = x.clone();
            grid.levels(&x, &scales, &mut nearest);
            assert_eq!(near.as_slice(), nearest.as_slice());
            assert!(low.as_slice().iter().zip(high.as_slice()).all(|(low, high)| low <= high), "{}", grid.name());
            let moved = low.as_slice().iter().zip(high.as_slice()).filter(|(low, high)| low < high).count();
            assert!(moved * 2 > x.as_slice().len(), "{}: {moved} of {}", grid.name(), x.as_slice().len());
        }
    }

    #[test]
    fn gradients_of_levels_are_slopes() {
        let palette = |third: i8| {
            let table = Table::palette(&[-127, -40, third, 90]).unwrap();
            Grid::Levels { table, group: 32 }
        };
        let grid = palette(10);
        // Values that lie on levels keep their codes when a level moves a little.
        let x = matrix(grid);
        let scales = grid.fit_scales(&x);
        let mut on = x.clone();
        grid.levels(&x, &scales, &mut on);
        let weights = Tensor::from_vec(x.rows(), x.cols(), noise(x.as_slice().len(), 5));
        let got = grid.table_gradient(&on, &scales, &weights)[2];
        let sum = |third: i8| -> f32 {
            let mut levels = on.clone();
            palette(third).levels(&on, &scales, &mut levels);
            levels.as_slice().iter().zip(weights.as_slice()).map(|(y, w)| y * w).sum()
        };
        let want = (sum(12) - sum(8)) / 4.0;
        assert!((got - want).abs() < 1e-3 * want.abs(), "{got} {want}");
    }

    #[test]
    fn odd_scales_do_no_harm() {
        for grid in all() {
            let x = matrix(grid);
            let fitted = grid.fit_scales(&x);
            for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, 0.0, 1e-30] {
                let scales = Scales { scale: vec![odd; fitted.scale.len()], offset: vec![odd; fitted.offset.len()] };
                let mut levels = x.clone();
                grid.levels(&x, &scales, &mut levels);
                assert!(levels.is_finite(), "{} with scales of {odd}", grid.name());
            }
        }
    }

    /// The straight-through rule has no derivative to compare with, but that of scales and offsets is one where no value
    /// changes its code.
    #[test]
    fn gradients_of_scales_are_slopes_of_the_levels() {
        let plain = [Grid::Q4_0, Grid::Q8_0, Grid::Q4_1, Grid::Iq4Nl, Grid::int(3, 64, Zero::Minimum).unwrap()];
        for grid in plain {
            let x = matrix(grid);
            let scales = grid.fit_scales(&x);
            let weights = Tensor::from_vec(x.rows(), x.cols(), noise(x.as_slice().len(), 5));
            let mut dy = weights.clone();
            let mut got = scales.clone();
            grid.levels_gradient(&x, &scales, &mut dy, &mut got);
            for sub in [0, scales.scale.len() - 1] {
                let block = grid.block_with(&scales.scale[sub..=sub], &scales.offset[sub..=sub]);
                let places = sub * grid.sub_len_in(x.cols())..(sub + 1) * grid.sub_len_in(x.cols());
                let (mut of_scale, mut of_offset) = (0f32, 0f32);
                for (i, at) in places.enumerate() {
                    let (x, weight) = (x.as_slice()[at], weights.as_slice()[at]);
                    let (code, level) = block.round(i, x);
                    let inside = dy.as_slice()[at] != 0.0;
                    let (s, o) = (block.scale[0], block.offset[0]);
                    let steps = (level - o) / s;
                    of_scale += weight * if inside { steps - (x - o) / s } else { steps };
                    of_offset += if inside { 0.0 } else { weight };
                    assert!(inside || code == 0 || code == block.highest(), "{}", grid.name());
                }
                assert!((got.scale[sub] - of_scale).abs() < 1e-3 * of_scale.abs().max(1.0), "{}", grid.name());
                let want = if grid.has_offsets() { of_offset } else { 0.0 };
                assert!((got.offset[sub] - want).abs() < 1e-4 * want.abs().max(1.0), "{}", grid.name());
            }
        }
    }
}
