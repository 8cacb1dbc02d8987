//! The byte layouts of the types that write several columns as one number: codebooks, and digits of three levels.

use super::{
    Grid,
    block::Block,
    codebook::{SPAN, even_signs},
    pack::u16_at,
};

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The scale of a sub-block of a codebook, in steps of the least one.
#[inline(always)]
fn odd(stored: u16) -> i8 {
    (2 * stored + 1) as i8
}

/// Reads the scales of a type with a codebook.
#[inline(always)]
pub fn steps(grid: Grid, bytes: &[u8], b: &mut Block) {
    // That of IQ1_M lies in parts beside the steps.
    b.d = if grid == Grid::Iq1M { 0 } else { u16_at(bytes, 0) };
    match grid {
        Grid::Iq1S => {
            for s in 0..8 {
                let high = u16_at(bytes, 34 + 2 * s);
                b.steps[s] = odd(high >> 12 & 7);
                b.mins[s] = (high >> 15) as u8;
            }
        }
        Grid::Iq1M => {
            for quarter in 0..4 {
                let scales = u16_at(bytes, 48 + 2 * quarter);
                b.d |= scales >> 12 << (4 * quarter);
                (0..4).for_each(|s| b.steps[4 * quarter + s] = odd(scales >> (3 * s) & 7));
            }
        }
        Grid::Iq2Xxs => {
            (0..8).for_each(|s| b.steps[s] = odd((bytes[9 + 8 * s] >> 4).into()));
        }
        Grid::Iq2Xs | Grid::Iq2S => {
            let scales = &bytes[bytes.len() - 8..];
            (0..16).for_each(|s| b.steps[s] = odd((scales[s / 2] >> (4 * (s % 2)) & 15).into()));
        }
        Grid::Iq3Xxs => {
            (0..8).for_each(|s| b.steps[s] = odd((bytes[69 + 4 * s] >> 4).into()));
        }
        Grid::Iq3S => {
            (0..8).for_each(|s| b.steps[s] = odd((bytes[106 + s / 2] >> (4 * (s % 2)) & 15).into()));
        }
        _ => {}
    }
}

/// `N` digits of three levels to a byte, which holds the fraction of 256 that they make; each of them is a run of codes.
#[inline(always)]
pub fn trits<const N: usize>(bytes: &[u8], codes: &mut [u8]) {
    let mut power = 1u8;
    for run in codes.chunks_exact_mut(bytes.len()).take(N) {
        for (code, byte) in run.iter_mut().zip(bytes) {
            *code = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as u8;
        }
        power = power.wrapping_mul(3);
    }
}

/// The spans of the types with codebooks.
#[inline(always)]
pub fn unpack(grid: Grid, bytes: &[u8], codes: &mut [u8]) {
    let Some(book) = Block::empty(grid).book else { return };
    for (i, codes) in codes.as_chunks_mut::<SPAN>().0.iter_mut().enumerate() {
        let low = |at: usize| usize::from(bytes[at]);
        // Seven bits of signs for each eighth of a word of 32.
        let packed = |word: usize| even_signs((u32_at(bytes, word) >> (7 * (i % 4))) as u8);
        match grid {
            Grid::Iq1S => {
                let high = u16_at(bytes, 34 + 2 * (i / 4));
                let entry = low(2 + i) | usize::from(high >> (3 * (i % 4)) & 7) << 8;
                book.codes(entry, (high >> 15) as u8, codes);
            }
            Grid::Iq1M => {
                let high = bytes[32 + i / 2] >> (4 * (i % 2));
                book.codes(low(i) | usize::from(high & 7) << 8, high >> 3 & 1, codes);
            }
            Grid::Iq2Xxs => {
                let at = 2 + i / 4 * 8;
                book.codes(low(at + i % 4), packed(at + 4), codes);
            }
            Grid::Iq2Xs => {
                let word = u16_at(bytes, 2 + 2 * i);
                book.codes(usize::from(word & 511), even_signs((word >> 9) as u8), codes);
            }
            Grid::Iq2S => {
                let high = usize::from(bytes[66 + i / 4] >> (2 * (i % 4)) & 3);
                book.codes(low(2 + i) | high << 8, bytes[34 + i], codes);
            }
            _ => {
                let signs = if grid == Grid::Iq3S { bytes[74 + i] } else { packed(66 + i / 4 * 4) };
                for half in 0..2 {
                    let at = 2 * i + half;
                    let high = if grid == Grid::Iq3S { bytes[66 + at / 8] >> (at % 8) & 1 } else { 0 };
                    let entry = low(2 + at) | usize::from(high) << 8;
                    book.codes(entry, signs >> (4 * half), &mut codes[4 * half..4 * half + 4]);
                }
            }
        }
    }
}

