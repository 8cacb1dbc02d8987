//! Grids: where the values of a quantized matrix may lie, and the bytes that store them.
//!
//! A grid knows how to fit the scales of a block, to round a value to the nearest code, and to encode and
//! decode. How values are chosen before they are rounded (nearest, GPTQ ...) is a method's business.
//!
//! Formats: GGUF's block types, bit for bit as in llama.cpp's `ggml-common.h`, and planish's own groups, of whole
//! numbers of 2 to 8 bits or of the levels of a table, whose scales may span a whole row. On the types with codebooks
//! eight columns take their codes together.

mod abreast;
mod block;
mod codebook;
mod codebooks;
mod even_subs;
mod fit;
mod learned;
mod name;
mod pack;
mod palette;
mod spans;
mod sub_blocks;
mod table;

pub use block::Block;
pub use codebook::{Cost, SPAN};
pub use learned::{Moved, Scales};
pub use name::GridError;
pub(crate) use pack::{half_e4m3, half_power, header, pack_bits, read_scales, unpack, unpack_bits, widen};
pub use palette::{Palette, means};
pub use table::Table;

use crate::kernels::kernels;

/// A way to store values as codes with shared scales.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Grid {
    /// Planish's own: per group one 16-bit scale (32 bits where a row is the group), what stands for zero, then the
    /// codes, bit-packed.
    Int {
        /// Bits of a code, 2 to 8.
        bits: u8,
        /// Values that share a scale: a multiple of 8 from 8 to 1024, or 0 for the whole row.
        group: u16,
        /// Which code stands for zero.
        zero: Zero,
    },
    /// As [`Grid::Int`], of levels of a table: a scale times a level.
    Levels {
        /// The levels.
        table: Table,
        /// As of [`Grid::Int`].
        group: u16,
    },
    /// 32 values of 4 bits, one scale.
    Q4_0,
    /// 32 values of 4 bits, scale and minimum.
    Q4_1,
    /// 32 values of 5 bits, one scale.
    Q5_0,
    /// 32 values of 5 bits, scale and minimum.
    Q5_1,
    /// 32 values of 8 bits, one scale.
    Q8_0,
    /// 256 values of 2 bits; scale and minimum of each 16 in 4 bits.
    Q2K,
    /// 256 values of 3 bits; scale of each 16 in 6 bits.
    Q3K,
    /// 256 values of 4 bits; scale and minimum of each 32 in 6 bits.
    Q4K,
    /// 256 values of 5 bits; scale and minimum of each 32 in 6 bits.
    Q5K,
    /// 256 values of 6 bits; scale of each 16 in 8 bits.
    Q6K,
    /// 32 values of 4 bits on an uneven table, one scale.
    Iq4Nl,
    /// 256 values of 4 bits on the same table; scale of each 32 in 6 bits.
    Iq4Xs,
    /// 32 floats of 4 bits (E2M1), whose scale is a power of two (OCP MX specification 1.0).
    Mxfp4,
    /// 64 floats of 4 bits (E2M1); scale of each 16 in a float of 8 bits (E4M3).
    Nvfp4,
    /// 256 values of a codebook of 2048 times eight of -1, 0 and 1, shifted by an eighth; scale of each 32 in 3 bits.
    Iq1S,
    /// As [`Grid::Iq1S`]; scale of each 16, and every eight have their shift.
    Iq1M,
    /// 256 values of a codebook of 256 times eight, whose signs are even; scale of each 32 in 4 bits.
    Iq2Xxs,
    /// As [`Grid::Iq2Xxs`], of 512; scale of each 16.
    Iq2Xs,
    /// As [`Grid::Iq2Xs`], of 1024, every value with a sign of its own.
    Iq2S,
    /// 256 values of a codebook of 256 times four, whose signs are even by eight; scale of each 32 in 4 bits.
    Iq3Xxs,
    /// As [`Grid::Iq3Xxs`], of 512, every value with a sign of its own.
    Iq3S,
    /// 256 values of -1, 0 and 1, five to a byte, one scale.
    Tq1,
    /// As [`Grid::Tq1`], four to a byte.
    Tq2,
}

/// Which code of a group stands for zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Zero {
    /// The middle one: scales alone are stored.
    Middle,
    /// None has to: each group has a 16-bit minimum, the value of code 0.
    Minimum,
    /// A code of the group's own, stored in a byte, as GPTQ, AWQ and compressed-tensors do.
    Point,
}

/// Longest block of any grid whose block is not a whole row.
pub const LONGEST: usize = 1024;

impl Grid {
    /// The grids of GGUF files, by rising size.
    pub const GGUF: &[Grid] = &[
        Grid::Iq1S,
        Grid::Tq1,
        Grid::Iq1M,
        Grid::Iq2Xxs,
        Grid::Tq2,
        Grid::Iq2Xs,
        Grid::Iq2S,
        Grid::Q2K,
        Grid::Iq3Xxs,
        Grid::Iq3S,
        Grid::Q3K,
        Grid::Iq4Xs,
        Grid::Mxfp4,
        Grid::Q4K,
        Grid::Nvfp4,
        Grid::Q4_0,
        Grid::Iq4Nl,
        Grid::Q4_1,
        Grid::Q5K,
        Grid::Q5_0,
        Grid::Q5_1,
        Grid::Q6K,
        Grid::Q8_0,
    ];

