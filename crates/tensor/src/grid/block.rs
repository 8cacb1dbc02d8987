//! `Block`: the fitted scales of one block, and rounding to its levels.

use super::{
    Grid, Table, Zero,
    codebook::{self, Codebook, Cost, SPAN},
    fit::weigh,
};
use crate::kernels::kernels;

/// Most sub-blocks that a block has.
pub const SUBS: usize = 16;

/// Fitted parameters of one block. A code stands for `scale * (code + base) + offset` of its sub-block, in the
/// `f32` arithmetic of the decoder; on a table for `scale * table[code]`.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Length of a sub-block.
    pub(super) sub_len: u32,
    /// Added to a code.
    pub(super) base: i16,
    /// Highest code.
    pub(super) highest: u8,
    /// The table that stands between code and value.
    pub(super) table: Option<Table>,
    /// Which levels the columns of a span may have together.
    pub(super) book: Option<&'static Codebook>,
    /// Scale of each sub-block.
    pub(super) scale: [f32; SUBS],
    /// Offset of each sub-block.
    pub(super) offset: [f32; SUBS],
    /// Scale of the block, as `f16` bits; that of a whole row is the `f32` of its only sub-block; of MXFP4 the exponent.
    pub(crate) d: u16,
    /// Minimum of the block, or scale of its minima, as `f16` bits.
    pub(crate) m: u16,
    /// Whole-number scale of each sub-block.
    pub(crate) steps: [i8; SUBS],
    /// Whole-number minimum of each sub-block, or 1 where its levels are shifted down.
    pub(crate) mins: [u8; SUBS],
}

impl Block {
    /// A block of `grid` whose scales are all zero.
    #[inline(always)]
    pub(crate) fn empty(grid: Grid) -> Block {
        let (sub_len, base, highest) = match grid {
            Grid::Int { bits, group, zero } => {
                let base = if zero == Zero::Middle { -(1 << (bits - 1)) } else { 0 };
                (if group == 0 { u32::MAX } else { group.into() }, base, ((1u16 << bits) - 1) as u8)
            }
            Grid::Levels { table, group } => {
                (if group == 0 { u32::MAX } else { group.into() }, 0, ((1u16 << table.bits()) - 1) as u8)
            }
            Grid::Q4_0 => (32, -8, 15),
            Grid::Q4_1 => (32, 0, 15),
            Grid::Q5_0 => (32, -16, 31),
            Grid::Q5_1 => (32, 0, 31),
            Grid::Q8_0 => (32, -128, 255),
            Grid::Q2K => (16, 0, 3),
            Grid::Q3K => (16, -4, 7),
            Grid::Q4K => (32, 0, 15),
            Grid::Q5K => (32, 0, 31),
            Grid::Q6K => (16, -32, 63),
            Grid::Iq4Nl | Grid::Iq4Xs | Grid::Mxfp4 | Grid::Iq3Xxs | Grid::Iq3S => (32, 0, 15),
            Grid::Nvfp4 => (16, 0, 15),
            Grid::Iq1S | Grid::Iq2Xxs => (32, 0, 5),
            Grid::Iq1M | Grid::Iq2Xs | Grid::Iq2S => (16, 0, 5),
            Grid::Tq1 | Grid::Tq2 => (256, -1, 2),
        };
        let table = match grid {
            Grid::Levels { table, .. } => Some(table),
            Grid::Iq4Nl | Grid::Iq4Xs => Some(Table::Iq4Nl),
            Grid::Mxfp4 | Grid::Nvfp4 => Some(Table::E2m1),
            Grid::Iq1S | Grid::Iq1M => Some(Table::Iq1),
            Grid::Iq2Xxs | Grid::Iq2Xs | Grid::Iq2S => Some(Table::Iq2),
            Grid::Iq3Xxs => Some(Table::Iq3Xxs),
            Grid::Iq3S => Some(Table::Iq3S),
            _ => None,
        };
        let book = match grid {
            Grid::Iq1S | Grid::Iq1M => Some(&codebook::IQ1),
            Grid::Iq2Xxs => Some(&codebook::IQ2_XXS),
            Grid::Iq2Xs => Some(&codebook::IQ2_XS),
            Grid::Iq2S => Some(&codebook::IQ2_S),
            Grid::Iq3Xxs => Some(&codebook::IQ3_XXS),
            Grid::Iq3S => Some(&codebook::IQ3_S),
            _ => None,
        };
        Block {
            sub_len,
            base,
            highest,
            table,
            book,
            scale: [0.0; SUBS],
            // Adding -0.0 keeps every value and its sign, as decoders without a minimum do.
            offset: [-0.0; SUBS],
            d: 0,
            m: 0,
            steps: [0; SUBS],
            mins: [0; SUBS],
        }
    }

