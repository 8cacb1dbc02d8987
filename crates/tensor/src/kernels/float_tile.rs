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
        if T >= BUSY {
            // The next tile's sums lie behind these.
            for r in 0..R {
                for t in T..2 * T {
                    V::prefetch(out.wrapping_add(r * panel_step + t * token_step).cast());
                }
            }
        }
        let x = tile.inputs;
        match tile.form {
            Form::Bf16 if !V::BRAIN => widened::<V, T, R>(tile.length, w, [x, tile.next], &mut acc),
            Form::Bf16 => {
                for k in 0..tile.length {
                    ahead::<V, T, R>(w, k * 64, tile.next, k);
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
            Form::F16 => multiply::<V, T, R, true>(tile.length, w, [x, tile.next], &mut acc),
            _ => multiply::<V, T, R, false>(tile.length, w, [x, tile.next], &mut acc),
        }
        for r in 0..R {
            for t in 0..T {
                V::store(out.add(r * panel_step + t * token_step), acc[r][t]);
            }
        }
    }
}

/// Adds the products of floats, or of weights of 16-bit floats.
///
/// # Safety
/// As of [`float_panels`], for so many steps.
#[inline(always)]
unsafe fn multiply<V: Lanes, const T: usize, const R: usize, const HALF: bool>(
    length: usize,
    w: [*const u8; R],
    [x, next]: [*const u8; 2],
    acc: &mut [[V::Floats; T]; R],
) {
    let step = if HALF { 2 * LANES } else { 4 * LANES };
    for k in 0..length {
        // SAFETY: the caller's panels and inputs have so many steps.
        unsafe {
            ahead::<V, T, R>(w, k * step, next, k);
            let mut weights = [V::zero(); R];
            for r in 0..R {
                let at = w[r].add(k * step);
                weights[r] = if HALF { V::halves(at) } else { V::load(at.cast()) };
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

/// In step `k`, whose weights lie `at` bytes on, announces weights of later steps and the next tile's inputs of this one. Few tokens
/// leave it to the processor (see [`BUSY`]).
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn ahead<V: Lanes, const T: usize, const R: usize>(w: [*const u8; R], at: usize, next: *const u8, k: usize) {
    if T >= BUSY {
        // SAFETY: a line that is only announced may lie anywhere.
        unsafe {
            read_ahead::<V, R>(w.map(|w| w.wrapping_add(at)), 1);
            V::prefetch_later(next.wrapping_add(k * T * 4));
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
    [x, next]: [*const u8; 2],
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
                ahead::<V, T, R>(w, (from + k) * 64, next, from + k);
                for r in 0..R {
                    weights[r] = V::brain_pair(V::bytes(w[r].add((from + k) * 64)));
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
