//! Moments of optimizers in a byte each (arXiv 2110.02861): blocks of 256 share their largest size, and a code is a decade
//! below it with an even division of that decade, so that small numbers keep two digits as large ones do.

use super::{AdamW, Lion};
use crate::{
    kernels::kernels,
    threads::{self, Shared},
};
use std::sync::OnceLock;

/// Numbers that share a scale.
pub const BLOCK: usize = 256;
/// Blocks of a task.
const RUN: usize = 64;
/// Decades below the largest number.
const DECADES: usize = 7;

/// Numbers in a byte each.
#[derive(Clone, Debug, PartialEq)]
pub struct EightBit {
    codes: Vec<u8>,
    scales: Vec<f32>,
    signed: bool,
}

impl EightBit {
    /// So many zeros; numbers that are never negative need no sign, and have twice as many levels.
    pub fn zeros(len: usize, signed: bool) -> EightBit {
        EightBit { codes: vec![0; len], scales: vec![0.0; len.div_ceil(BLOCK)], signed }
    }

    /// The codes, and what multiplies those of each block.
    pub fn parts(&self) -> (&[u8], &[f32]) {
        (&self.codes, &self.scales)
    }

    /// The same to be written.
    pub fn parts_mut(&mut self) -> (&mut [u8], &mut [f32]) {
        (&mut self.codes, &mut self.scales)
    }
}

/// What codes stand for, relative to the largest of the block.
fn levels(signed: bool) -> &'static [f32; 256] {
    static LEVELS: [OnceLock<[f32; 256]>; 2] = [OnceLock::new(), OnceLock::new()];
    LEVELS[usize::from(signed)].get_or_init(|| {
        let mut levels = [0f32; 256];
        for decade in 0..DECADES {
            let count = divisions(decade, signed);
            for i in 0..count {
                let middle = 0.1 + 0.9 * (i as f64 + 0.5) / count as f64;
                let level = (middle * 10f64.powi(decade as i32 + 1 - DECADES as i32)) as f32;
                let code = first_code(decade, signed) + i;
                levels[code] = level;
                if signed {
                    levels[128 + code] = -level;
                }
            }
        }
        // The largest itself: of signed numbers, the code of a negative zero.
        levels[if signed { 128 } else { 255 }] = 1.0;
        levels
    })
}

/// Levels of a decade.
const fn divisions(decade: usize, signed: bool) -> usize {
    1 << (decade + if signed { 0 } else { 1 })
}

/// The code of a decade's first level; those of lower decades, and zero, come before.
const fn first_code(decade: usize, signed: bool) -> usize {
    divisions(decade, signed) - if signed { 0 } else { 1 }
}

/// The code of the nearest level to `x`, from -1 to 1.
fn code(x: f32, signed: bool) -> u8 {
    const POWERS: [f32; DECADES] = [1e6, 1e5, 1e4, 1e3, 1e2, 1e1, 1.0];
    let size = x.abs();
    let mut decade = 0;
    for power in &POWERS[..DECADES - 1] {
        decade += usize::from(size * power >= 1.0);
    }
    let count = divisions(decade, signed);
    let part = (size * POWERS[decade] - 0.1) * (count as f32 / 0.9);
    let first = first_code(decade, signed);
    let mut magnitude = first + (part.max(0.0) as usize).min(count - 1);
    let levels = levels(signed);
    // Where two decades meet, the nearest may be the last level of the one below.
    if magnitude == first && decade > 0 && size - levels[first - 1] < levels[first] - size {
        magnitude -= 1;
    }
    if size < 0.5 * levels[1] {
        return 0;
    }
    if x > 0.5 * (levels[if signed { 127 } else { 254 }] + 1.0) {
        return if signed { 128 } else { 255 };
    }
    (magnitude + if signed && x < 0.0 { 128 } else { 0 }) as u8
}

fn widen(codes: &[u8], scale: f32, signed: bool, out: &mut [f32]) {
    let levels = levels(signed);
    out.iter_mut().zip(codes).for_each(|(o, c)| *o = levels[usize::from(*c)] * scale);
}

fn narrow(x: &[f32], codes: &mut [u8], scale: &mut f32, signed: bool) {
    *scale = x.iter().fold(0.0, |most, v| v.abs().max(most));
    let inverse = if *scale > 0.0 { 1.0 / *scale } else { 0.0 };
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    codes.iter_mut().zip(x).for_each(|(c, v)| *c = code(v * inverse, signed));
}

/// Of values, their gradient, and their moments as floats.
type Step<'a, const N: usize> = dyn Fn(&mut [f32], &[f32], [&mut [f32]; N]) + Sync + 'a;