    /// What a unit of the levels of its first columns stands for.
    pub fn unit(&self) -> f32 {
        self.scale[0]
    }

    /// The highest code; codes start at 0.
    pub fn highest(&self) -> u8 {
        self.highest
    }

    /// Columns whose codes are chosen together: 1, or [`SPAN`] where there is a codebook.
    pub fn span(&self) -> usize {
        if self.book.is_some() { SPAN } else { 1 }
    }

    /// Rounds the values of a block from its first column on, each to its nearest level, or those of a span to what costs
    /// least by `importance`.
    pub fn round_all(&self, x: &[f32], importance: Option<&[f32]>, codes: &mut [u8]) {
        (kernels().round)(self, x, importance, codes);
    }

    /// The same with the instructions that its caller is compiled for.
    #[inline(always)]
    pub(crate) fn round_here(&self, x: &[f32], importance: Option<&[f32]>, codes: &mut [u8]) {
        if self.book.is_none() && self.table.is_none() {
            let len = self.sub_len as usize;
            for (sub, (codes, x)) in codes.chunks_mut(len).zip(x.chunks(len)).enumerate() {
                let (scale, offset, base) = (self.scale[sub], self.offset[sub], f32::from(self.base));
                if scale == 0.0 {
                    codes.fill((-base).clamp(0.0, f32::from(self.highest)) as u8);
                    continue;
                }
                let highest = f32::from(self.highest);
                let ((codes, rest), (x, last)) = (codes.as_chunks_mut::<16>(), x.as_chunks::<16>());
                for (codes, x) in codes.iter_mut().zip(x) {
                    for i in 0..16 {
                        codes[i] = nearest_code((x[i] - offset) / scale - base, highest);
                    }
                }
                rest.iter_mut().zip(last).for_each(|(c, x)| *c = nearest_code((x - offset) / scale - base, highest));
            }
            return;
        }
        if self.book.is_none() {
            return codes.iter_mut().zip(x).enumerate().for_each(|(col, (code, x))| *code = self.round(col, *x).0);
        }
        let spans = codes.as_chunks_mut::<SPAN>().0.iter_mut().zip(x.as_chunks::<SPAN>().0);
        for (i, (codes, x)) in spans.enumerate() {
            let mut each = [1.0; SPAN];
            if let Some(importance) = importance {
                weigh(Some(&importance[i * SPAN..(i + 1) * SPAN]), &mut each);
            }
            (*codes, _) = self.round_span(i * SPAN, x, Cost { each: &each, carry: None });
        }
    }

    /// Rounds the span of a codebook whose first column is `col` to what costs least: its codes, and the errors that are carried
    /// on.
    ///
    /// # Panics
    /// If the block has no codebook ([`Block::span`] is 1), which is the caller's fault.
    pub fn round_span(&self, col: usize, x: &[f32; SPAN], cost: Cost<'_>) -> ([u8; SPAN], [f32; SPAN]) {
        assert!(self.book.is_some(), "a span of a grid that rounds column by column");
        let sub = col / self.sub_len as usize;
        let scale = self.scale[sub];
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let turned = self.shifts_sub_blocks().then_some(self.mins[sub] == 1);
        let chosen = self.book.map(|book| book.choose(&x.map(|x| x * inverse), cost, turned)).unwrap_or_default();
        (chosen.codes, if scale == 0.0 { *x } else { chosen.errors.map(|e| e * scale) })
    }

    /// Are all levels of a sub-block shifted alike, not those of each span?
    pub(super) fn shifts_sub_blocks(&self) -> bool {
        self.book.is_some_and(Codebook::is_shifted) && self.sub_len == 32
    }

