//! Candidates side by side: a fit tries many scales on the same values, eight at a time, one in each lane, so that sums need
//! no adding up across lanes.

use super::{Table, block::round_even, fit::Values};

/// Candidates that are tried at once.
pub const LANES: usize = 8;

/// A number of each candidate.
pub type Lanes = [f32; LANES];

/// A number of each candidate by its place.
#[inline(always)]
pub fn lanes(mut f: impl FnMut(usize) -> f32) -> Lanes {
    // A loop, since `array::from_fn` is a call of its own, for no instruction set.
    let mut out = [0f32; LANES];
    for (i, out) in out.iter_mut().enumerate() {
        *out = f(i);
    }
    out
}

/// The one or the other, without a branch, which would keep lanes from running side by side.
#[inline(always)]
pub fn pick(first: bool, a: f32, b: f32) -> f32 {
    let mask = 0u32.wrapping_sub(u32::from(first));
    f32::from_bits(a.to_bits() & mask | b.to_bits() & !mask)
}

/// Scales and offsets side by side, and the error that each leaves.
#[derive(Clone, Copy)]
pub struct Fits<const N: usize> {
    pub error: [f32; N],
    pub scale: [f32; N],
    pub offset: [f32; N],
}

impl<const N: usize> Fits<N> {
    pub const NONE: Fits<N> = Fits { error: [f32::INFINITY; N], scale: [0.0; N], offset: [0.0; N] };

    /// Takes of each lane what is better.
    #[inline(always)]
    pub fn take(&mut self, other: &Fits<N>) {
        for i in 0..N {
            let better = other.error[i] < self.error[i];
            self.error[i] = pick(better, other.error[i], self.error[i]);
            self.scale[i] = pick(better, other.scale[i], self.scale[i]);
            self.offset[i] = pick(better, other.offset[i], self.offset[i]);
        }
    }
}

/// The lowest and the highest of some values, or the highest and the lowest float where there is none.
#[inline(always)]
pub fn range(x: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::MAX; LANES], [f32::MIN; LANES]);
    let (eights, rest) = x.as_chunks::<LANES>();
    for x in eights {
        for i in 0..LANES {
            low[i] = if x[i] < low[i] { x[i] } else { low[i] };
            high[i] = if x[i] > high[i] { x[i] } else { high[i] };
        }
    }
    for x in rest {
        low[0] = if *x < low[0] { *x } else { low[0] };
        high[0] = if *x > high[0] { *x } else { high[0] };
    }
    let least = |a: f32, b: &f32| if *b < a { *b } else { a };
    let most = |a: f32, b: &f32| if *b > a { *b } else { a };
    (low.iter().fold(low[0], least), high.iter().fold(high[0], most))
}

/// The value that is farthest from zero.
#[inline(always)]
pub fn extreme(x: &[f32]) -> f32 {
    let (low, high) = range(x);
    match x.is_empty() {
        true => 0.0,
        false if -low > high => low,
        false => high,
    }
}

/// Calls a function for values that all count alike, or that have weights: multiplying by one is not free.
macro_rules! weighed {
    ($name:ident($v:expr $(, $arg:expr)*)) => {
        if $v.alike { $name::<true>($v $(, $arg)*) } else { $name::<false>($v $(, $arg)*) }
    };
}

/// Of each of eight scales the sums of its rounding: `sum w x q` and `sum w q q`, `q` being whole numbers of it from `low` to
/// `high`.
#[inline(always)]
pub fn moments(v: &Values<'_>, inverse: &Lanes, low: f32, high: f32) -> (Lanes, Lanes) {
    weighed!(moments_of(v, inverse, low, high))
}

#[inline(always)]
fn moments_of<const ALIKE: bool>(v: &Values<'_>, inverse: &Lanes, low: f32, high: f32) -> (Lanes, Lanes) {
    let (mut xq, mut qq) = ([0f32; LANES], [0f32; LANES]);
    for (x, w) in v.x.iter().zip(v.w) {
        for i in 0..LANES {
            let q = round_even((x * inverse[i]).clamp(low, high));
            let wq = if ALIKE { q } else { w * q };
            xq[i] += wq * x;
            qq[i] += wq * q;
        }
    }
    (xq, qq)
}

