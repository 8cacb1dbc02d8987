//! Grids: where the values of a quantized matrix may lie, and the bytes that store them.
//!
//! A grid knows how to fit the scales of a block, to round a value to the nearest code, and to encode and
//! decode. How values are chosen before they are rounded (nearest, GPTQ ...) is a method's business.
//!
//! Formats: GGUF's block types, bit for bit as in llama.cpp's `ggml-common.h`, and planish's own groups, of whole
//! numbers of 2 to 8 bits or of the levels of a table, whose scales may span a whole row.

mod block;
mod fit;
mod learned;
mod name;
mod pack;
mod table;

pub use block::Block;
pub use learned::{Moved, Scales};
pub use name::GridError;
pub(crate) use pack::{half_power, scales, unpack, unpack_bits, widen};
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
        Grid::Q2K,
        Grid::Q3K,
        Grid::Iq4Xs,
        Grid::Mxfp4,
        Grid::Q4K,
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
            Grid::Q2K | Grid::Q3K | Grid::Q4K | Grid::Q5K | Grid::Q6K | Grid::Iq4Xs => 256,
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
            Grid::Q2K => 84,
            Grid::Q3K => 110,
            Grid::Iq4Xs => 136,
            Grid::Q4K => 144,
            Grid::Q5K => 176,
            Grid::Q6K => 210,
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
        let mut codes = [0u8; 256];
        for (bytes, out) in bytes.chunks_exact(self.bytes_of(256)).zip(out.chunks_mut(256)) {
            let block = pack::header(self, bytes);
            unpack(self, bytes, &mut codes);
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
        let block = pack::header(self, bytes);
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
            for (col, (code, v)) in codes.iter_mut().zip(x).enumerate() {
                *code = block.round(col, *v).0;
            }
            self.encode(&block, &codes[..x.len()], out);
        }
    }
}