    /// The nearest level to `x` at column `col` of the block, as if no other column were: its code and its value.
    #[inline(always)]
    pub fn round(&self, col: usize, x: f32) -> (u8, f32) {
        let sub = col / self.sub_len as usize;
        let (scale, offset) = (self.scale[sub], self.offset[sub]);
        if let Some(table) = self.table {
            let code = table.nearest(if scale == 0.0 { 0.0 } else { x / scale });
            return (code, scale * table.levels()[usize::from(code)]);
        }
        let position = if scale == 0.0 { -f32::from(self.base) } else { (x - offset) / scale - f32::from(self.base) };
        let code = round_even(position.clamp(0.0, f32::from(self.highest)));
        (code as u8, scale * (code + f32::from(self.base)) + offset)
    }

    /// How `level`, which `x` is rounded to, changes with `x`, with the scale and with the offset, what is rounded taken as if it
    /// were not (straight through): a value between the levels moves as it is, one that lies further beyond them than `slack`
    /// with the outermost level.
    #[inline(always)]
    pub(super) fn slopes(&self, col: usize, x: f32, level: f32, slack: f32) -> [f32; 3] {
        let sub = col / self.sub_len as usize;
        let (scale, offset) = (self.scale[sub], self.offset[sub]);
        if scale == 0.0 {
            return [0.0, 0.0, 1.0];
        }
        let (position, slack) = ((x - offset) / scale, slack / scale.abs());
        let (low, high) = match self.table {
            Some(table) => table.ends(),
            None => (f32::from(self.base), f32::from(self.base) + f32::from(self.highest)),
        };
        if position < low - slack {
            return [0.0, low, 1.0];
        }
        if position > high + slack {
            return [0.0, high, 1.0];
        }
        [1.0, (level - offset) / scale - position, 0.0]
    }

    /// From the level below `x` to the one above it.
    #[inline(always)]
    pub(super) fn step(&self, col: usize, x: f32) -> f32 {
        let scale = self.scale[col / self.sub_len as usize];
        match self.table {
            Some(table) if scale != 0.0 => scale.abs() * table.gap(x / scale),
            _ => scale.abs(),
        }
    }

    /// What a code at column `col` stands for.
    #[inline(always)]
    pub fn value(&self, col: usize, code: u8) -> f32 {
        let sub = col / self.sub_len as usize;
        let level = match self.table {
            Some(table) => table.levels()[usize::from(code)],
            None => f32::from(i16::from(code) + self.base),
        };
        self.scale[sub] * level + self.offset[sub]
    }

    /// The values of codes from column 0 on.
    #[inline(always)]
    pub(super) fn values(&self, codes: &[u8], out: &mut [f32]) {
        let len = self.sub_len as usize;
        for (sub, (codes, out)) in codes.chunks(len).zip(out.chunks_mut(len)).enumerate() {
            self.sub_values(sub, codes, out);
        }
    }

    /// The values of some codes of a sub-block, wherever they stand in it.
    #[inline(always)]
    pub(super) fn sub_values(&self, sub: usize, codes: &[u8], out: &mut [f32]) {
        let (scale, offset) = (self.scale[sub], self.offset[sub]);
        if let Some(table) = self.table {
            let levels = table.levels();
            for (o, c) in out.iter_mut().zip(codes) {
                *o = scale * levels[usize::from(*c)];
            }
            return;
        }
        let base = i32::from(self.base);
        for (o, c) in out.iter_mut().zip(codes) {
            *o = scale * (i32::from(*c) + base) as f32 + offset;
        }
    }
}

/// What is added to a number below 2^22 to have its whole part, rounded to even, in the last bits.
const MAGIC: f32 = 12_582_912.0;

/// The nearest whole number, ties to even, without a call: exact below 2^22.
#[inline(always)]
pub fn round_even(x: f32) -> f32 {
    (x + MAGIC) - MAGIC
}

/// The nearest code from 0 to `highest`, ties to even; 0 for what is not a number.
#[inline(always)]
fn nearest_code(x: f32, highest: f32) -> u8 {
    (x.max(0.0).min(highest) + MAGIC).to_bits() as u8
}
