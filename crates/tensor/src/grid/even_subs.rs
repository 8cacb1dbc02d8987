//! Fitting blocks of sub-blocks whose levels lie evenly: the sub-blocks stand side by side, so that whatever one of them tries,
//! sums and decides all of them do at once.
//!
//! A lane holds sixteen values: a sub-block, or a half of one of 32. Both halves then have the same sums, and what follows from
//! these.

use super::{
    Grid,
    abreast::{self, pick},
    block::{Block, round_even},
    fit::{Values, bits, value},
    pack::halved,
};

/// Lanes, and values of each.
const N: usize = 16;
/// A number of each lane.
type Row = [f32; N];

/// The values of a block's sub-blocks and their weights, place by place; those of `HALVES` are 32 long, and lane `i + 8` holds
/// the second half of what lane `i` begins.
struct Subs<const HALVES: bool> {
    x: [Row; N],
    w: [Row; N],
}

/// Scales and offsets of sub-blocks.
type Fits = abreast::Fits<N>;

impl<const HALVES: bool> Subs<HALVES> {
    #[inline(always)]
    fn of(v: &Values<'_>) -> Subs<HALVES> {
        let mut subs = Subs { x: [[0.0; N]; N], w: [[0.0; N]; N] };
        let (xs, ws) = (v.x.as_chunks::<N>().0, v.w.as_chunks::<N>().0);
        for (i, (x, w)) in xs.iter().zip(ws).enumerate() {
            let lane = if HALVES { i % 2 * (N / 2) + i / 2 } else { i };
            for k in 0..N {
                (subs.x[k][lane], subs.w[k][lane]) = (x[k], w[k]);
            }
        }
        subs
    }

    /// Sub-blocks, whose numbers are those of the first lanes.
    const COUNT: usize = if HALVES { N / 2 } else { N };

    /// The sums of whole sub-blocks from those of lanes.
    #[inline(always)]
    fn whole<const K: usize>(mut sums: [Row; K]) -> [Row; K] {
        if HALVES {
            for sum in &mut sums {
                for i in 0..N / 2 {
                    let both = sum[i] + sum[i + N / 2];
                    (sum[i], sum[i + N / 2]) = (both, both);
                }
            }
        }
        sums
    }

    /// Values and weights, place by place.
    #[inline(always)]
    fn places(&self) -> impl Iterator<Item = (&Row, &Row)> {
        self.x.iter().zip(&self.w)
    }

    /// The lowest and the highest value of each.
    #[inline(always)]
    fn range(&self) -> (Row, Row) {
        let (mut low, mut high) = (self.x[0], self.x[0]);
        for x in &self.x[1..] {
            for i in 0..N {
                low[i] = if x[i] < low[i] { x[i] } else { low[i] };
                high[i] = if x[i] > high[i] { x[i] } else { high[i] };
            }
        }
        if HALVES {
            for i in 0..N / 2 {
                let (a, b) = (i, i + N / 2);
                let least = if low[b] < low[a] { low[b] } else { low[a] };
                let most = if high[b] > high[a] { high[b] } else { high[a] };
                (low[a], low[b], high[a], high[b]) = (least, least, most, most);
            }
        }
        (low, high)
    }

    /// `sum w`, `sum w x` and `sum w x x` of each.
    #[inline(always)]
    fn powers(&self) -> [Row; 3] {
        let [mut w1, mut wx, mut wxx] = [[0f32; N]; 3];
        for (x, w) in self.places() {
            for i in 0..N {
                w1[i] += w[i];
                wx[i] += w[i] * x[i];
                wxx[i] += w[i] * x[i] * x[i];
            }
        }
        Self::whole([w1, wx, wxx])
    }

    /// The sums of one rounding to whole multiples of a scale from `low` to `high`: `sum w x q` and `sum w q q`.
    #[inline(always)]
    fn moments(&self, inverse: &Row, low: f32, high: f32) -> [Row; 2] {
        let [mut xq, mut qq] = [[0f32; N]; 2];
        for (x, w) in self.places() {
            for i in 0..N {
                let q = round_even((x[i] * inverse[i]).clamp(low, high));
                let wq = w[i] * q;
                xq[i] += wq * x[i];
                qq[i] += wq * q;
            }
        }
        Self::whole([xq, qq])
    }

