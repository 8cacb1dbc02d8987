//! The softmax of one chunk of scores, written once in the words of [`Lanes`].

use super::{
    lanes::Lanes,
    once::{fold, soft_cap},
};
use std::ops::Range;

/// Positions of a chunk.
const CHUNK: usize = 64;

/// A window over these, moved to where the seen positions begin or end, takes the others away: from the scores ...
static AWAY: [f32; 3 * CHUNK] = window(f32::NEG_INFINITY, 0.0);
/// ... and from their exponentials.
static KEPT: [f32; 3 * CHUNK] = window(0.0, 1.0);

const fn window(outside: f32, inside: f32) -> [f32; 3 * CHUNK] {
    let mut values = [outside; 3 * CHUNK];
    let mut i = CHUNK;
    while i < 2 * CHUNK {
        values[i] = inside;
        i += 1;
    }
    values
}

/// See [`super::Kernels::soften`].
///
/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
pub(crate) unsafe fn soften<V: Lanes>(
    scores: &mut [f32; CHUNK],
    seen: Range<usize>,
    cap: Option<f32>,
    highest: f32,
) -> (f32, f32) {
    if let Some(cap) = cap {
        soft_cap(scores, cap);
    }
    let whole = seen == (0..CHUNK);
    let (from, to) = (CHUNK - seen.start.min(CHUNK), 2 * CHUNK - seen.end.min(CHUNK));
    let mut lanes = [0f32; 16];
    // SAFETY: windows of a chunk that begin at 0 to `2 * CHUNK`, and sixteen lanes at a time of a chunk.
    unsafe {
        let mut most = V::splat((&raw const highest).cast());
        for at in (0..CHUNK).step_by(16) {
            let p = scores.as_mut_ptr().add(at);
            let mut score = V::load(p);
            if !whole {
                score = V::add(score, V::load(AWAY.as_ptr().add(from + at)));
                score = V::add(score, V::load(AWAY.as_ptr().add(to + at)));
                V::store(p, score);
            }
            most = V::max(score, most);
        }
        V::store(lanes.as_mut_ptr(), most);
        let mut half = 8;
        while half > 0 {
            for i in 0..half {
                lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
            }
            half /= 2;
        }
        let most = lanes[0];
        let less = -most;
        let mut sum = V::zero();
        for at in (0..CHUNK).step_by(16) {
            let p = scores.as_mut_ptr().add(at);
            let mut e = exp::<V>(V::add(V::load(p), V::splat((&raw const less).cast())));
            if !whole {
                e = V::mul(e, V::mul(V::load(KEPT.as_ptr().add(from + at)), V::load(KEPT.as_ptr().add(to + at))));
            }
            V::store(p, e);
            sum = V::add(sum, e);
        }
        V::store(lanes.as_mut_ptr(), sum);
        (most, fold(lanes))
    }
}

/// `exp(x)` for `x <= 0`, as [`super::once::exp`] with its products and sums fused where the instruction set can.
#[inline(always)]
unsafe fn exp<V: Lanes>(x: V::Floats) -> V::Floats {
    // SAFETY: constants are read from the stack.
    unsafe {
        let constant = |v: f32| v;
        macro_rules! all {
            ($v:expr) => {{
                let v: f32 = constant($v);
                V::splat((&raw const v).cast())
            }};
        }
        let x = V::max(x, all!(-87.0));
        let magic = all!(12_582_912.0);
        let n = V::add(V::fma(x, all!(std::f32::consts::LOG2_E), magic), all!(-12_582_912.0));
        let r = V::fma(n, all!(-0.693_359_4), x);
        let r = V::fma(n, all!(2.121_944_4e-4), r);
        let mut p = all!(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
            p = V::fma(p, r, all!(c));
        }
        let y = V::add(V::fma(V::mul(p, r), r, r), all!(1.0));
        V::mul(y, V::power(n))
    }
}
