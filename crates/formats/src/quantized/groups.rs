//! What all these formats come down to: codes, and for groups of a row's columns a scale and a code that stands for zero.

use half::f16;
use rayon::prelude::*;
use tensor::{
    Bytes, Storage, Tensor, Weight,
    grid::{Grid, Zero},
};

/// A matrix of codes.
pub struct Groups {
    pub rows: usize,
    pub cols: usize,
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Columns that share a scale; `cols` where a row does.
    pub group: usize,
    /// `[rows, cols]`.
    pub codes: Vec<u8>,
    /// `[rows, groups]`.
    pub scales: Vec<f32>,
    /// `[rows, groups]`: the code that stands for zero; it may lie one beyond the highest.
    pub zeros: Vec<u16>,
    /// The group of each column, where they do not follow each other.
    pub order: Option<Vec<u32>>,
}

impl Groups {
    /// Groups of a row.
    pub fn per_row(&self) -> usize {
        self.cols.div_ceil(self.group.max(1))
    }

    /// The storage that holds these groups exactly; `Err` says why none does.
    fn grid(&self) -> Result<Grid, String> {
        if self.order.is_some() {
            return Err("its groups follow the activations (desc_act), not the columns".into());
        }
        let middle = 1u16 << (self.bits - 1);
        let zero = if self.zeros.iter().all(|z| *z == middle) { Zero::Middle } else { Zero::Point };
        if self.zeros.iter().any(|z| *z > 255) {
            return Err("a code beyond eight bits stands for zero".into());
        }
        let row = self.group >= self.cols;
        let exact = |s: &f32| f16::from_f32(*s).to_f32() == *s;
        if !row && !self.scales.iter().all(exact) {
            return Err("its scales are no 16-bit floats".into());
        }
        let group = if row { Some(0) } else { u16::try_from(self.group).ok() };
        let grid = group.and_then(|group| Grid::int(self.bits, group, zero));
        grid.ok_or_else(|| format!("no storage has {} bits in groups of {}", self.bits, self.group))
    }

    /// The matrix in planish's storage, or decoded, with the reason.
    pub fn into_weight(self) -> (Weight, Option<String>) {
        let grid = match self.grid() {
            Ok(grid) => grid,
            Err(reason) => return (self.decoded(), Some(reason)),
        };
        let (width, size) = (grid.row_bytes(self.cols), grid.block_bytes_in(self.cols));
        let mut bytes = vec![0u8; self.rows * width];
        let per_row = self.per_row();
        bytes.par_chunks_mut(width.max(1)).enumerate().for_each(|(r, out)| {
            let codes = self.codes[r * self.cols..(r + 1) * self.cols].chunks(self.group.max(1));
            for (g, (codes, out)) in codes.zip(out.chunks_exact_mut(size)).enumerate() {
                let at = r * per_row + g;
                grid.encode(&grid.block_of(self.scales[at], self.zeros[at] as u8), codes, out);
            }
        });
        match Weight::new(Storage::Grid(grid), self.rows, self.cols, Bytes::from_vec(bytes)) {
            Ok(weight) => (weight, None),
            Err(e) => (self.decoded(), Some(e.to_string())),
        }
    }

    fn decoded(&self) -> Weight {
        let mut out = Tensor::zeros(self.rows, self.cols);
        let per_row = self.per_row();
        out.as_mut_slice().par_chunks_mut(self.cols.max(1)).enumerate().for_each(|(r, out)| {
            for (c, out) in out.iter_mut().enumerate() {
                let group = self.order.as_ref().map_or(c / self.group.max(1), |order| order[c] as usize);
                let at = r * per_row + group;
                let level = i32::from(self.codes[r * self.cols + c]) - i32::from(self.zeros[at]);
                *out = self.scales[at] * level as f32;
            }
        });
        Weight::from_tensor(out)
    }

    /// The codes of a stored matrix. `Err` says why it has none of this kind.
    pub fn of(weight: &Weight) -> Result<Groups, String> {
        let storage = weight.storage();
        let other = || format!("{storage} is no scale times a code less a whole number");
        let Storage::Grid(grid) = storage else { return Err(other()) };
        let (bits, zero) = match grid {
            Grid::Int { bits, zero: Zero::Middle | Zero::Point, .. } => (bits, 1u16 << (bits - 1)),
            Grid::Q4_0 => (4, 8),
            Grid::Q5_0 => (5, 16),
            Grid::Q8_0 => (8, 128),
            _ => return Err(other()),
        };
        let Some(stored) = weight.stored() else { return Err(other()) };
        let (rows, cols) = (weight.rows(), weight.cols());
        let (group, size) = (grid.block_len_in(cols).min(cols.max(1)), grid.block_bytes_in(cols));
        let per_row = cols.div_ceil(group);
        let mut out = Groups {
            rows,
            cols,
            bits,
            group,
            codes: vec![0; rows * cols],
            scales: vec![0.0; rows * per_row],
            zeros: vec![zero; rows * per_row],
            order: None,
        };
        let scales = out.scales.par_chunks_mut(per_row.max(1)).zip(out.zeros.par_chunks_mut(per_row.max(1)));
        let rows = out.codes.par_chunks_mut(cols.max(1)).zip(scales);
        rows.enumerate().for_each(|(r, (codes, (scales, zeros)))| {
            for (g, (bytes, codes)) in stored.row(r).chunks_exact(size).zip(codes.chunks_mut(group)).enumerate() {
                let (scale, zero) = grid.read_block(bytes, codes);
                scales[g] = scale;
                if let Some(zero) = zero {
                    zeros[g] = zero.into();
                }
            }
        });
        Ok(out)
    }

    /// The scale of a group of a row.
    pub fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales[row * self.per_row() + group]
    }

    /// The code of zero of a group of a row.
    pub fn zero(&self, row: usize, group: usize) -> u16 {
        self.zeros[row * self.per_row() + group]
    }

    /// Is zero the middle of the codes everywhere?
    pub fn is_symmetric(&self) -> bool {
        self.zeros.iter().all(|z| *z == 1 << (self.bits - 1))
    }
}

/// Reads codes of `bits` bits that follow each other in little-endian words, from bit `from` on.
pub fn code_at(words: impl Fn(usize) -> u32, bits: u8, from: usize) -> u8 {
    let (word, shift) = (from / 32, from % 32);
    let low = words(word) >> shift;
    let high = if shift + usize::from(bits) > 32 { words(word + 1) << (32 - shift) } else { 0 };
    ((low | high) & ((1u32 << bits) - 1)) as u8
}

/// Adds a code to words as [`code_at`] reads them.
pub fn put_code(words: &mut [u32], step: usize, bits: u8, from: usize, code: u8) {
    let (word, shift) = (from / 32, from % 32);
    words[word * step] |= u32::from(code) << shift;
    if shift + usize::from(bits) > 32 {
        words[(word + 1) * step] |= u32::from(code) >> (32 - shift);
    }
}
