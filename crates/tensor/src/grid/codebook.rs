//! Columns whose codes are chosen together: the entries of a codebook, and the one that costs least.
//!
//! A span of [`SPAN`] columns takes one entry or two, and a sign for each column: of its own, or so that an even number is
//! negative. The entries near to what each column would take by itself are tried in full.

use super::codebooks;
use std::sync::OnceLock;

/// Columns of a span.
pub const SPAN: usize = 8;

/// Entries that are tried where the scale is known.
const THOROUGH: usize = 24;
/// Entries that are tried while scales are sought.
const QUICK: usize = 8;

/// Which entries there are, and how they become levels.
#[derive(Debug)]
pub struct Codebook {
    /// The digits of each entry, the first column's lowest.
    entries: &'static [u16],
    /// Columns of an entry.
    width: usize,
    /// What a digit stands for: a magnitude, or a level.
    digits: &'static [f32],
    signs: Signs,
    near: OnceLock<Near>,
}

/// Where signs come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signs {
    /// Every column has one.
    Own,
    /// As `Own`, but for the last, which makes the number of negative ones even.
    Even,
    /// Digits are levels with a sign, to which one eighth is added or from which it is taken.
    Inside,
}

/// What is found once for a codebook: by the digits that columns would take by themselves, the entry of these digits and
/// the entries nearest to them.
#[derive(Debug)]
struct Near {
    index: Vec<u16>,
    lists: Vec<u16>,
}

/// Says that no entry has these digits.
const NONE: u16 = u16::MAX;

/// What errors in a span cost: `sum each_j f_j^2`, where `f_j` is the error of column `j` after those of the columns before
/// it were carried on: `f_j = e_j - sum_i f_i carry_ij`.
#[derive(Clone, Copy)]
pub struct Cost<'a> {
    /// By column.
    pub each: &'a [f32; SPAN],
    /// From column to column; `None` carries nothing.
    pub carry: Option<&'a [[f32; SPAN]; SPAN]>,
}

/// Codes of a span and what they leave.
#[derive(Clone, Copy, Default)]
pub struct Chosen {
    pub codes: [u8; SPAN],
    /// The errors `f` of [`Cost`], in units of the scale.
    pub errors: [f32; SPAN],
    pub cost: f32,
}

const fn book(entries: &'static [u16], width: usize, digits: &'static [f32], signs: Signs) -> Codebook {
    Codebook { entries, width, digits, signs, near: OnceLock::new() }
}

const THREE: &[f32] = &[8.0, 25.0, 43.0];
pub static IQ2_XXS: Codebook = book(&codebooks::IQ2_XXS, 8, THREE, Signs::Even);
pub static IQ2_XS: Codebook = book(&codebooks::IQ2_XS, 8, THREE, Signs::Even);
pub static IQ2_S: Codebook = book(&codebooks::IQ2_S, 8, THREE, Signs::Own);
pub static IQ3_XXS: Codebook =
    book(&codebooks::IQ3_XXS, 4, &[4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0], Signs::Even);
pub static IQ3_S: Codebook = book(&codebooks::IQ3_S, 4, &[1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0], Signs::Own);
pub static IQ1: Codebook = book(&codebooks::IQ1, 8, &[-8.0, 0.0, 8.0], Signs::Inside);

/// A span that is being rounded: what is left of its columns, with the errors so far carried on.
#[derive(Clone, Copy)]
struct Span {
    left: [f32; SPAN],
    chosen: Chosen,
}

impl Codebook {
    /// Bits of a digit.
    fn bits(&self) -> usize {
        if self.width == SPAN { 2 } else { 3 }
    }

    /// Digit of column `col` of an entry.
    #[inline(always)]
    fn digit(&self, entry: u16, col: usize) -> usize {
        usize::from(entry) >> (self.bits() * col) & ((1 << self.bits()) - 1)
    }

