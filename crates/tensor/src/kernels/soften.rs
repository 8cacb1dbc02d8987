//! The softmax of one chunk of scores, written once in the words of [`Lanes`].

use super::{
    lanes::Lanes,
    once::{fold, soft_cap},
};

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

/// A query on its way over the chunks of its text.
#[derive(Clone, Copy, Debug)]
pub struct Softening {
    /// First position of the chunk that it sees.
    pub from: usize,
    /// The position after the last one that it sees; `from` where it sees none.
    pub to: usize,
    /// Highest score so far.
    pub highest: f32,
    /// Sum of the exponentials so far, relative to the highest.
    pub sum: f32,
    /// What the sums of earlier chunks are to be multiplied with, since the highest score has risen.
    pub shrink: f32,
}

/// See [`super::FloatTiles::soften`]. Each pass goes over all queries, so that the folds of one hide those of another.
///
/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
pub(crate) unsafe fn soften<V: Lanes>(
    scores: &mut [f32],
    width: usize,
    cap: Option<f32>,
    queries: &mut [Softening],
    highest: &mut [f32],
) {
    assert!(queries.len() <= width && scores.len() >= width * CHUNK && highest.len() >= queries.len());
    if let Some(cap) = cap {
        soft_cap(scores, cap);
    }
    let panel = width * 16;
    let mut lanes = [0f32; 16];
    // SAFETY: windows of a chunk that begin at 0 to `2 * CHUNK`, and sixteen lanes at a time of the scores.
    unsafe {
        for (i, q) in queries.iter().enumerate() {
            let p = scores.as_mut_ptr().add(i * 16);
            let mut most = V::splat((&raw const q.highest).cast());
            let (from, to) = (AWAY.as_ptr().add(CHUNK - q.from), AWAY.as_ptr().add(2 * CHUNK - q.to));
            let whole = q.to - q.from == CHUNK;
            for at in 0..CHUNK / 16 {
                let mut score = V::load(p.add(at * panel));
                if !whole {
                    score = V::add(V::add(score, V::load(from.add(at * 16))), V::load(to.add(at * 16)));
                    V::store(p.add(at * panel), score);
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
            highest[i] = lanes[0];
        }
        for (q, most) in queries.iter_mut().zip(highest.iter()) {
            if q.to > q.from {
                let less = (q.highest - most).max(-87.0);
                let e = exp::<V>(V::splat((&raw const less).cast()));
                V::store(lanes.as_mut_ptr(), e);
                // Nothing was there before the first chunk.
                q.shrink = if q.highest == f32::NEG_INFINITY { 0.0 } else { lanes[0] };
                q.highest = *most;
            } else {
                q.shrink = 1.0;
            }
        }
        for (i, q) in queries.iter_mut().enumerate() {
            let p = scores.as_mut_ptr().add(i * 16);
            let less = if q.to > q.from { -q.highest } else { 0.0 };
            let (from, to) = (KEPT.as_ptr().add(CHUNK - q.from), KEPT.as_ptr().add(2 * CHUNK - q.to));
            let whole = q.to - q.from == CHUNK;
            let mut sum = V::zero();
            for at in 0..CHUNK / 16 {
                let mut e = exp::<V>(V::add(V::load(p.add(at * panel)), V::splat((&raw const less).cast())));
                if !whole {
                    e = V::mul(e, V::mul(V::load(from.add(at * 16)), V::load(to.add(at * 16))));
                }
                V::store(p.add(at * panel), e);
                sum = V::add(sum, e);
            }
            V::store(lanes.as_mut_ptr(), sum);
            q.sum = q.sum * q.shrink + fold(lanes);
        }
    }
}

/// `exp(x)` for `x <= 0`, as [`super::once::exp`] with its products and sums fused where the instruction set can.
///
/// # Safety
/// The processor has the instructions of `V`.
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