/// Runs `step(values, gradient, moments)` for every block, with its moments as floats.
fn each_block<const N: usize>(values: &mut [f32], gradient: &[f32], moments: [&mut EightBit; N], step: &Step<N>) {
    let len = values.len();
    assert!(gradient.len() == len && moments.iter().all(|m| m.codes.len() == len), "lengths of a step");
    let values = Shared::new(values);
    let moments = moments.map(|m| (Shared::new(&mut m.codes), Shared::new(&mut m.scales), m.signed));
    let blocks = len.div_ceil(BLOCK);
    threads::each(blocks.div_ceil(RUN), &|run| {
        for block in run * RUN..blocks.min((run + 1) * RUN) {
            let (from, size) = (block * BLOCK, BLOCK.min(len - block * BLOCK));
            let mut floats = [[0f32; BLOCK]; N];
            for ((codes, scales, signed), floats) in moments.iter().zip(&mut floats) {
                // SAFETY: all of them outlive the section; this task alone touches this block.
                let (codes, scale) = unsafe { (codes.slice(from, size), scales.slice(block, 1)) };
                widen(codes, scale[0], *signed, &mut floats[..size]);
            }
            // SAFETY: as above.
            let values = unsafe { values.slice(from, size) };
            step(values, &gradient[from..from + size], floats.each_mut().map(|f| &mut f[..size]));
            for ((codes, scales, signed), floats) in moments.iter().zip(&floats) {
                // SAFETY: as above.
                let (codes, scale) = unsafe { (codes.slice(from, size), scales.slice(block, 1)) };
                narrow(&floats[..size], codes, &mut scale[0], *signed);
            }
        }
    });
}

/// [`super::adamw`] with moments of eight bits: the first is signed, the second not.
pub fn adamw_eight_bit(step: AdamW, values: &mut [f32], gradient: &[f32], first: &mut EightBit, second: &mut EightBit) {
    each_block(values, gradient, [first, second], &|values, gradient, [first, second]| {
        (kernels().adamw)(step, values, gradient, first, second);
    });
}

/// [`super::lion`] with a moment of eight bits, which is signed.
pub fn lion_eight_bit(step: Lion, values: &mut [f32], gradient: &[f32], first: &mut EightBit) {
    each_block(values, gradient, [first], &|values, gradient, [first]| {
        super::update::lion_run(step, values, gradient, first);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_the_nearest_code() {
        for signed in [true, false] {
            let levels = levels(signed);
            let mut sorted = *levels;
            sorted.sort_by(f32::total_cmp);
            assert!(sorted.windows(2).all(|w| w[0] < w[1]), "256 levels");
            for i in 0..20_000 {
                let size = 10f32.powf(-8.0 * i as f32 / 20_000.0);
                for x in [size, if signed { -size } else { size }] {
                    let distance = |level: f32| (x - level).abs();
                    let best = sorted.iter().map(|l| distance(*l)).fold(f32::INFINITY, f32::min);
                    let got = distance(levels[usize::from(code(x, signed))]);
                    assert!(got <= best * 1.0001 + 1e-6 * size, "{x}: {got} and {best}");
                }
            }
            levels.iter().enumerate().for_each(|(c, l)| assert_eq!(usize::from(code(*l, signed)), c, "{l}"));
        }
    }

    #[test]
    fn steps_are_those_of_floats_nearly_and_the_same_on_any_number_of_threads() {
        let n = 5000;
        let wave = |step: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * step).sin()).collect() };
        let gradients: Vec<Vec<f32>> = (1..30).map(|k| wave(0.01 * k as f32)).collect();
        let step = AdamW { rate: 1e-2, beta: [0.9, 0.99], eps: 1e-8, decay: 0.0, corrections: [1.0; 2], scale: 1.0 };
        let run = || {
            let (mut values, mut first, mut second) =
                (vec![0.0; n], EightBit::zeros(n, true), EightBit::zeros(n, false));
            gradients.iter().for_each(|g| adamw_eight_bit(step, &mut values, g, &mut first, &mut second));
            values
        };
        let (mut exact, mut first, mut second) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        gradients.iter().for_each(|g| super::super::adamw(step, &mut exact, g, &mut first, &mut second));
        let got = run();
        let error: f32 = got.iter().zip(&exact).map(|(a, b)| (a - b).powi(2)).sum();
        let size: f32 = exact.iter().map(|v| v * v).sum();
        assert!(error < 1e-3 * size, "{error} of {size}");
        assert_eq!(threads::limited(1, run), got);
    }
}