/// Writes scales and codes of a type with a codebook.
pub fn write(grid: Grid, b: &Block, codes: &[u8], out: &mut [u8]) {
    pack_steps(grid, b, out);
    pack_spans(grid, b, codes, out);
}

/// The inverse of [`trits`].
pub fn pack_trits(codes: &[u8], digits: u32, out: &mut [u8]) {
    for (i, byte) in out.iter_mut().enumerate() {
        // A byte of four digits counts as one of five whose last is 0.
        let sum = (0..5).fold(0u16, |sum, n| {
            let digit = if n < digits { codes.get(n as usize * (codes.len() / digits as usize) + i) } else { None };
            3 * sum + u16::from(digit.copied().unwrap_or(0).min(2))
        });
        *byte = (sum * 256).div_ceil(243) as u8;
    }
}

/// The scales of a type with a codebook.
fn pack_steps(grid: Grid, b: &Block, out: &mut [u8]) {
    let step = |s: usize| (b.steps[s] as u8 - 1) / 2;
    if grid != Grid::Iq1M {
        out[..2].copy_from_slice(&b.d.to_le_bytes());
    }
    match grid {
        Grid::Iq1S => (0..8).for_each(|s| out[35 + 2 * s] |= step(s) << 4 | b.mins[s] << 7),
        Grid::Iq1M => {
            for quarter in 0..4 {
                let steps = (0..4).fold(0u16, |all, s| all | u16::from(step(4 * quarter + s)) << (3 * s));
                let word = steps | (b.d >> (4 * quarter) & 15) << 12;
                out[48 + 2 * quarter..50 + 2 * quarter].copy_from_slice(&word.to_le_bytes());
            }
        }
        Grid::Iq2Xxs => (0..8).for_each(|s| out[9 + 8 * s] |= step(s) << 4),
        Grid::Iq3Xxs => (0..8).for_each(|s| out[69 + 4 * s] |= step(s) << 4),
        _ => {
            let (subs, at) = if grid == Grid::Iq3S { (8, 106) } else { (16, out.len() - 8) };
            (0..subs).for_each(|s| out[at + s / 2] |= step(s) << (4 * (s % 2)));
        }
    }
}

/// The inverse of [`unpack`].
fn pack_spans(grid: Grid, b: &Block, codes: &[u8], out: &mut [u8]) {
    let Some(book) = b.book else { return };
    for (i, codes) in codes.as_chunks::<SPAN>().0.iter().enumerate() {
        // Seven bits of signs from bit `7 (i % 4)` of a word of 32 on.
        let pack = |out: &mut [u8], word: usize, signs: u8| {
            let all = u32_at(out, word) | u32::from(signs & 127) << (7 * (i % 4));
            out[word..word + 4].copy_from_slice(&all.to_le_bytes());
        };
        if matches!(grid, Grid::Iq3Xxs | Grid::Iq3S) {
            let mut signs = 0;
            for half in 0..2 {
                let (entry, own) = book.entry(&codes[4 * half..4 * half + 4]);
                let at = 2 * i + half;
                out[2 + at] = entry as u8;
                signs |= own << (4 * half);
                if grid == Grid::Iq3S {
                    out[66 + at / 8] |= ((entry >> 8) as u8) << (at % 8);
                }
            }
            match grid {
                Grid::Iq3S => out[74 + i] = signs,
                _ => pack(out, 66 + i / 4 * 4, signs),
            }
            continue;
        }
        let (entry, signs) = book.entry(codes);
        let high = (entry >> 8) as u8;
        match grid {
            Grid::Iq1S => {
                out[2 + i] = entry as u8;
                let at = 34 + 2 * (i / 4);
                let word = u16_at(out, at) | u16::from(high) << (3 * (i % 4));
                out[at..at + 2].copy_from_slice(&word.to_le_bytes());
            }
            Grid::Iq1M => {
                out[i] = entry as u8;
                out[32 + i / 2] |= (high | signs << 3) << (4 * (i % 2));
            }
            Grid::Iq2Xxs => {
                let at = 2 + i / 4 * 8;
                out[at + i % 4] = entry as u8;
                pack(out, at + 4, signs);
            }
            Grid::Iq2Xs => {
                let word = entry as u16 | u16::from(signs & 127) << 9;
                out[2 + 2 * i..4 + 2 * i].copy_from_slice(&word.to_le_bytes());
            }
            _ => {
                out[2 + i] = entry as u8;
                out[34 + i] = signs;
                out[66 + i / 4] |= high << (2 * (i % 4));
            }
        }
    }
}