    /// The code of a digit with a sign, or of one to which an eighth is added (`turned` takes it off).
    #[inline(always)]
    fn code(&self, digit: usize, turned: bool) -> u8 {
        let half = self.digits.len();
        (match (self.signs, turned) {
            (Signs::Inside, _) => 2 * digit + usize::from(!turned),
            (_, false) => half + digit,
            (_, true) => half - 1 - digit,
        }) as u8
    }

    /// Digit and sign of a code.
    #[inline(always)]
    fn of_code(&self, code: u8) -> (usize, bool) {
        let (code, half) = (usize::from(code), self.digits.len());
        match self.signs {
            Signs::Inside => ((code / 2).min(half - 1), code % 2 == 0),
            _ if code >= half => ((code - half).min(half - 1), false),
            _ => (half - 1 - code, true),
        }
    }

    /// What a digit with a sign stands for, in units of the scale.
    #[inline(always)]
    fn level(&self, digit: usize, turned: bool) -> f32 {
        let value = self.digits[digit];
        match (self.signs, turned) {
            (Signs::Inside, false) => value + 1.0,
            (Signs::Inside, true) => value - 1.0,
            (_, false) => value,
            (_, true) => -value,
        }
    }

    /// The codes of an entry, whose bits of `signs` say which columns are negative (or, for levels with a sign, bit 0 that
    /// an eighth is taken off all).
    #[inline(always)]
    pub fn codes(&self, entry: usize, signs: u8, codes: &mut [u8]) {
        let entry = self.entries[entry];
        for (col, code) in codes.iter_mut().enumerate() {
            let turned = signs >> if self.signs == Signs::Inside { 0 } else { col } & 1 == 1;
            *code = self.code(self.digit(entry, col), turned);
        }
    }

    /// The entry and the signs of codes; the nearest entry where none has them.
    pub fn entry(&self, codes: &[u8]) -> (usize, u8) {
        let (mut key, mut signs, mut place) = (0, 0u8, 1);
        for (col, code) in codes.iter().enumerate() {
            let (digit, turned) = self.of_code(*code);
            key += place * digit;
            place *= self.digits.len();
            signs |= u8::from(turned) << if self.signs == Signs::Inside { 0 } else { col };
        }
        let near = self.near();
        let entry = if near.index[key] == NONE { near.lists[key * THOROUGH] } else { near.index[key] };
        (entry.into(), signs)
    }

    fn near(&self) -> &Near {
        self.near.get_or_init(|| {
            let levels = self.digits.len();
            let keys = levels.pow(self.width as u32);
            let mut near = Near { index: vec![NONE; keys], lists: Vec::with_capacity(keys * THOROUGH) };
            let mut distances: Vec<(u32, u16)> = Vec::with_capacity(self.entries.len());
            for key in 0..keys {
                distances.clear();
                let sought: [f32; SPAN] =
                    std::array::from_fn(|col| self.digits[key / levels.pow(col.min(self.width - 1) as u32) % levels]);
                for (i, entry) in self.entries.iter().enumerate() {
                    let apart = |col: usize| sought[col] - self.digits[self.digit(*entry, col)];
                    let distance: f32 = (0..self.width).map(|col| apart(col) * apart(col)).sum();
                    if distance == 0.0 {
                        near.index[key] = i as u16;
                    }
                    distances.push((distance as u32, i as u16));
                }
                distances.select_nth_unstable(THOROUGH - 1);
                distances[..THOROUGH].sort_unstable();
                near.lists.extend(distances[..THOROUGH].iter().map(|d| d.1));
            }
            near
        })
    }

    /// The digit that is nearest to `x`, which is not negative where digits are magnitudes.
    #[inline(always)]
    fn nearest(&self, x: f32) -> usize {
        self.digits.windows(2).map(|pair| usize::from(x > 0.5 * (pair[0] + pair[1]))).sum()
    }

