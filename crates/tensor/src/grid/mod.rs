//! Grids: where the values of a quantized matrix may lie, and the bytes that store them.
//!
//! A grid knows how to fit the scales of a block, to round a value to the nearest code, and to encode and
//! decode. How values are chosen before they are rounded (nearest, GPTQ ...) is a method's business.
//!
//! Formats: GGUF's block types, bit for bit as in llama.cpp's `ggml-common.h`, and planish's own integer
//! groups of any width from 2 to 8 bits.

mod block;
mod fit;
mod learned;
mod pack;

pub use block::Block;
pub(crate) use block::IQ4_NL;
pub use learned::Scales;
pub(crate) use pack::{scales, unpack, widen};

use crate::kernels::kernels;

/// A way to store values as codes with shared scales.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Grid {
    /// Planish's own: per group one 16-bit scale (and one 16-bit minimum), then the codes, bit-packed.
    Int {
        /// Bits of a code, 2 to 8.
        bits: u8,
        /// Values that share a scale: a multiple of 8 from 8 to 1024.
        group: u16,
        /// Has each group a minimum, or is zero in the middle of the codes?
        asymmetric: bool,
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
}

/// A name that no grid has.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[error(
    "no storage is called {0:?}; there are f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, \
     q6_k, iq4_nl and int<2..8>g<group>[a], for example int4g32 or int3g64a (group: a multiple of 8 up to 1024)"
)]
pub struct GridError(pub String);

/// Longest block of any grid.
pub const LONGEST: usize = 1024;

impl Grid {
    /// The grids of GGUF files, by rising size.
    pub const GGUF: &[Grid] = &[
        Grid::Q2K,
        Grid::Q3K,
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

    /// Its name in recipes, reports and on the command line.
    pub fn name(self) -> String {
        let fixed = match self {
            Grid::Int { bits, group, asymmetric } => {
                return format!("int{bits}g{group}{}", if asymmetric { "a" } else { "" });
            }
            Grid::Q4_0 => "q4_0",
            Grid::Q4_1 => "q4_1",
            Grid::Q5_0 => "q5_0",
            Grid::Q5_1 => "q5_1",
            Grid::Q8_0 => "q8_0",
            Grid::Q2K => "q2_k",
            Grid::Q3K => "q3_k",
            Grid::Q4K => "q4_k",
            Grid::Q5K => "q5_k",
            Grid::Q6K => "q6_k",
            Grid::Iq4Nl => "iq4_nl",
        };
        fixed.into()
    }

    /// The grid of that name, in any case.
    ///
    /// # Errors
    /// If nothing has that name; the message lists what there is.
    pub fn parse(name: &str) -> Result<Grid, GridError> {
        let lower = name.to_ascii_lowercase();
        if let Some(grid) = Grid::GGUF.iter().find(|g| g.name() == lower) {
            return Ok(*grid);
        }
        let int = || {
            let rest = lower.strip_prefix("int")?;
            let (rest, asymmetric) = rest.strip_suffix('a').map_or((rest, false), |r| (r, true));
            let (bits, group) = rest.split_once('g')?;
            Grid::int(bits.parse().ok()?, group.parse().ok()?, asymmetric)
        };
        int().ok_or_else(|| GridError(name.into()))
    }

    /// Planish's own grid, where bits are 2 to 8 and the group is a multiple of 8 from 8 to 1024.
    pub fn int(bits: u8, group: u16, asymmetric: bool) -> Option<Grid> {
        let fits = (2..=8).contains(&bits) && (8..=1024).contains(&group) && group.is_multiple_of(8);
        fits.then_some(Grid::Int { bits, group, asymmetric })
    }

    /// Values in a block.
    pub fn block_len(self) -> usize {
        match self {
            Grid::Int { group, .. } => group.into(),
            Grid::Q4_0 | Grid::Q4_1 | Grid::Q5_0 | Grid::Q5_1 | Grid::Q8_0 | Grid::Iq4Nl => 32,
            Grid::Q2K | Grid::Q3K | Grid::Q4K | Grid::Q5K | Grid::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Grid::Int { bits, group, asymmetric } => {
                2 + 2 * usize::from(asymmetric) + usize::from(bits) * usize::from(group) / 8
            }
            Grid::Q4_0 | Grid::Iq4Nl => 18,
            Grid::Q4_1 => 20,
            Grid::Q5_0 => 22,
            Grid::Q5_1 => 24,
            Grid::Q8_0 => 34,
            Grid::Q2K => 84,
            Grid::Q3K => 110,
            Grid::Q4K => 144,
            Grid::Q5K => 176,
            Grid::Q6K => 210,
        }
    }

    /// Can a row of `cols` values be stored? The last group of planish's own grids may be short.
    pub fn fits(self, cols: usize) -> bool {
        match self {
            Grid::Int { .. } => cols > 0,
            _ => cols > 0 && cols.is_multiple_of(self.block_len()),
        }
    }

    /// Bytes of a row of `cols` values; a short last group is padded to a whole one.
    pub fn row_bytes(self, cols: usize) -> usize {
        cols.div_ceil(self.block_len()) * self.block_bytes()
    }

    /// Bits per value of a whole block, scales included.
    pub fn bits_per_weight(self) -> f64 {
        8.0 * self.block_bytes() as f64 / self.block_len() as f64
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
        if self.block_len() == 32 && !matches!(self, Grid::Int { .. }) {
            return pack::decode_plain(self, bytes, out);
        }
        if let Grid::Int { bits, group, asymmetric: false } = self {
            return pack::decode_symmetric(bits, group.into(), bytes, out);
        }
        let mut codes = [0u8; LONGEST];
        let len = self.block_len();
        for (bytes, out) in bytes.chunks_exact(self.block_bytes()).zip(out.chunks_mut(len)) {
            let block = pack::header(self, bytes);
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
    /// If `out` is not [`Grid::block_bytes`] long, which is the caller's fault.
    pub fn encode(self, block: &Block, codes: &[u8], out: &mut [u8]) {
        assert_eq!(out.len(), self.block_bytes(), "bytes of a block");
        let mut whole = [0u8; LONGEST];
        whole[..codes.len()].copy_from_slice(codes);
        pack::write(self, block, &whole[..self.block_len()], out);
    }

    /// Rounds a row to nearest after fitting each block.
    ///
    /// # Panics
    /// If `out` is not [`Grid::row_bytes`] long or there are fewer importances than values, which is the caller's
    /// fault.
    pub fn quantize_row(self, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        assert_eq!(out.len(), self.row_bytes(x.len()), "bytes of a row");
        let len = self.block_len();
        let mut codes = [0u8; LONGEST];
        for (i, (x, out)) in x.chunks(len).zip(out.chunks_exact_mut(self.block_bytes())).enumerate() {
            let block = self.fit(x, importance.map(|w| &w[i * len..i * len + x.len()]));
            for (col, (code, v)) in codes.iter_mut().zip(x).enumerate() {
                *code = block.round(col, *v).0;
            }
            self.encode(&block, &codes[..x.len()], out);
        }
    }
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
                all.extend([false, true].map(|a| Grid::int(bits, group, a).unwrap()));
            }
        }
        all
    }