/// Can so many values share a scale?
fn group_fits(group: u16) -> bool {
    group == 0 || (8..=1024).contains(&group) && group.is_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Uniform in -1 to 1, by a fixed generator.
    pub(super) fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = move || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next() + next() * next() * 2.0).collect()
    }

    pub(super) fn all() -> Vec<Grid> {
        let mut all = Grid::GGUF.to_vec();
        for bits in 2..=8 {
            for group in [8, 32, 128, 1024] {
                all.extend([Zero::Middle, Zero::Minimum, Zero::Point].map(|z| Grid::int(bits, group, z).unwrap()));
            }
            all.extend([Zero::Middle, Zero::Point].map(|z| Grid::int(bits, 0, z).unwrap()));
        }
        for table in [Table::Nf4, Table::E4m3, Table::E5m2] {
            all.extend([0, 32, 64, 128].map(|group| Grid::Levels { table, group }));
        }
        all
    }

    /// Columns of a row that is one block.
    fn one_block(grid: Grid) -> usize {
        if grid.is_by_row() { 88 } else { grid.block_len() }
    }

    #[test]
    fn names_round_trip_and_a_wrong_one_says_what_there_is() {
        for grid in all() {
            assert_eq!(Grid::parse(&grid.name().to_uppercase()), Ok(grid));
        }
        for bad in ["q9_0", "int1g32", "int4g30", "int4g0", "int4g2048", "int4a", "fp8", "nf4g", ""] {
            assert!(Grid::parse(bad).unwrap_err().to_string().contains("iq4_nl"), "{bad}");
        }
    }

    #[test]
    fn a_block_gives_the_values_that_its_bytes_decode_to() {
        for grid in all() {
            for seed in 0..20 {
                let x = noise(one_block(grid), seed);
                let block = grid.fit(&x, None);
                let rounded: Vec<(u8, f32)> = x.iter().enumerate().map(|(i, v)| block.round(i, *v)).collect();
                let codes: Vec<u8> = rounded.iter().map(|r| r.0).collect();
                let mut bytes = vec![0; grid.row_bytes(x.len())];
                grid.encode(&block, &codes, &mut bytes);
                let mut decoded = vec![0.0; x.len()];
                grid.decode_row(&bytes, &mut decoded);
                for i in 0..x.len() {
                    assert_eq!(decoded[i], rounded[i].1, "{} value {i}", grid.name());
                    assert_eq!(decoded[i], block.value(i, codes[i]), "{} value {i}", grid.name());
                }
            }
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_level() {
        for grid in all() {
            let x = noise(one_block(grid), 3);
            let block = grid.fit(&x, None);
            for (i, v) in x.iter().enumerate() {
                let (code, value) = block.round(i, *v);
                for other in [code.wrapping_sub(1), code + 1] {
                    // Codes of an eight-bit float end where numbers do.
                    if other <= block.highest() && block.value(i, other).is_finite() {
                        let worse = (block.value(i, other) - v).abs();
                        assert!((value - v).abs() <= worse * 1.0001 + 1e-7, "{} {v} {value}", grid.name());
                    }
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zero_and_odd_values_do_no_harm() {
        for grid in all() {
            let n = one_block(grid);
            let mut bytes = vec![0; grid.row_bytes(n)];
            let mut out = vec![1.0; n];
            grid.quantize_row(&vec![0.0; n], None, &mut bytes);
            grid.decode_row(&bytes, &mut out);
            assert!(out.iter().all(|v| *v == 0.0), "{}", grid.name());
            for odd in [f32::NAN, f32::INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-30] {
                let mut x = noise(n, 5);
                x[0] = odd;
                grid.quantize_row(&x, None, &mut bytes);
            }
            for fill in [0x00, 0xff, 0x7f, 0x80, 0xaa] {
                grid.decode_row(&vec![fill; grid.row_bytes(n)], &mut out);
            }
        }
    }

    #[test]
    fn every_instruction_set_decodes_to_the_same_bits() {
        for grid in all() {
            let cols = 3 * one_block(grid) - if matches!(grid, Grid::Int { .. } | Grid::Levels { .. }) { 5 } else { 0 };
            let mut bytes = vec![0; grid.row_bytes(cols)];
            for seed in 1..6 {
                grid.quantize_row(&noise(cols, seed), None, &mut bytes);
                let decode = |k: &crate::kernels::Kernels| {
                    let mut out = vec![0.0; cols];
                    (k.decode_row)(grid, &bytes, &mut out);
                    out.iter().map(|v: &f32| v.to_bits()).collect::<Vec<u32>>()
                };
                let tables: Vec<_> = crate::kernels::available().collect();
                for k in &tables {
                    assert!(decode(k) == decode(tables[0]), "{} {}", grid.name(), k.isa);
                }
            }
        }
    }

    #[test]
    fn short_last_groups_are_padded() {
        let grid = Grid::int(3, 32, Zero::Middle).unwrap();
        let x = noise(44, 1);
        let mut bytes = vec![0; grid.row_bytes(44)];
        grid.quantize_row(&x, None, &mut bytes);
        let mut out = vec![0.0; 44];
        grid.decode_row(&bytes, &mut out);
        let error: f32 = x.iter().zip(&out).map(|(a, b)| (a - b) * (a - b)).sum();
        assert!(bytes.len() == 28 && error < 0.1 * x.iter().map(|v| v * v).sum::<f32>());
    }

    #[test]
    fn more_bits_cost_less_error() {
        let x = noise(2560, 11);
        let power: f32 = x.iter().map(|v| v * v).sum();
        let error = |grid: Grid| {
            let mut bytes = vec![0; grid.row_bytes(x.len())];
            grid.quantize_row(&x, None, &mut bytes);
            let mut out = vec![0.0; x.len()];
            grid.decode_row(&bytes, &mut out);
            x.iter().zip(&out).map(|(a, b)| (a - b) * (a - b)).sum::<f32>() / power
        };
        let bounds = [
            (Grid::Q2K, 0.09),
            (Grid::Q3K, 0.023),
            (Grid::Iq4Xs, 0.0065),
            (Grid::Mxfp4, 0.014),
            (Grid::Levels { table: Table::Nf4, group: 64 }, 0.0085),
            (Grid::Levels { table: Table::E4m3, group: 0 }, 0.0008),
            (Grid::Levels { table: Table::E5m2, group: 0 }, 0.003),
            (Grid::Int { bits: 8, group: 0, zero: Zero::Middle }, 0.0001),
            (Grid::Int { bits: 4, group: 64, zero: Zero::Point }, 0.0085),
            (Grid::Q4K, 0.0055),
            (Grid::Q4_0, 0.008),
            (Grid::Iq4Nl, 0.008),
            (Grid::Q4_1, 0.006),
            (Grid::Q5K, 0.0013),
            (Grid::Q5_0, 0.002),
            (Grid::Q5_1, 0.0014),
            (Grid::Q6K, 0.0004),
            (Grid::Q8_0, 0.00003),
        ];
        for (grid, bound) in bounds {
            assert!(error(grid) < bound, "{} {}", grid.name(), error(grid));
        }
        for group in [32, 128] {
            for bits in 3..=8 {
                let (more, less) =
                    (Grid::int(bits, group, Zero::Middle).unwrap(), Grid::int(bits - 1, group, Zero::Middle).unwrap());
                assert!(error(more) < 0.4 * error(less), "{}", more.name());
            }
        }
    }
}