/// Of each of eight scales and offsets the sums of its rounding: `sum w q`, `sum w q q` and `sum w y q`, `y` being the values
/// less `low`, and `q` whole numbers from 0 to `highest`.
#[inline(always)]
pub fn sums(v: &Values<'_>, low: f32, scale: &Lanes, offset: &Lanes, highest: f32) -> [Lanes; 3] {
    weighed!(sums_of(v, low, scale, offset, highest))
}

#[inline(always)]
fn sums_of<const ALIKE: bool>(v: &Values<'_>, low: f32, scale: &Lanes, offset: &Lanes, highest: f32) -> [Lanes; 3] {
    let inverse = lanes(|i| if scale[i] > 0.0 { 1.0 / scale[i] } else { 0.0 });
    let shift = lanes(|i| offset[i] * inverse[i]);
    let [mut q1, mut qq, mut yq] = [[0f32; LANES]; 3];
    for (x, w) in v.x.iter().zip(v.w) {
        let y = x - low;
        for i in 0..LANES {
            let q = round_even((y * inverse[i] - shift[i]).clamp(0.0, highest));
            let wq = if ALIKE { q } else { w * q };
            q1[i] += wq;
            qq[i] += wq * q;
            yq[i] += wq * y;
        }
    }
    [q1, qq, yq]
}

/// The levels of a table, for rounding in lanes: the level of each step, and from where on it is the nearest.
pub struct Rungs {
    /// The first level is that from everywhere on.
    from: [f32; 16],
    levels: [f32; 16],
    count: usize,
    /// Are there the same levels with the other sign?
    signed: bool,
}

impl Rungs {
    /// Those of a table of up to sixteen levels.
    #[inline(always)]
    pub fn of(table: Table) -> Option<Rungs> {
        let (rising, signed) = (table.rising(), table.is_signed());
        if rising.len() > 16 {
            return None;
        }
        let mut rungs = Rungs { from: [f32::NEG_INFINITY; 16], levels: [0.0; 16], count: rising.len(), signed };
        for (i, level) in rising.iter().enumerate() {
            rungs.levels[i] = *level;
            if i > 0 {
                rungs.from[i] = 0.5 * (rising[i - 1] + level);
            }
        }
        Some(rungs)
    }

    /// The nearest level of each.
    #[inline(always)]
    fn round(&self, y: &Lanes) -> Lanes {
        let mut size = *y;
        if self.signed {
            for i in 0..LANES {
                size[i] = size[i].abs();
            }
        }
        let mut q = [self.levels[0]; LANES];
        for (from, level) in self.from[..self.count].iter().zip(&self.levels).skip(1) {
            for i in 0..LANES {
                q[i] = pick(size[i] >= *from, *level, q[i]);
            }
        }
        if self.signed {
            for i in 0..LANES {
                q[i] = q[i].copysign(y[i]);
            }
        }
        q
    }

    /// Of each of eight scales the sums of its rounding: `sum w x q` and `sum w q q`.
    #[inline(always)]
    pub fn moments(&self, v: &Values<'_>, inverse: &Lanes) -> (Lanes, Lanes) {
        let (mut xq, mut qq) = ([0f32; LANES], [0f32; LANES]);
        for (x, w) in v.x.iter().zip(v.w) {
            let q = self.round(&lanes(|i| x * inverse[i]));
            for i in 0..LANES {
                xq[i] += w * q[i] * x;
                qq[i] += w * q[i] * q[i];
            }
        }
        (xq, qq)
    }

    /// The same of one scale, eight values at a time.
    #[inline(always)]
    pub fn moments_of_one(&self, v: &Values<'_>, inverse: f32) -> (f32, f32) {
        let (mut xq, mut qq) = ([0f32; LANES], [0f32; LANES]);
        for (xs, ws) in v.x.chunks(LANES).zip(v.w.chunks(LANES)) {
            let (mut x, mut w) = ([0f32; LANES], [0f32; LANES]);
            x[..xs.len()].copy_from_slice(xs);
            w[..ws.len()].copy_from_slice(ws);
            let q = self.round(&lanes(|i| x[i] * inverse));
            for i in 0..LANES {
                xq[i] += w[i] * q[i] * x[i];
                qq[i] += w[i] * q[i] * q[i];
            }
        }
        (xq.iter().sum(), qq.iter().sum())
    }
}