    /// Planish's own grid, where bits are 2 to 8 and the group is 0 (a row) or a multiple of 8 from 8 to 1024.
    pub fn int(bits: u8, group: u16, zero: Zero) -> Option<Grid> {
        // A minimum of a whole row is worth nothing, and no format has it.
        let fits = (2..=8).contains(&bits) && group_fits(group) && !(group == 0 && zero == Zero::Minimum);
        fits.then_some(Grid::Int { bits, group, zero })
    }

    /// Does a block span the row?
    pub fn is_by_row(self) -> bool {
        matches!(self, Grid::Int { group: 0, .. } | Grid::Levels { group: 0, .. })
    }

    /// Values in a block; 0 where it spans the row.
    pub fn block_len(self) -> usize {
        match self {
            Grid::Int { group, .. } | Grid::Levels { group, .. } => group.into(),
            Grid::Q4_0 | Grid::Q4_1 | Grid::Q5_0 | Grid::Q5_1 | Grid::Q8_0 | Grid::Iq4Nl | Grid::Mxfp4 => 32,
            Grid::Nvfp4 => 64,
            _ => 256,
        }
    }

    /// Values in a block of a row of `cols`; a short last group counts as a whole one.
    pub fn block_len_in(self, cols: usize) -> usize {
        if self.is_by_row() { cols.next_multiple_of(8) } else { self.block_len() }
    }

    /// Bytes of a block of `len` values.
    fn bytes_of(self, len: usize) -> usize {
        match self {
            Grid::Int { bits, .. } => self.header_bytes() + usize::from(bits) * len / 8,
            Grid::Levels { table, .. } => self.header_bytes() + usize::from(table.bits()) * len / 8,
            Grid::Mxfp4 => 17,
            Grid::Q4_0 | Grid::Iq4Nl => 18,
            Grid::Q4_1 => 20,
            Grid::Q5_0 => 22,
            Grid::Q5_1 => 24,
            Grid::Q8_0 => 34,
            Grid::Nvfp4 => 36,
            Grid::Iq1S => 50,
            Grid::Tq1 => 54,
            Grid::Iq1M => 56,
            Grid::Iq2Xxs | Grid::Tq2 => 66,
            Grid::Iq2Xs => 74,
            Grid::Iq2S => 82,
            Grid::Q2K => 84,
            Grid::Iq3Xxs => 98,
            Grid::Iq3S => 110,
            Grid::Q3K => 110,
            Grid::Iq4Xs => 136,
            Grid::Q4K => 144,
            Grid::Q5K => 176,
            Grid::Q6K => 210,
        }
    }

    /// Columns whose codes are chosen together: 1, or [`SPAN`] where there is a codebook.
    pub fn span(self) -> usize {
        Block::empty(self).span()
    }

    /// The levels of a grid with a codebook.
    pub(crate) fn codebook_levels(self) -> Option<Table> {
        let block = Block::empty(self);
        block.book.and(block.table)
    }

    /// How often a scale is halved before it counts in steps: the scales of codebooks are in parts of what they store.
    #[inline(always)]
    pub(crate) fn halvings(self) -> u8 {
        match self {
            Grid::Iq1S | Grid::Iq1M | Grid::Iq2Xxs | Grid::Iq2Xs | Grid::Iq2S => 3,
            Grid::Iq3Xxs => 2,
            _ => 0,
        }
    }

    /// Bytes before the codes of planish's own grids: the scale, and what stands for zero.
    pub(crate) fn header_bytes(self) -> usize {
        let scale = if self.is_by_row() { 4 } else { 2 };
        match self {
            Grid::Int { zero: Zero::Minimum, .. } => scale + 2,
            Grid::Int { zero: Zero::Point, .. } => scale + 1,
            _ => scale,
        }
    }

    /// Bytes of a block of a row of `cols` values.
    pub fn block_bytes_in(self, cols: usize) -> usize {
        self.bytes_of(self.block_len_in(cols))
    }

    /// Can a row of `cols` values be stored? The last group of planish's own grids may be short.
    pub fn fits(self, cols: usize) -> bool {
        match self {
            Grid::Int { .. } | Grid::Levels { .. } => cols > 0,
            _ => cols > 0 && cols.is_multiple_of(self.block_len()),
        }
    }

    /// Bytes of a row of `cols` values; a short last group is padded to a whole one.
    pub fn row_bytes(self, cols: usize) -> usize {
        cols.div_ceil(self.block_len_in(cols).max(1)) * self.block_bytes_in(cols)
    }

    /// Bits per value of a whole block, scales included; those of a long row where it is the block.
    pub fn bits_per_weight(self) -> f64 {
        let len = self.block_len_in(4096);
        8.0 * self.bytes_of(len) as f64 / len as f64
    }

