//! Products of packed floats with floats, written once in the words of [`Lanes`]: see [`super::tile`].

use super::{
    holes::sparse_floats,
    lanes::Lanes,
    tile::{BUSY, Tile, read_ahead},
};
use crate::packed::form::{Floats, Form, LANES};
use std::mem::MaybeUninit;

/// Runs a tile whose form is floats, `R` panels at a time: an input that is read serves all of them.
///
/// # Safety
/// The pointers hold what [`Tile`] says for `T` tokens.
#[inline(always)]
pub(crate) unsafe fn floats<V: Lanes, const T: usize, const R: usize>(tile: &Tile) {
    if let Form::Sparse(floats, _) = tile.form {
        for panel in 0..tile.panels {
            // SAFETY: the caller's tile holds so many panels.
            unsafe {
                match floats {
                    Floats::F32 => sparse_floats::<V, T, 4, false>(tile, panel),
                    Floats::F16 => sparse_floats::<V, T, 2, false>(tile, panel),
                    Floats::Bf16 => sparse_floats::<V, T, 2, true>(tile, panel),
                }
            }
        }
        return;
    }
    let together = tile.panels / R * R;
    for panel in (0..together).step_by(R) {
        // SAFETY: the caller's tile holds so many panels.
        unsafe { float_panels::<V, T, R>(tile, panel) }
    }
    for panel in together..tile.panels {
        // SAFETY: as above.
        unsafe { float_panels::<V, T, 1>(tile, panel) }
    }
}

#[inline(always)]
unsafe fn float_panels<V: Lanes, const T: usize, const R: usize>(tile: &Tile, panel: usize) {
    // SAFETY: the caller's tile holds the panels, inputs and sums.
    unsafe {
        let w: [*const u8; R] = std::array::from_fn(|r| tile.weights.add((panel + r) * tile.panel_bytes));
        let [panel_step, token_step] = tile.steps;
        let out = tile.out.add(panel * panel_step);
        let mut acc = [[V::zero(); T]; R];
        if tile.add {
            for r in 0..R {
                for t in 0..T {
                    acc[r][t] = V::load(out.add(r * panel_step + t * token_step));
                }
            }
        }
        let x = tile.inputs;
        match tile.form {
            Form::Bf16 if !V::BRAIN => widened::<V, T, R>(tile.length, w, x, &mut acc),
            Form::Bf16 => {
                for k in 0..tile.length {
                    let mut weights = [V::bytes(w[0].add(k * 64)); R];
                    for r in 1..R {
                        weights[r] = V::bytes(w[r].add(k * 64));
                    }
                    for t in 0..T {
                        let x = x.add((k * T + t) * 4);
                        for r in 0..R {
                            acc[r][t] = V::bf16_dot(acc[r][t], weights[r], x);
                        }
                    }
                }
            }
            form => {
                let half = form == Form::F16;
                for k in 0..tile.length {
                    let mut weights = [V::zero(); R];
                    for r in 0..R {
                        weights[r] = if half { V::halves(w[r].add(k * 32)) } else { V::load(w[r].add(k * 64).cast()) };
                    }
                    for t in 0..T {
                        let x = V::splat(x.add((k * T + t) * 4));
                        for r in 0..R {
                            acc[r][t] = V::fma(x, weights[r], acc[r][t]);
                        }
                    }
                }
            }
        }
        for r in 0..R {
            for t in 0..T {
                V::store(out.add(r * panel_step + t * token_step), acc[r][t]);
            }
        }
    }
}

/// Steps whose inputs [`widened`] widens at a time: they stay in the first-level cache.
const WIDENED: usize = 64;

/// Adds the products of brain floats where no instruction multiplies them: inputs are widened sixteen words at once, not each
/// for every panel and token.
///
/// # Safety
/// As of [`float_panels`], for so many steps.
#[inline(always)]
unsafe fn widened<V: Lanes, const T: usize, const R: usize>(
    length: usize,
    w: [*const u8; R],
    x: *const u8,
    acc: &mut [[V::Floats; T]; R],
) {
    let mut inputs = [[[MaybeUninit::<f32>::uninit(); T]; WIDENED]; 2];
    let first = inputs[0].as_mut_ptr().cast::<f32>();
    let second = inputs[1].as_mut_ptr().cast::<f32>();
    for from in (0..length).step_by(WIDENED) {
        let steps = WIDENED.min(length - from);
        // SAFETY: the caller's steps, of which `first` and `second` have room for so many; what is read of them was written.
        unsafe {
            let (words, count) = (x.cast::<u32>().add(from * T), steps * T);
            for at in (0..count / LANES * LANES).step_by(LANES) {
                let [low, high] = V::brain_pair(V::bytes(words.add(at).cast()));
                V::store(first.add(at), low);
                V::store(second.add(at), high);
            }
            for at in count / LANES * LANES..count {
                let word = words.add(at).read_unaligned();
                first.add(at).write(f32::from_bits(word << 16));
                second.add(at).write(f32::from_bits(word & 0xffff_0000));
            }
            for k in 0..steps {
                let mut weights = [[V::zero(); 2]; R];
                for r in 0..R {
                    let at = w[r].add((from + k) * 64);
                    if T >= BUSY {
                        read_ahead::<V, 1>([at], 64);
                    }
                    weights[r] = V::brain_pair(V::bytes(at));
                }
                for t in 0..T {
                    let (low, high) = (V::splat(first.add(k * T + t).cast()), V::splat(second.add(k * T + t).cast()));
                    for r in 0..R {
                        acc[r][t] = V::fma(weights[r][0], low, V::fma(weights[r][1], high, acc[r][t]));
                    }
                }
            }
        }
    }
}
