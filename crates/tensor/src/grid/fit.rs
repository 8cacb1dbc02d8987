//! Fitting the scales of a block: a search over candidates, each followed by closed-form least squares.
//!
//! One-scale blocks try scales that map the largest value to each end of the codes and near it; blocks with a
//! minimum alternate rounding with a two-parameter regression. Blocks of sub-blocks are fitted in [`super::sub_blocks`].

use super::{
    Grid, LONGEST, Table, Zero, abreast,
    abreast::{Fits, LANES, Lanes, Rungs, lanes},
    block::{Block, round_even},
    even_subs,
    pack::{half_e4m3, half_power},
    sub_blocks::{Steps, stepped_subs},
};
use half::f16;

/// What one fit reads: values, their weights, and how they lie on codes.
pub(super) struct Values<'a> {
    pub(super) x: &'a [f32],
    pub(super) w: &'a [f32],
    /// Are all weights one?
    pub(super) alike: bool,
}

/// See [`Grid::fit`].
#[inline(always)]
pub fn fit(grid: Grid, x: &[f32], importance: Option<&[f32]>) -> Block {
    if x.len() <= LONGEST {
        let (mut values, mut weights) = ([0f32; LONGEST], [1f32; LONGEST]);
        return fit_in(grid, x, importance, &mut values[..x.len()], &mut weights[..x.len()]);
    }
    fit_in(grid, x, importance, &mut vec![0.0; x.len()], &mut vec![1.0; x.len()])
}

/// As [`fit`], with room for the values and their weights.
#[inline(always)]
fn fit_in(grid: Grid, x: &[f32], importance: Option<&[f32]>, values: &mut [f32], weights: &mut [f32]) -> Block {
    let clean = |v: f32| if v.is_finite() { v.clamp(-65504.0, 65504.0) } else { 0.0 };
    values.iter_mut().zip(x).for_each(|(c, v)| *c = clean(*v));
    weigh(importance, weights);
    let v = Values { x: values, w: weights, alike: importance.is_none() };
    let mut block = Block::empty(grid);
    let (base, highest) = (f32::from(block.base), f32::from(block.highest));
    match grid {
        Grid::Levels { table, .. } => set_scale(&mut block, grid, table_scale(&v, table, Rungs::of(table).as_ref())),
        Grid::Iq4Nl => block.d = bits(table_scale(&v, Table::Iq4Nl, Rungs::of(Table::Iq4Nl).as_ref())),
        Grid::Mxfp4 => block.d = power_scale(&v),
        Grid::Int { zero: Zero::Point, .. } => {
            let (scale, zero) = pointed(&v, highest);
            block.mins[0] = zero;
            set_scale(&mut block, grid, scale);
        }
        Grid::Int { zero: Zero::Minimum, .. } | Grid::Q4_1 | Grid::Q5_1 => {
            let (scale, offset) = affine(&v, highest);
            (block.d, block.m) = (bits(scale), bits(offset));
        }
        Grid::Int { .. } => set_scale(&mut block, grid, symmetric(&v, base, highest)),
        Grid::Q4_0 | Grid::Q5_0 | Grid::Q8_0 | Grid::Tq1 | Grid::Tq2 => block.d = bits(symmetric(&v, base, highest)),
        Grid::Q2K => even_subs::affine::<false>(&v, &mut block, grid, 15.0),
        Grid::Q4K | Grid::Q5K => even_subs::affine::<true>(&v, &mut block, grid, 63.0),
        Grid::Q3K => even_subs::stepped(&v, &mut block, grid, -32.0, 31.0),
        Grid::Q6K => even_subs::stepped(&v, &mut block, grid, -128.0, 127.0),
        Grid::Iq4Xs => stepped_subs(&v, &mut block, grid, Steps::Whole(-32.0, 31.0)),
        Grid::Iq1S | Grid::Iq1M => stepped_subs(&v, &mut block, grid, Steps::Odd(15.0)),
        Grid::Iq2Xxs | Grid::Iq2Xs | Grid::Iq2S | Grid::Iq3Xxs | Grid::Iq3S => {
            stepped_subs(&v, &mut block, grid, Steps::Odd(31.0));
        }
        Grid::Nvfp4 => (0..x.len().div_ceil(16)).for_each(|s| block.steps[s] = e4m3_scale(&sixteen(&v, s))),
    }
    block.derive(grid);
    block
}