    /// The codes of a span that cost least. `x` is in units of the scale; `turned` says whether an eighth is taken off levels
    /// that have a sign, where that is settled.
    pub fn choose(&self, x: &[f32; SPAN], cost: Cost<'_>, turned: Option<bool>) -> Chosen {
        self.choose_among(x, cost, turned, THOROUGH)
    }

    fn choose_among(&self, x: &[f32; SPAN], cost: Cost<'_>, turned: Option<bool>, breadth: usize) -> Chosen {
        let span = Span { left: *x, chosen: Chosen::default() };
        match (self.signs, turned) {
            (Signs::Inside, Some(turned)) => self.fill(span, cost, Some([turned; SPAN]), breadth),
            (Signs::Inside, None) => {
                let [up, down] = [false, true].map(|t| self.fill(span, cost, Some([t; SPAN]), breadth));
                if down.cost < up.cost { down } else { up }
            }
            _ => {
                let free = self.fill(span, cost, None, breadth);
                let signs = free.codes.map(|code| self.of_code(code).1);
                if self.signs == Signs::Own || signs.iter().filter(|s| **s).count().is_multiple_of(2) {
                    return free;
                }
                // One sign has to turn: that of the column where it costs least as things are.
                let turn = |turn: usize| {
                    let (mut signs, mut trial) = (signs, span);
                    signs[turn] = !signs[turn];
                    for col in 0..SPAN {
                        self.put(&mut trial, col, self.of_code(free.codes[col]).0, signs[col], cost);
                    }
                    (trial.chosen, signs)
                };
                let mut best = turn(0);
                for col in 1..SPAN {
                    let trial = turn(col);
                    if trial.0.cost < best.0.cost {
                        best = trial;
                    }
                }
                if breadth < THOROUGH {
                    return best.0;
                }
                // With that sign other entries may be better.
                let again = self.fill(span, cost, Some(best.1), breadth);
                if again.cost < best.0.cost { again } else { best.0 }
            }
        }
    }

    /// Gives a column its code and carries its error on.
    #[inline(always)]
    fn put(&self, span: &mut Span, col: usize, digit: usize, turned: bool, cost: Cost<'_>) {
        let error = span.left[col] - self.level(digit, turned);
        span.chosen.codes[col] = self.code(digit, turned);
        span.chosen.errors[col] = error;
        span.chosen.cost += cost.each[col] * error * error;
        if let Some(carry) = cost.carry {
            for (left, carry) in span.left.iter_mut().zip(&carry[col]) {
                *left -= error * carry;
            }
        }
    }

    /// Chooses entries from the first columns to the last, with given signs or the best ones.
    #[inline(always)]
    fn fill(&self, mut span: Span, cost: Cost<'_>, turned: Option<[bool; SPAN]>, breadth: usize) -> Chosen {
        let near = self.near();
        for from in (0..SPAN).step_by(self.width) {
            let sign = |col: usize, left: f32| turned.map_or(left < 0.0, |t| t[col]);
            let (mut alone, mut key, mut place) = (span, 0, 1);
            for col in from..from + self.width {
                let turned = sign(col, alone.left[col]);
                let x = alone.left[col];
                let digit = match self.signs {
                    Signs::Inside => self.nearest(x - self.level(1, turned)),
                    _ => self.nearest(if turned { -x } else { x }),
                };
                self.put(&mut alone, col, digit, turned, cost);
                key += place * digit;
                place *= self.digits.len();
            }
            let mut best: Option<Span> = None;
            for entry in &near.lists[key * THOROUGH..key * THOROUGH + breadth] {
                let entry = self.entries[usize::from(*entry)];
                let mut trial = span;
                for col in from..from + self.width {
                    let turned = sign(col, trial.left[col]);
                    self.put(&mut trial, col, self.digit(entry, col - from), turned, cost);
                }
                if best.is_none_or(|b| trial.chosen.cost < b.chosen.cost) {
                    best = Some(trial);
                }
            }
            span = best.unwrap_or(alone);
        }
        span.chosen
    }