    /// The scale of each with the least error for codes from `low` to `high`; it may be negative, and is 0 where all values are.
    #[inline(always)]
    fn symmetric(&self, low: f32, high: f32) -> Row {
        let (least, most) = self.range();
        let mut nearest = [0f32; N];
        let [mut gain, mut best] = [[0f32; N]; 2];
        for i in 0..N {
            let extreme = if -least[i] > most[i] { least[i] } else { most[i] };
            // Where there is nothing to fit, nothing is gained, and the scale stays as it is.
            nearest[i] = if extreme == 0.0 { 0.0 } else { 1.0 / extreme };
            best[i] = extreme / low;
        }
        // Wide codes lose little by a coarse choice: fewer candidates are worth trying.
        let (tried, width) = if high - low >= 40.0 { (8i32, 0.25) } else { (19, 0.12) };
        for step in 0..tried {
            let nudge = width * (step + 1).div_euclid(2) as f32 * if step % 2 == 0 { 1.0 } else { -1.0 };
            for end in [low + nudge, high + nudge] {
                self.better(&each(&nearest, |n| end * n), low, high, &mut gain, &mut best);
            }
        }
        for _ in 0..3 {
            self.better(&each(&best, inverse), low, high, &mut gain, &mut best);
        }
        best
    }

    /// Takes the scale of least error for the codes of a rounding where it gains more than `gain`.
    #[inline(always)]
    fn better(&self, inverse: &Row, low: f32, high: f32, gain: &mut Row, best: &mut Row) {
        let [xq, qq] = self.moments(inverse, low, high);
        for i in 0..N {
            // No number where nothing is rounded to anything but 0, which is not more than any gain.
            let own = xq[i] * xq[i] / qq[i];
            let better = own > gain[i];
            best[i] = pick(better, xq[i] / qq[i], best[i]);
            gain[i] = pick(better, own, gain[i]);
        }
    }
}

/// A number of each sub-block from another: a loop, since the library's function is a call of its own, for no instruction set.
#[inline(always)]
fn each(row: &Row, f: impl Fn(f32) -> f32) -> Row {
    let mut out = [0f32; N];
    for i in 0..N {
        out[i] = f(row[i]);
    }
    out
}

/// One over a scale, or 0.
#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// Q3_K and Q6_K: sub-blocks of sixteen values whose scales are whole multiples of the block's.
#[inline(always)]
pub fn stepped(v: &Values<'_>, block: &mut Block, grid: Grid, least: f32, most: f32) {
    let subs = Subs::<false>::of(v);
    let (low, high) = (f32::from(block.base), f32::from(block.base) + f32::from(block.highest));
    let free = subs.symmetric(low, high);
    let mut extreme = 0f32;
    for f in free {
        extreme = if f.abs() > extreme.abs() { f } else { extreme };
    }
    if extreme == 0.0 {
        return;
    }
    let [_, _, power] = subs.powers();
    // What is stored is that many times a step.
    let stored = |d: f32| bits(d / halved(1.0, grid.halvings()));
    let step = |bits: u16| halved(value(bits), grid.halvings());
    let mut best = (f32::INFINITY, 0, [0f32; N]);
    // Of many whole numbers some lie near what each sub-block wants, whatever the block's scale is.
    let shrinks: &[f32] = if most > 100.0 { &[1.0] } else { &[1.0, 0.97] };
    let starts = 2 * shrinks.len();
    for tried in 0..starts + 3 {
        let d = if tried < starts {
            stored(extreme / [least, most][tried / shrinks.len()] * shrinks[tried % shrinks.len()])
        } else {
            let Some(d) = subs.refit(step(best.1), &best.2, low, high) else { break };
            stored(d)
        };
        let (error, steps) = match step(d) {
            0.0 => (f32::INFINITY, best.2),
            d => subs.choose_steps(d, &free, &power, [least, most], [low, high]),
        };
        if error < best.0 {
            best = (error, d, steps);
        } else if tried >= starts {
            break;
        }
    }
    block.d = best.1;
    for i in 0..N {
        block.steps[i] = best.2[i] as i8;
    }
    block.derive(grid);
}

/// What is tried around the whole number of a free fit.
const NUDGES: [f32; 8] = [0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0];