/// Sets the scale of a group, or of a row: one of 16 bits wherever that costs no precision, since packed weights have no
/// others.
#[inline(always)]
fn set_scale(block: &mut Block, grid: Grid, scale: f32) {
    block.d = bits(scale);
    if grid.is_by_row() {
        let half = value(block.d);
        block.scale[0] = if (half - scale).abs() <= scale.abs() / 1024.0 { half } else { scale };
    }
}

/// Importances around one, so that sums of their squares neither overflow nor vanish; all equal where none counts.
#[inline(always)]
pub(super) fn weigh(importance: Option<&[f32]>, weights: &mut [f32]) {
    let counts = |i: f32| i.is_finite() && i > 0.0;
    let Some(importance) = importance else { return };
    let sum: f64 = importance.iter().take(weights.len()).filter(|i| counts(**i)).map(|i| f64::from(*i)).sum();
    if sum > 0.0 {
        let scale = weights.len() as f64 / sum;
        for (w, i) in weights.iter_mut().zip(importance) {
            *w = if counts(*i) { (f64::from(*i) * scale).max(1e-12) as f32 } else { 1e-12 };
        }
    }
}

#[inline(always)]
pub(super) fn bits(x: f32) -> u16 {
    f16::from_f32(x).to_bits()
}

#[inline(always)]
pub(super) fn value(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

/// Sums of one rounding: `sum w x q` and `sum w q q`, `q` being a rounded multiple of the scale.
#[inline(always)]
fn moments(v: &Values<'_>, inverse: f32, low: f32, high: f32) -> (f32, f32) {
    const LANES: usize = 8;
    let (mut xq, mut qq) = ([0f32; LANES], [0f32; LANES]);
    for (x, w) in v.x.chunks_exact(LANES).zip(v.w.chunks_exact(LANES)) {
        for i in 0..LANES {
            let q = round_even((x[i] * inverse).clamp(low, high));
            xq[i] += w[i] * x[i] * q;
            qq[i] += w[i] * q * q;
        }
    }
    let rest = v.x.len() / LANES * LANES;
    for (x, w) in v.x[rest..].iter().zip(&v.w[rest..]) {
        let q = round_even((x * inverse).clamp(low, high));
        xq[0] += w * x * q;
        qq[0] += w * q * q;
    }
    (xq.iter().sum(), qq.iter().sum())
}

/// The scale of codes `base..=base + highest` around zero with the least error; it may be negative.
#[inline(always)]
fn symmetric(v: &Values<'_>, base: f32, highest: f32) -> f32 {
    let (low, high) = (base, base + highest);
    let extreme = abreast::extreme(v.x);
    if extreme == 0.0 {
        return 0.0;
    }
    let mut best = (0f32, extreme / low);
    // Wide codes lose little by clipping and a lot by a coarse scale: fewer candidates are worth trying.
    let (tried, width, again) = match highest {
        200.0.. => (8, 0.25, 0),
        40.0.. => (16, 0.25, 3),
        _ => (38, 0.12, 3),
    };
    // In turn near the one end of the codes and the other, in the order of their distance from it.
    let candidate = |i: usize| {
        let nudge = width * (i / 2 + 1).div_euclid(2) as f32 * if (i / 2).is_multiple_of(2) { 1.0 } else { -1.0 };
        (if i.is_multiple_of(2) { low + nudge } else { high + nudge }) / extreme
    };
    for first in (0..tried).step_by(LANES) {
        let (xq, qq) = abreast::moments(v, &lanes(|i| candidate(first + i)), low, high);
        let gain = lanes(|i| xq[i] * xq[i] / qq[i]);
        for i in 0..LANES {
            if qq[i] > 0.0 && gain[i] > best.0 {
                best = (gain[i], xq[i] / qq[i]);
            }
        }
    }
    for _ in 0..again {
        let (xq, qq) = moments(v, 1.0 / best.1, low, high);
        if qq > 0.0 && xq * xq / qq > best.0 {
            best = (xq * xq / qq, xq / qq);
        } else {
            break;
        }
    }
    best.1
}

/// Sums of one rounding to a table: `sum w x q` and `sum w q q`.
#[inline(always)]
pub(super) fn table_moments(v: &Values<'_>, inverse: f32, table: Table, rungs: Option<&Rungs>) -> (f32, f32) {
    if let Some(rungs) = rungs {
        return rungs.moments_of_one(v, inverse);
    }
    let levels = table.levels();
    let (mut xq, mut qq) = (0f32, 0f32);
    for (x, w) in v.x.iter().zip(v.w) {
        let q = levels[usize::from(table.nearest(x * inverse))];
        xq += w * x * q;
        qq += w * q * q;
    }
    (xq, qq)
}

/// The same of each of eight scales.
#[inline(always)]
fn table_moments_of(v: &Values<'_>, inverse: &Lanes, table: Table, rungs: Option<&Rungs>) -> (Lanes, Lanes) {
    if let Some(rungs) = rungs {
        return rungs.moments(v, inverse);
    }
    let (mut xq, mut qq) = ([0f32; LANES], [0f32; LANES]);
    for i in 0..LANES {
        // Candidates that fill up the last eight are those before them.
        (xq[i], qq[i]) = match i > 0 && inverse[i] == inverse[i - 1] {
            true => (xq[i - 1], qq[i - 1]),
            false => table_moments(v, inverse[i], table, None),
        };
    }
    (xq, qq)
}

/// The scale of a table with the least error.
#[inline(always)]
pub(super) fn table_scale(v: &Values<'_>, table: Table, rungs: Option<&Rungs>) -> f32 {
    let extreme = abreast::extreme(v.x);
    if extreme == 0.0 {
        return 0.0;
    }
    let (low, high) = table.ends();
    let mut best = (0f32, extreme / low);
    // Eight bits of float are as fine near every size: where they begin hardly matters. A scale whose sign turns the
    // levels over gains nothing where they are the same on both sides.
    let (steps, width) = if table.bits() == 8 { (2, 0.04) } else { (8, 0.0134) };
    let (tried, ends) = (2 * steps + 1, if -low == high { [high; 2] } else { [low, high] });
    let all = if -low == high { tried } else { 2 * tried };
    for first in (0..all).step_by(LANES) {
        let inverse = lanes(|i| {
            let turn = (first + i).min(all - 1);
            let end = ends[turn / tried];
            let nudge = (turn % tried) as f32 - steps as f32;
            (end.abs() + width * nudge * high.max(-low)).copysign(end) / extreme
        });
        let (xq, qq) = table_moments_of(v, &inverse, table, rungs);
        for i in 0..LANES {
            if qq[i] > 0.0 && xq[i] * xq[i] / qq[i] > best.0 {
                best = (xq[i] * xq[i] / qq[i], xq[i] / qq[i]);
            }
        }
    }
    for _ in 0..3 {
        let (xq, qq) = table_moments(v, 1.0 / best.1, table, rungs);
        if qq > 0.0 && xq * xq / qq > best.0 {
            best = (xq * xq / qq, xq / qq);
        } else {
            break;
        }
    }
    best.1
}

/// The exponent (E8M0) of the power of two with the least error for levels of E2M1.
#[inline(always)]
fn power_scale(v: &Values<'_>) -> u16 {
    let extreme = v.x.iter().fold(0f32, |m, x| m.max(x.abs()));
    if extreme == 0.0 {
        return 0;
    }
    let power: f32 = v.x.iter().zip(v.w).map(|(x, w)| w * x * x).sum();
    // The largest value near the largest level, 12 halves: a power below to one above.
    let near = (extreme / 12.0).log2().ceil() as i32 + 128;
    least(v, power, |i| {
        let e = (near - 2 + i.min(3)).clamp(0, 254) as u16;
        (half_power(e), e)
    })
}

/// Of eight scales of E2M1, each with what stores it, what stores the one with the least error.
#[inline(always)]
fn least<T: Copy + Default>(v: &Values<'_>, power: f32, candidate: impl Fn(i32) -> (f32, T)) -> T {
    let Some(rungs) = Rungs::of(Table::E2m1) else { return T::default() };
    let scale = lanes(|i| candidate(i as i32).0);
    let (xq, qq) = rungs.moments(v, &lanes(|i| if scale[i] == 0.0 { 0.0 } else { 1.0 / scale[i] }));
    let mut best = (f32::INFINITY, T::default());
    for i in 0..LANES {
        let error = power - scale[i] * (2.0 * xq[i] - scale[i] * qq[i]);
        if scale[i] != 0.0 && error < best.0 {
            best = (error, candidate(i as i32).1);
        }
    }
    best.1
}

/// Scale and whole-number zero of codes `0..=highest` with the least error; the zero is at least 1, since version 1 of
/// GPTQ's files cannot say 0.
#[inline(always)]
fn pointed(v: &Values<'_>, highest: f32) -> (f32, u8) {
    let (scale, offset) = affine(v, highest);
    if scale == 0.0 {
        // All values are one: as the highest code or the lowest, the other being zero.
        return if offset < 0.0 { (-offset / highest, highest as u8) } else { (offset / (highest - 1.0), 1) };
    }
    let near = round_even((-offset / scale).clamp(1.0, highest));
    let power: f32 = v.x.iter().zip(v.w).map(|(x, w)| w * x * x).sum();
    let mut best = (f32::INFINITY, 0.0, 1.0);
    for nudge in [0.0, -1.0, 1.0] {
        let zero = (near + nudge).clamp(1.0, highest);
        let mut trial = scale;
        // What the zero was moved by may stretch the scale; where it was cut off, the range decides.
        for _ in 0..3 {
            let (xq, qq) = moments(v, 1.0 / trial, -zero, highest - zero);
            if qq <= 0.0 || xq <= 0.0 {
                break;
            }
            let error = power - trial * (2.0 * xq - trial * qq);
            if error < best.0 {
                best = (error, trial, zero);
            }
            trial = xq / qq;
        }
    }
    (best.1, best.2 as u8)
}

/// Sums of one rounding to `scale * q + offset`, `q` in `0..=highest`.
#[derive(Default, Clone, Copy)]
struct Regression {
    w: f32,
    q: f32,
    qq: f32,
    x: f32,
    xq: f32,
    error: f32,
}

#[inline(always)]
fn regress(v: &Values<'_>, scale: f32, offset: f32, highest: f32) -> Regression {
    const LANES: usize = 8;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut s = [[0f32; LANES]; 6];
    let mut add = |i: usize, x: f32, w: f32| {
        let q = round_even(((x - offset) * inverse).clamp(0.0, highest));
        let e = x - (scale * q + offset);
        s[0][i] += w;
        s[1][i] += w * q;
        s[2][i] += w * q * q;
        s[3][i] += w * x;
        s[4][i] += w * x * q;
        s[5][i] += w * e * e;
    };
    for (x, w) in v.x.chunks_exact(LANES).zip(v.w.chunks_exact(LANES)) {
        for i in 0..LANES {
            add(i, x[i], w[i]);
        }
    }
    let rest = v.x.len() / LANES * LANES;
    for (x, w) in v.x[rest..].iter().zip(&v.w[rest..]) {
        add(0, *x, *w);
    }
    let t = s.map(|lanes| lanes.iter().sum::<f32>());
    Regression { w: t[0], q: t[1], qq: t[2], x: t[3], xq: t[4], error: t[5] }
}

impl Regression {
    /// Scale and offset with the least error for the codes of this rounding.
    #[inline(always)]
    fn solve(&self) -> Option<(f32, f32)> {
        let det = self.w * self.qq - self.q * self.q;
        if det <= 1e-12 * self.w * self.qq {
            return None;
        }
        let scale = (self.w * self.xq - self.q * self.x) / det;
        let offset = (self.qq * self.x - self.q * self.xq) / det;
        Some((scale, offset))
    }
}

/// Scale and offset of codes `0..=highest` with the least error.
#[inline(always)]
fn affine(v: &Values<'_>, highest: f32) -> (f32, f32) {
    let (low, high) = abreast::range(v.x);
    if high <= low {
        return (0.0, low);
    }
    let range = high - low;
    let (steps, width) = match highest {
        h if h > 40.0 => (3, 0.4),
        h if h > 20.0 => (6, 0.4),
        h if h < 4.0 => (6, 0.08),
        _ => (6, 0.16),
    };
    // Fewer steps across the range than codes clip nothing; more of them clip the ends, and which end is worth keeping
    // depends on the weights.
    let wide = steps / 2 + 1;
    let start = |i: usize| {
        let (step, place) = match i.checked_sub(wide) {
            None => (-(i as f32), 0.5),
            Some(i) => ((i / 3 % steps + 1) as f32, (i % 3) as f32 / 2.0),
        };
        let scale = range / (highest + width * step);
        (scale, place * (range - scale * highest))
    };
    let lines = Lines::new(v, low, highest);
    let mut best = Fits::NONE;
    for first in (0..wide + 3 * steps).step_by(LANES) {
        best.take(&lines.line(&lanes(|i| start(first + i).0), &lanes(|i| start(first + i).1)));
    }
    // The best of each lane goes on from the line through its codes.
    for _ in 0..2 {
        best.take(&lines.line(&best.scale, &best.offset));
    }
    let mut found = (f32::INFINITY, range / highest, low);
    for i in 0..LANES {
        if best.error[i] < found.0 {
            found = (best.error[i], best.scale[i], best.offset[i] + low);
        }
    }
    // What was found is exact for its codes only; rounding anew may find others.
    found.0 = regress(v, found.1, found.2, highest).error;
    for _ in 0..4 {
        let Some((scale, offset)) = regress(v, found.1, found.2, highest).solve() else { break };
        let error = regress(v, scale, offset, highest).error;
        if scale <= 0.0 || error >= found.0 {
            break;
        }
        found = (error, scale, offset);
    }
    (found.1, found.2)
}

/// What the lines through roundings of some values, `scale * code + offset`, have in common; values and offsets are less `low`,
/// which sums of few digits want.
struct Lines<'a, 'b> {
    v: &'a Values<'b>,
    low: f32,
    highest: f32,
    w: f32,
    y: f32,
    yy: f32,
}

impl<'a, 'b> Lines<'a, 'b> {
    #[inline(always)]
    fn new(v: &'a Values<'b>, low: f32, highest: f32) -> Lines<'a, 'b> {
        let [mut w1, mut wy, mut wyy] = [[0f32; LANES]; 3];
        let mut add = |i: usize, x: f32, w: f32| {
            let y = x - low;
            w1[i] += w;
            wy[i] += w * y;
            wyy[i] += w * y * y;
        };
        let ((xs, x_rest), (ws, w_rest)) = (v.x.as_chunks::<LANES>(), v.w.as_chunks::<LANES>());
        for (x, w) in xs.iter().zip(ws) {
            for i in 0..LANES {
                add(i, x[i], w[i]);
            }
        }
        x_rest.iter().zip(w_rest).for_each(|(x, w)| add(0, *x, *w));
        let [w, y, yy] = [w1, wy, wyy].map(|lanes| lanes.iter().sum());
        Lines { v, low, highest, w, y, yy }
    }

    /// The lines of least error through the codes of eight roundings.
    #[inline(always)]
    fn line(&self, scale: &Lanes, offset: &Lanes) -> Fits<LANES> {
        let [q, qq, yq] = abreast::sums(self.v, self.low, scale, offset, self.highest);
        let mut line = Fits::NONE;
        for i in 0..LANES {
            let det = self.w * qq[i] - q[i] * q[i];
            let offset = (qq[i] * self.y - q[i] * yq[i]) / det;
            let scale = (yq[i] - offset * q[i]) / qq[i];
            let error = self.yy
                + scale * (scale * qq[i] + 2.0 * offset * q[i] - 2.0 * yq[i])
                + offset * (offset * self.w - 2.0 * self.y);
            let good = det > 1e-6 * self.w * qq[i] && scale > 0.0;
            line.error[i] = if good { error } else { f32::INFINITY };
            line.scale[i] = scale;
            line.offset[i] = offset;
        }
        line
    }
}

/// One sub-block of NVFP4, short at the end of a row.
#[inline(always)]
fn sixteen<'a>(v: &Values<'a>, s: usize) -> Values<'a> {
    let to = v.x.len().min(16 * s + 16);
    Values { x: &v.x[16 * s..to], w: &v.w[16 * s..to], alike: v.alike }
}

/// The E4M3 without sign with the least error as the scale of E2M1.
#[inline(always)]
fn e4m3_scale(v: &Values<'_>) -> i8 {
    let free = table_scale(v, Table::E2m1, Rungs::of(Table::E2m1).as_ref()).abs();
    if free == 0.0 {
        return 0;
    }
    let power: f32 = v.x.iter().zip(v.w).map(|(x, w)| w * x * x).sum();
    let near = i32::from(Table::E4m3.nearest(2.0 * free));
    least(v, power, |i| {
        let code = (near - 1 + i.min(2)).clamp(0, 0x7e);
        (half_e4m3(code as u8), code as i8)
    })
}