    /// Sums of one rounding: `sum w x q` and `sum w q q`, `q` being a level.
    pub fn moments(&self, x: &[f32], w: &[f32], inverse: f32, turned: Option<bool>) -> (f32, f32) {
        let (mut xq, mut qq) = (0f32, 0f32);
        for (x, w) in x.as_chunks::<SPAN>().0.iter().zip(w.as_chunks::<SPAN>().0) {
            let cost = Cost { each: w, carry: None };
            let chosen = self.choose_among(&x.map(|x| x * inverse), cost, turned, QUICK);
            for col in 0..SPAN {
                let (digit, turned) = self.of_code(chosen.codes[col]);
                let q = self.level(digit, turned);
                xq += w[col] * x[col] * q;
                qq += w[col] * q * q;
            }
        }
        (xq, qq)
    }

    /// The largest level.
    pub fn reach(&self) -> f32 {
        self.digits.last().map_or(1.0, |d| d.abs())
    }

    /// Are levels signed, with an eighth added or taken off?
    pub fn is_shifted(&self) -> bool {
        self.signs == Signs::Inside
    }
}

/// The signs of eight columns from the seven bits that are stored: an even number of them is negative.
#[inline(always)]
pub fn even_signs(bits: u8) -> u8 {
    let bits = bits & 127;
    bits | ((bits.count_ones() & 1) as u8) << 7
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [&Codebook; 6] = [&IQ2_XXS, &IQ2_XS, &IQ2_S, &IQ3_XXS, &IQ3_S, &IQ1];

    #[test]
    fn every_entry_is_found_by_its_codes() {
        for book in ALL {
            for i in 0..book.entries.len() {
                let signs =
                    if book.is_shifted() { (i % 2) as u8 } else { (i * 37) as u8 & ((1u16 << book.width) - 1) as u8 };
                let mut codes = [0; SPAN];
                book.codes(i, signs, &mut codes[..book.width]);
                assert_eq!(book.entry(&codes[..book.width]), (i, signs));
            }
        }
    }

    /// All entries with all signs, tried one by one.
    #[test]
    fn the_choice_is_close_to_the_best_of_all() {
        let mut s = 7u64;
        let mut next = || {
            s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (s >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        for book in [&IQ2_XXS, &IQ2_S, &IQ1] {
            let (mut got, mut least) = (0.0, 0.0);
            for _ in 0..12 {
                let x: [f32; SPAN] = std::array::from_fn(|_| (next() + next() + next()) * 0.6 * book.reach());
                let each: [f32; SPAN] = std::array::from_fn(|_| 1.0 + 0.5 * next());
                let carry: [[f32; SPAN]; SPAN] =
                    std::array::from_fn(|i| std::array::from_fn(|j| if j > i { 0.3 * next() } else { 0.0 }));
                let cost = Cost { each: &each, carry: Some(&carry) };
                let mut best = f32::INFINITY;
                for entry in book.entries {
                    for signs in 0..if book.is_shifted() { 2u32 } else { 256 } {
                        if book.signs == Signs::Even && signs.count_ones() % 2 == 1 {
                            continue;
                        }
                        let mut span = Span { left: x, chosen: Chosen::default() };
                        for col in 0..SPAN {
                            let turned = signs >> if book.is_shifted() { 0 } else { col } & 1 == 1;
                            book.put(&mut span, col, book.digit(*entry, col), turned, cost);
                        }
                        best = best.min(span.chosen.cost);
                    }
                }
                let chosen = book.choose(&x, cost, None).cost;
                assert!(chosen >= best * 0.9999);
                got += chosen;
                least += best;
            }
            assert!(got < 1.12 * least, "{got} {least}");
        }
    }

    #[test]
    fn an_even_number_of_signs_is_negative() {
        assert!((0..128).all(|bits| even_signs(bits).count_ones().is_multiple_of(2) && even_signs(bits) & 127 == bits));
    }
}