    /// Decodes a row into `out` (`[cols]`), whose bytes are [`Grid::row_bytes`] long.
    ///
    /// # Panics
    /// If `bytes` has another length, which is the caller's fault.
    pub fn decode_row(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), self.row_bytes(out.len()), "bytes of a row");
        (kernels().decode_row)(self, bytes, out);
    }

    /// The loop of [`Grid::decode_row`], compiled for each instruction set.
    #[inline(always)]
    pub(crate) fn decode_blocks(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Grid::Int { .. } | Grid::Levels { .. } => return pack::decode_groups(self, bytes, out),
            _ if self.block_len() == 32 => return pack::decode_plain(self, bytes, out),
            _ => {}
        }
        let (mut codes, len) = ([0u8; 256], self.block_len());
        for (bytes, out) in bytes.chunks_exact(self.bytes_of(len)).zip(out.chunks_mut(len)) {
            let block = header(self, bytes);
            unpack(self, bytes, &mut codes[..len]);
            block.values(&codes[..out.len()], out);
        }
    }

    /// Fits the scales of one block so that rounding `x` (at most [`Grid::block_len`] values) costs the least
    /// `sum importance (x - rounded)^2`.
    pub fn fit(self, x: &[f32], importance: Option<&[f32]>) -> Block {
        (kernels().fit)(self, x, importance)
    }

    /// The search of [`Grid::fit`], compiled for each instruction set.
    #[inline(always)]
    pub(crate) fn search(self, x: &[f32], importance: Option<&[f32]>) -> Block {
        fit::fit(self, x, importance)
    }

    /// Writes a block: its scales and one code per value; missing codes of a short group count as zero.
    ///
    /// # Panics
    /// If `out` is shorter than the block of so many codes, which is the caller's fault.
    pub fn encode(self, block: &Block, codes: &[u8], out: &mut [u8]) {
        let len = if self.is_by_row() { codes.len().next_multiple_of(8) } else { self.block_len() };
        assert_eq!(out.len(), self.bytes_of(len), "bytes of a block");
        if codes.len() == len {
            return pack::write(self, block, codes, out);
        }
        let mut whole = codes.to_vec();
        whole.resize(len, 0);
        pack::write(self, block, &whole, out);
    }

    /// A block of one of planish's own grids with a given scale and code of zero, which counts where groups have one.
    pub fn block_of(self, scale: f32, zero: u8) -> Block {
        let mut block = Block::empty(self);
        block.d = half::f16::from_f32(scale).to_bits();
        block.scale[0] = scale;
        block.mins[0] = zero;
        block.derive(self);
        block
    }

    /// Scale, code of zero where the block has one of its own, and codes of a block of one scale.
    ///
    /// # Panics
    /// If `bytes` are no block of so many codes, which is the caller's fault.
    pub fn read_block(self, bytes: &[u8], codes: &mut [u8]) -> (f32, Option<u8>) {
        let block = header(self, bytes);
        if self.is_by_row() || codes.len() < self.block_len() {
            let mut whole = vec![0u8; codes.len().next_multiple_of(8).max(self.block_len())];
            unpack(self, bytes, &mut whole);
            codes.copy_from_slice(&whole[..codes.len()]);
        } else {
            unpack(self, bytes, codes);
        }
        let own = matches!(self, Grid::Int { zero: Zero::Point, .. });
        (block.scale[0], own.then_some(block.mins[0]))
    }

    /// Counts the codes of a row of `cols` values, whose bytes are [`Grid::row_bytes`] long.
    pub fn count_codes(self, bytes: &[u8], cols: usize, counts: &mut [u64; 256]) {
        let (len, size) = (self.block_len_in(cols), self.block_bytes_in(cols));
        let mut codes = vec![0u8; len];
        for (i, bytes) in bytes.chunks_exact(size.max(1)).enumerate() {
            unpack(self, bytes, &mut codes);
            codes.iter().take(cols - i * len).for_each(|c| counts[usize::from(*c)] += 1);
        }
    }

    /// Bits of a code.
    pub fn code_bits(self) -> u8 {
        8 - Block::empty(self).highest().leading_zeros() as u8
    }

    /// Rounds a row to nearest after fitting each block.
    ///
    /// # Panics
    /// If `out` is not [`Grid::row_bytes`] long or there are fewer importances than values, which is the caller's
    /// fault.
    pub fn quantize_row(self, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        assert_eq!(out.len(), self.row_bytes(x.len()), "bytes of a row");
        if x.is_empty() {
            return;
        }
        let (len, size) = (self.block_len_in(x.len()), self.block_bytes_in(x.len()));
        let mut codes = vec![0u8; len];
        for (i, (x, out)) in x.chunks(len).zip(out.chunks_exact_mut(size)).enumerate() {
            let block = self.fit(x, importance.map(|w| &w[i * len..i * len + x.len()]));
            block.round_all(x, importance.map(|w| &w[i * len..i * len + x.len()]), &mut codes[..x.len()]);
            self.encode(&block, &codes[..x.len()], out);
        }
    }
}

/// Can so many values share a scale?
fn group_fits(group: u16) -> bool {
    group == 0 || (8..=1024).contains(&group) && group.is_multiple_of(8)
}

#[cfg(test)]
mod tests;
