//! Fitting blocks of sub-blocks whose levels are those of a table or a codebook: each of them is fitted freely, then the block's
//! own scale and the whole numbers of each sub-block are chosen by their true error. Even levels are [`super::even_subs`]'s.

use super::{
    Grid, Table,
    abreast::Rungs,
    block::{Block, round_even},
    codebook::Codebook,
    fit::{Values, bits, table_moments, table_scale, value},
    pack::halved,
};

/// One sub-block of a block.
#[inline(always)]
fn part<'a>(v: &Values<'a>, s: usize, len: usize) -> Values<'a> {
    Values { x: &v.x[s * len..(s + 1) * len], w: &v.w[s * len..(s + 1) * len], alike: v.alike }
}

/// What the whole numbers of sub-blocks may be.
#[derive(Clone, Copy)]
pub enum Steps {
    /// From the one to the other.
    Whole(f32, f32),
    /// Odd numbers from 1 to this.
    Odd(f32),
}

impl Steps {
    /// The nearest one to `x` that is `nudge` away.
    #[inline(always)]
    fn near(self, x: f32, nudge: f32) -> f32 {
        match self {
            Steps::Whole(least, most) => (round_even(x.clamp(least, most)) + nudge).clamp(least, most),
            Steps::Odd(most) => (2.0 * (round_even((x.clamp(1.0, most) - 1.0) / 2.0) + nudge) + 1.0).clamp(1.0, most),
        }
    }

    /// Those that the largest scale may become.
    #[inline(always)]
    fn ends(self) -> impl Iterator<Item = f32> {
        let (first, second) = match self {
            Steps::Whole(least, most) => (least, Some(most)),
            Steps::Odd(most) => (most, None),
        };
        std::iter::once(first).chain(second)
    }
}

/// What a sub-block is rounded to, in units of its scale.
#[derive(Clone, Copy)]
enum Levels<'a> {
    /// Those of a table.
    Table(Table, Option<&'a Rungs>),
    /// Those of a codebook; all of a sub-block may have to be shifted alike.
    Book(&'static Codebook, bool),
}

impl Levels<'_> {
    /// The shifts that are to be tried.
    #[inline(always)]
    fn shifts(self) -> &'static [Option<bool>] {
        match self {
            Levels::Book(_, true) => &[Some(false), Some(true)],
            _ => &[None],
        }
    }

    /// Sums of one rounding: `sum w x q` and `sum w q q`.
    #[inline(always)]
    fn moments(self, v: &Values<'_>, inverse: f32, shift: Option<bool>) -> (f32, f32) {
        match self {
            Levels::Table(table, rungs) => table_moments(v, inverse, table, rungs),
            Levels::Book(book, _) => book.moments(v.x, v.w, inverse, shift),
        }
    }

    /// The scale with the least error.
    #[inline(always)]
    fn scale(self, v: &Values<'_>) -> f32 {
        match self {
            Levels::Table(table, rungs) => table_scale(v, table, rungs),
            Levels::Book(book, _) => self.book_scale(v, book),
        }
    }

    /// The scale of a codebook with the least error; it is positive.
    #[inline(always)]
    fn book_scale(self, v: &Values<'_>, book: &Codebook) -> f32 {
        let extreme = v.x.iter().fold(0f32, |m, x| m.max(x.abs()));
        if extreme == 0.0 {
            return 0.0;
        }
        let mut best = (0f32, extreme / book.reach());
        // Fewer levels leave more values beyond the largest one.
        let (first, width) = if book.is_shifted() { (0.8, 0.13) } else { (0.7, 0.06) };
        for shift in self.shifts() {
            for i in 0..10 {
                let mut inverse = (first + width * i as f32) * book.reach() / extreme;
                for _ in 0..2 {
                    let (xq, qq) = self.moments(v, inverse, *shift);
                    if qq <= 0.0 || xq <= 0.0 {
                        break;
                    }
                    if xq * xq / qq <= best.0 {
                        break;
                    }
                    best = (xq * xq / qq, xq / qq);
                    inverse = qq / xq;
                }
            }
        }
        best.1
    }
}