    #[test]
    fn names_round_trip_and_a_wrong_one_says_what_there_is() {
        for grid in all() {
            assert_eq!(Grid::parse(&grid.name().to_uppercase()), Ok(grid));
        }
        for bad in ["q9_0", "int1g32", "int4g30", "int4g0", "int4g2048", "int4", ""] {
            assert!(Grid::parse(bad).unwrap_err().to_string().contains("iq4_nl"), "{bad}");
        }
    }

    #[test]
    fn a_block_gives_the_values_that_its_bytes_decode_to() {
        for grid in all() {
            for seed in 0..20 {
                let x = noise(grid.block_len(), seed);
                let block = grid.fit(&x, None);
                let rounded: Vec<(u8, f32)> = x.iter().enumerate().map(|(i, v)| block.round(i, *v)).collect();
                let codes: Vec<u8> = rounded.iter().map(|r| r.0).collect();
                let mut bytes = vec![0; grid.block_bytes()];
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
            let x = noise(grid.block_len(), 3);
            let block = grid.fit(&x, None);
            for (i, v) in x.iter().enumerate() {
                let (code, value) = block.round(i, *v);
                for other in [code.wrapping_sub(1), code + 1] {
                    if other <= block.highest() {
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
            let n = grid.block_len();
            let mut bytes = vec![0; grid.block_bytes()];
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
                grid.decode_row(&vec![fill; grid.block_bytes()], &mut out);
            }
        }
    }

    #[test]
    fn every_instruction_set_decodes_to_the_same_bits() {
        for grid in all() {
            let cols = 3 * grid.block_len() - if matches!(grid, Grid::Int { .. }) { 5 } else { 0 };
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
        let grid = Grid::int(3, 32, false).unwrap();
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
                let (more, less) = (Grid::int(bits, group, false).unwrap(), Grid::int(bits - 1, group, false).unwrap());
                assert!(error(more) < 0.4 * error(less), "{}", more.name());
            }
        }
    }
}