impl<const HALVES: bool> Subs<HALVES> {
    /// The whole multiples of `d` with the least error, near the scales `free`; and that error.
    #[inline(always)]
    fn choose_steps(
        &self,
        d: f32,
        free: &Row,
        power: &Row,
        [least, most]: [f32; 2],
        [low, high]: [f32; 2],
    ) -> (f32, Row) {
        let mut near = [0f32; N];
        for i in 0..N {
            near[i] = round_even((free[i] / d).clamp(least, most));
        }
        // What rounds all to 0 leaves all.
        let (mut error, mut steps) = (*power, [0f32; N]);
        for nudge in NUDGES {
            let [mut tried, mut scale, mut inverse] = [[0f32; N]; 3];
            for i in 0..N {
                tried[i] = (near[i] + nudge).clamp(least, most);
                scale[i] = d * tried[i];
                inverse[i] = if scale[i] == 0.0 { 0.0 } else { 1.0 / scale[i] };
            }
            let [xq, qq] = self.moments(&inverse, low, high);
            for i in 0..N {
                let own = power[i] - scale[i] * (2.0 * xq[i] - scale[i] * qq[i]);
                let better = own < error[i];
                error[i] = pick(better, own, error[i]);
                steps[i] = pick(better, tried[i], steps[i]);
            }
        }
        (error[..Self::COUNT].iter().sum(), steps)
    }

    /// The scale with the least error for whole numbers and the codes that they lead to beside `d`.
    #[inline(always)]
    fn refit(&self, d: f32, steps: &Row, low: f32, high: f32) -> Option<f32> {
        let [xq, qq] = self.moments(&each(steps, |s| inverse(d * s)), low, high);
        let (mut aa, mut ax) = (0f64, 0f64);
        for i in 0..Self::COUNT {
            let a = f64::from(steps[i]);
            aa += a * a * f64::from(qq[i]);
            ax += a * f64::from(xq[i]);
        }
        (aa > 0.0).then(|| (ax / aa) as f32)
    }
}

/// Q2_K, and in `HALVES` Q4_K and Q5_K: sub-blocks with a scale and a minimum in whole multiples, up to `most`, of the block's two.
#[inline(always)]
pub fn affine<const HALVES: bool>(v: &Values<'_>, block: &mut Block, grid: Grid, most: f32) {
    let subs = Subs::<HALVES>::of(v);
    let highest = f32::from(block.highest);
    let free = subs.fits(highest);
    let mut top = [0f32; 2];
    for i in 0..N {
        top = [top[0].max(free.scale[i]), top[1].max(-free.offset[i])];
    }
    let mut best = (f32::INFINITY, [0u16; 2], [[0f32; N]; 2]);
    let shrinks = [1.0, 0.96, 0.92];
    for tried in 0..shrinks.len() + 3 {
        let units = match shrinks.get(tried) {
            Some(shrink) => top.map(|t| t / most * shrink),
            None => match subs.refit_two(best.1.map(value), &best.2, highest) {
                Some(units) => units,
                None => break,
            },
        };
        let units = units.map(bits);
        let (error, whole) = subs.choose_whole(units.map(value), &free, most, highest);
        if error < best.0 {
            best = (error, units, whole);
        } else if tried >= shrinks.len() {
            break;
        }
    }
    [block.d, block.m] = best.1;
    for i in 0..Subs::<HALVES>::COUNT {
        block.steps[i] = best.2[0][i] as i8;
        block.mins[i] = best.2[1][i] as u8;
    }
    block.derive(grid);
}