/// IQ4_XS and the types with codebooks: sub-blocks whose scales are whole multiples of the block's.
#[inline(always)]
pub fn stepped_subs(v: &Values<'_>, block: &mut Block, grid: Grid, steps: Steps) {
    let len = block.sub_len as usize;
    let rungs = block.table.and_then(Rungs::of);
    let levels = match (block.book, block.table) {
        (Some(book), _) => Levels::Book(book, block.shifts_sub_blocks()),
        (None, Some(table)) => Levels::Table(table, rungs.as_ref()),
        (None, None) => return,
    };
    let subs = 256 / len;
    // Of each sub-block its scale alone, and its weighed squares.
    let mut free = [(0f32, 0f32); 16];
    for s in 0..subs {
        let v = part(v, s, len);
        free[s] = (levels.scale(&v), v.x.iter().zip(v.w).map(|(x, w)| w * x * x).sum());
    }
    let extreme = free.iter().fold(0f32, |m, (f, _)| if f.abs() > m.abs() { *f } else { m });
    if extreme == 0.0 {
        block.steps = [steps.near(0.0, 0.0) as i8; 16];
        return;
    }
    // What is stored is that many times a step.
    let stored = |d: f32| bits(d / halved(1.0, grid.halvings()));
    let step = |bits: u16| halved(value(bits), grid.halvings());
    let mut best = (f32::INFINITY, *block);
    for end in steps.ends() {
        for shrink in [1.0, 0.97] {
            let d = stored(extreme / end * shrink);
            if step(d) != 0.0 {
                let tried = stepped_attempt(v, block, grid, &free, (steps, levels), d, step(d));
                if tried.0 < best.0 {
                    best = tried;
                }
            }
        }
    }
    // Rounding to a codebook costs many times what rounding to levels does.
    let rounds = if matches!(levels, Levels::Book(..)) { 1 } else { 3 };
    for _ in 0..rounds {
        let Some(d) = refit_step(v, &best.1, levels).map(stored).filter(|d| step(*d) != 0.0) else { break };
        let tried = stepped_attempt(v, block, grid, &free, (steps, levels), d, step(d));
        if tried.0 >= best.0 {
            break;
        }
        best = tried;
    }
    *block = best.1;
}

/// The block whose own scale is stored as `stored` and stands for `d`, and its error.
#[inline(always)]
fn stepped_attempt(
    v: &Values<'_>,
    block: &Block,
    grid: Grid,
    free: &[(f32, f32); 16],
    (steps, levels): (Steps, Levels<'_>),
    stored: u16,
    d: f32,
) -> (f32, Block) {
    let len = block.sub_len as usize;
    let mut trial = *block;
    trial.d = stored;
    let mut error = 0.0;
    for s in 0..256 / len {
        error += choose_step(&part(v, s, len), free[s], d, steps, levels, &mut trial, s);
    }
    trial.derive(grid);
    (error, trial)
}

/// The whole number of one sub-block with the least error; returns the error.
#[inline(always)]
fn choose_step(
    v: &Values<'_>,
    (free, power): (f32, f32),
    d: f32,
    steps: Steps,
    levels: Levels<'_>,
    block: &mut Block,
    s: usize,
) -> f32 {
    let mut best = match steps {
        Steps::Whole(..) => (power, 0.0, 0),
        Steps::Odd(_) => (f32::INFINITY, 1.0, 0),
    };
    for nudge in [-1.0, 0.0, 1.0] {
        let step = steps.near(free / d, nudge);
        let scale = d * step;
        if scale == 0.0 {
            continue;
        }
        for shift in levels.shifts() {
            let (xq, qq) = levels.moments(v, 1.0 / scale, *shift);
            let error = power - scale * (2.0 * xq - scale * qq);
            if error < best.0 {
                best = (error, step, u8::from(*shift == Some(true)));
            }
        }
    }
    block.steps[s] = best.1 as i8;
    if matches!(levels, Levels::Book(..)) {
        block.mins[s] = best.2;
    }
    best.0
}

/// The scale with the least error for the whole numbers of a block and the codes that they lead to.
#[inline(always)]
fn refit_step(v: &Values<'_>, block: &Block, levels: Levels<'_>) -> Option<f32> {
    let len = block.sub_len as usize;
    let (mut aa, mut ax) = (0f64, 0f64);
    if let Levels::Table(..) = levels {
        for s in 0..v.x.len() / len {
            let (scale, a) = (block.scale[s], f64::from(block.steps[s]));
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            let (xq, qq) = levels.moments(&part(v, s, len), inverse, None);
            aa += a * a * f64::from(qq);
            ax += a * f64::from(xq);
        }
        return (aa > 0.0).then(|| (ax / aa) as f32);
    }
    let mut codes = [0u8; 256];
    block.round_here(v.x, Some(v.w), &mut codes[..v.x.len()]);
    for (i, (x, w)) in v.x.iter().zip(v.w).enumerate() {
        let level = block.table.map_or(0.0, |table| f64::from(table.levels()[usize::from(codes[i])]));
        let a = f64::from(block.steps[i / len]) * level;
        aa += f64::from(*w) * a * a;
        ax += f64::from(*w) * a * f64::from(*x);
    }
    (aa > 0.0).then(|| (ax / aa) as f32)
}
