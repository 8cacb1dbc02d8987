//! Candidates side by side: a fit tries many scales on the same values, eight at a time, one in each lane, so that sums need
//! no adding up across lanes.

use super::{block::round_even, fit::Values};

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

/// Of each of eight scales and offsets the error of its rounding to whole numbers from 0 to `highest`.
#[inline(always)]
pub fn errors(v: &Values<'_>, scale: &Lanes, offset: &Lanes, highest: f32) -> Lanes {
    weighed!(errors_of(v, scale, offset, highest))
}

#[inline(always)]
fn errors_of<const ALIKE: bool>(v: &Values<'_>, scale: &Lanes, offset: &Lanes, highest: f32) -> Lanes {
    let inverse = lanes(|i| if scale[i] > 0.0 { 1.0 / scale[i] } else { 0.0 });
    let mut sum = [0f32; LANES];
    for (x, w) in v.x.iter().zip(v.w) {
        for i in 0..LANES {
            let y = x - offset[i];
            let e = y - scale[i] * round_even((y * inverse[i]).clamp(0.0, highest));
            sum[i] += if ALIKE { e * e } else { w * e * e };
        }
    }
    sum
}