/// What is tried around the whole numbers of a free fit: of the scale and of the minimum.
const AROUND: [(f32, f32); 8] =
    [(0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (1.0, 1.0), (-1.0, -1.0), (-1.0, 1.0)];

/// Best candidates that go on by themselves.
const CHAINS: usize = 8;

impl<const HALVES: bool> Subs<HALVES> {
    /// Scales and offsets, none above 0, of codes `0..=highest` with the least error.
    #[inline(always)]
    fn fits(&self, highest: f32) -> Fits {
        let (mut low, high) = self.range();
        let mut range = [0f32; N];
        for i in 0..N {
            low[i] = if low[i] < 0.0 { low[i] } else { 0.0 };
            range[i] = high[i] - low[i];
        }
        let (steps, width) = match highest {
            h if h > 20.0 => (6usize, 0.4),
            h if h < 4.0 => (6, 0.08),
            _ => (6, 0.16),
        };
        // Values less the lowest: sums of few digits want it.
        let mut above = Subs::<HALVES> { x: self.x, w: self.w };
        for x in &mut above.x {
            for i in 0..N {
                x[i] -= low[i];
            }
        }
        let sums = above.powers();
        // Fewer steps across the range than codes clip nothing; more of them clip the ends, and which end is worth keeping
        // depends on the weights.
        let wide = steps / 2 + 1;
        let starts = (wide + 3 * steps).next_multiple_of(CHAINS);
        let mut chains = [Fits::NONE; CHAINS];
        // The best start of each chain goes on twice from the line through its codes.
        for turn in 0..starts + 2 * CHAINS {
            let chain = &mut chains[turn % CHAINS];
            let mut from = *chain;
            if turn < starts {
                let (step, place) = match turn.checked_sub(wide) {
                    None => (-(turn as f32), 0.5),
                    Some(i) => ((i / 3 % steps + 1) as f32, (i % 3) as f32 / 2.0),
                };
                for i in 0..N {
                    from.scale[i] = range[i] / (highest + width * step);
                    let free = place * (range[i] - from.scale[i] * highest);
                    from.offset[i] = if free < -low[i] { free } else { -low[i] };
                }
            }
            chain.take(&above.line(&from, &low, &sums, highest));
        }
        let mut best = Fits::NONE;
        for chain in &chains {
            best.take(chain);
        }
        let mut next = best;
        for i in 0..N {
            let found = best.error[i] < f32::INFINITY;
            next.scale[i] = pick(found, best.scale[i], range[i] / highest);
            next.offset[i] = pick(found, best.offset[i] + low[i], low[i]);
        }
        // What was found is exact for its codes only; rounding anew may find others.
        best = Fits::NONE;
        for _ in 0..5 {
            let error = self.errors(&next.scale, &next.offset, highest);
            for i in 0..N {
                next.error[i] = if next.scale[i] >= 0.0 { error[i] } else { f32::INFINITY };
            }
            best.take(&next);
            next = self.solve(&best.scale, &best.offset, highest);
        }
        best
    }

    /// The lines of least error through the codes of a rounding, `sums` being those of [`Subs::powers`].
    #[inline(always)]
    fn line(&self, from: &Fits, low: &Row, sums: &[Row; 3], highest: f32) -> Fits {
        let Fits { scale, offset, .. } = from;
        let [mut inverse, mut shift] = [[0f32; N]; 2];
        for i in 0..N {
            inverse[i] = if scale[i] > 0.0 { 1.0 / scale[i] } else { 0.0 };
            shift[i] = offset[i] * inverse[i];
        }
        let [mut q1, mut qq, mut yq] = [[0f32; N]; 3];
        for (y, w) in self.places() {
            for i in 0..N {
                let q = round_even((y[i] * inverse[i] - shift[i]).clamp(0.0, highest));
                let wq = w[i] * q;
                q1[i] += wq;
                qq[i] += wq * q;
                yq[i] += wq * y[i];
            }
        }
        let [q1, qq, yq] = Self::whole([q1, qq, yq]);
        let mut line = Fits::NONE;
        for i in 0..N {
            let [w, y, yy] = [sums[0][i], sums[1][i], sums[2][i]];
            let det = w * qq[i] - q1[i] * q1[i];
            let free = (qq[i] * y - q1[i] * yq[i]) / det;
            let offset = if free < -low[i] { free } else { -low[i] };
            let scale = (yq[i] - offset * q1[i]) / qq[i];
            let error =
                yy + scale * (scale * qq[i] + 2.0 * offset * q1[i] - 2.0 * yq[i]) + offset * (offset * w - 2.0 * y);
            let good = det > 1e-6 * w * qq[i] && scale > 0.0;
            line.error[i] = pick(good, error, f32::INFINITY);
            line.scale[i] = scale;
            line.offset[i] = offset;
        }
        line
    }

    /// `sum w`, `sum w q`, `sum w q q`, `sum w x` and `sum w x q` of a rounding.
    #[inline(always)]
    fn regress(&self, scale: &Row, offset: &Row, highest: f32) -> [Row; 5] {
        let mut turned = [0f32; N];
        for i in 0..N {
            turned[i] = inverse(scale[i]);
        }
        let [mut w1, mut wq, mut wqq, mut wx, mut wxq] = [[0f32; N]; 5];
        for (x, w) in self.places() {
            for i in 0..N {
                let q = round_even(((x[i] - offset[i]) * turned[i]).clamp(0.0, highest));
                w1[i] += w[i];
                wq[i] += w[i] * q;
                wqq[i] += w[i] * q * q;
                wx[i] += w[i] * x[i];
                wxq[i] += w[i] * x[i] * q;
            }
        }
        Self::whole([w1, wq, wqq, wx, wxq])
    }

    /// Scales and offsets with the least error for the codes of a rounding; a scale of 0 where there is none.
    #[inline(always)]
    fn solve(&self, scale: &Row, offset: &Row, highest: f32) -> Fits {
        let [w, q, qq, x, xq] = self.regress(scale, offset, highest);
        let mut line = Fits::NONE;
        for i in 0..N {
            let det = w[i] * qq[i] - q[i] * q[i];
            let free = (qq[i] * x[i] - q[i] * xq[i]) / det;
            let good = det > 1e-12 * w[i] * qq[i];
            line.offset[i] = if free < 0.0 { free } else { 0.0 };
            let scale = (xq[i] - line.offset[i] * q[i]) / qq[i];
            line.scale[i] = pick(good, scale, 0.0);
        }
        line
    }

    /// The errors of a rounding.
    #[inline(always)]
    fn errors(&self, scale: &Row, offset: &Row, highest: f32) -> Row {
        let mut turned = [0f32; N];
        for i in 0..N {
            turned[i] = if scale[i] > 0.0 { 1.0 / scale[i] } else { 0.0 };
        }
        let mut sum = [0f32; N];
        for (x, w) in self.places() {
            for i in 0..N {
                let y = x[i] - offset[i];
                let e = y - scale[i] * round_even((y * turned[i]).clamp(0.0, highest));
                sum[i] += w[i] * e * e;
            }
        }
        Self::whole([sum])[0]
    }

    /// The whole multiples of the block's two scales with the least error, near `free`; and that error.
    #[inline(always)]
    fn choose_whole(&self, [d, m]: [f32; 2], free: &Fits, most: f32, highest: f32) -> (f32, [Row; 2]) {
        let (over_d, over_m) = (if d > 0.0 { 1.0 / d } else { 0.0 }, if m > 0.0 { 1.0 / m } else { 0.0 });
        let mut near = [[0f32; N]; 2];
        for i in 0..N {
            near[0][i] = round_even((free.scale[i] * over_d).clamp(0.0, most));
            near[1][i] = round_even((-free.offset[i] * over_m).clamp(0.0, most));
        }
        let (mut error, mut best) = ([f32::INFINITY; N], [[0f32; N]; 2]);
        for (up, down) in AROUND {
            let [mut steps, mut mins, mut scale, mut offset] = [[0f32; N]; 4];
            for i in 0..N {
                steps[i] = (near[0][i] + up).clamp(0.0, most);
                mins[i] = (near[1][i] + down).clamp(0.0, most);
                (scale[i], offset[i]) = (d * steps[i], -(m * mins[i]));
            }
            let own = self.errors(&scale, &offset, highest);
            for i in 0..N {
                let better = own[i] < error[i];
                error[i] = pick(better, own[i], error[i]);
                best[0][i] = pick(better, steps[i], best[0][i]);
                best[1][i] = pick(better, mins[i], best[1][i]);
            }
        }
        (error[..Self::COUNT].iter().sum(), best)
    }

    /// The block's two scales with the least error for whole numbers and the codes that they lead to beside `units`.
    #[inline(always)]
    fn refit_two(&self, [d, m]: [f32; 2], whole: &[Row; 2], highest: f32) -> Option<[f32; 2]> {
        let [mut scale, mut offset] = [[0f32; N]; 2];
        for i in 0..N {
            (scale[i], offset[i]) = (d * whole[0][i], -(m * whole[1][i]));
        }
        let [w, q, qq, x, xq] = self.regress(&scale, &offset, highest);
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0f64, 0f64, 0f64, 0f64, 0f64);
        for i in 0..Self::COUNT {
            let (a, b) = (f64::from(whole[0][i]), -f64::from(whole[1][i]));
            aa += a * a * f64::from(qq[i]);
            ab += a * b * f64::from(q[i]);
            bb += b * b * f64::from(w[i]);
            ax += a * f64::from(xq[i]);
            bx += b * f64::from(x[i]);
        }
        let det = aa * bb - ab * ab;
        if det > 1e-9 * aa * bb {
            let (d, m) = ((ax * bb - bx * ab) / det, (bx * aa - ax * ab) / det);
            return (d > 0.0 && m >= 0.0).then_some([d as f32, m as f32]);
        }
        (aa > 0.0 && ax > 0.0).then_some([(ax / aa) as f32, 0.0])
    }
}
