//! `Sparse`: rows of which only some values are stored, and where these are.
//!
//! A stored row is what its values share (the scales of a grid's groups, which count all columns), the pattern as bits, then the
//! values that are kept, one after the other. Every row of a matrix keeps as many, so rows are as long as each other and can be
//! cut, permuted and mapped like those of any storage. What is not kept is zero.

use crate::{
    Storage,
    grid::{self, Grid},
};
use std::fmt;

/// Values of a storage in a pattern.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Sparse {
    values: Values,
    pattern: Pattern,
}

/// What can be kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
enum Values {
    F32,
    F16,
    Bf16,
    Grid(Grid),
}

/// Which values of a row may be kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Pattern {
    /// `n` of every `m` neighbours.
    Of {
        /// At least 1.
        n: u8,
        /// More than `n`, at most 32.
        m: u8,
    },
    /// A share of each row, in whole blocks.
    Share {
        /// Thousandths that are not kept: 1 to 999.
        gone: u16,
        /// Rows and columns of a block, 1 to 16 each: `[1, 1]` where every value is by itself.
        block: [u8; 2],
    },
}

impl Pattern {
    /// Values of a row of `cols` that are kept.
    pub fn kept(self, cols: usize) -> usize {
        match self {
            Pattern::Of { n, m } => cols / usize::from(m) * usize::from(n),
            Pattern::Share { gone, block } => {
                let blocks = cols / usize::from(block[1]);
                (blocks - blocks * usize::from(gone) / 1000) * usize::from(block[1])
            }
        }
    }

    /// Columns of which a row must be a multiple.
    pub fn unit(self) -> usize {
        match self {
            Pattern::Of { m, .. } => m.into(),
            Pattern::Share { block, .. } => block[1].into(),
        }
    }

    /// Rows that share where their values are.
    pub fn rows(self) -> usize {
        if let Pattern::Share { block, .. } = self { block[0].into() } else { 1 }
    }

    /// Bits that say where the values of a row are: the last of `m` neighbours follows from the others.
    fn bits(self, cols: usize) -> usize {
        match self {
            Pattern::Of { m, .. } => cols / usize::from(m) * (usize::from(m) - 1),
            Pattern::Share { block, .. } => cols / usize::from(block[1]),
        }
    }

    /// The values of a row that are worth most together; of equals the first.
    pub fn choose(self, worth: &[f64]) -> Vec<bool> {
        let mut keep = vec![false; worth.len()];
        let (group, unit, kept) = match self {
            Pattern::Of { n, m } => (usize::from(m), 1, usize::from(n)),
            Pattern::Share { block, .. } => {
                let unit = usize::from(block[1]);
                (worth.len().max(1), unit, self.kept(worth.len()) / unit)
            }
        };
        for (keep, worth) in keep.chunks_exact_mut(group).zip(worth.chunks_exact(group)) {
            let sums: Vec<f64> = worth.chunks_exact(unit).map(|w| w.iter().sum()).collect();
            let mut order: Vec<usize> = (0..sums.len()).collect();
            order.sort_by(|a, b| sums[*b].total_cmp(&sums[*a]).then(a.cmp(b)));
            order[..kept].iter().for_each(|i| keep[i * unit..(i + 1) * unit].fill(true));
        }
        keep
    }

    /// Writes where the values of a row are.
    fn write(self, keep: &[bool], out: &mut [u8]) {
        out.fill(0);
        let mut at = 0;
        let mut put = |bit: bool| {
            out[at / 8] |= u8::from(bit) << (at % 8);
            at += 1;
        };
        match self {
            Pattern::Of { m, .. } => {
                let m = usize::from(m);
                keep.chunks_exact(m).for_each(|group| group[..m - 1].iter().for_each(|k| put(*k)));
            }
            Pattern::Share { block, .. } => keep.chunks_exact(block[1].into()).for_each(|unit| put(unit[0])),
        }
    }

    /// Calls `at` with each column that is kept, in rising order.
    fn read(self, bits: &[u8], cols: usize, mut at: impl FnMut(usize)) {
        let unit = match self {
            Pattern::Of { n, m } => {
                let (n, m) = (u32::from(n), usize::from(m));
                for group in 0..cols / m {
                    let mut word = bits_at(bits, group * (m - 1), m - 1);
                    if word.count_ones() < n {
                        word |= 1 << (m - 1);
                    }
                    while word != 0 {
                        at(group * m + word.trailing_zeros() as usize);
                        word &= word - 1;
                    }
                }
                return;
            }
            Pattern::Share { block, .. } => usize::from(block[1]),
        };
        for first in (0..cols / unit).step_by(32) {
            let mut word = bits_at(bits, first, 32.min(cols / unit - first));
            while word != 0 {
                let from = (first + word.trailing_zeros() as usize) * unit;
                (from..from + unit).for_each(&mut at);
                word &= word - 1;
            }
        }
    }
}

/// `len` bits from bit `at` on, at most 32; what lies beyond the bytes is zero.
#[inline(always)]
fn bits_at(bytes: &[u8], at: usize, len: usize) -> u64 {
    let from = at / 8;
    let word = match bytes.get(from..from + 8) {
        Some(bytes) => u64::from_le_bytes(std::array::from_fn(|i| bytes[i])),
        None => bytes[from.min(bytes.len())..].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    };
    word >> (at % 8) & ((1 << len) - 1)
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Pattern::Of { n, m } => write!(f, "{n}:{m}"),
            Pattern::Share { gone, block } => {
                write!(f, "{}%", f64::from(gone) / 10.0)?;
                if block == [1, 1] { Ok(()) } else { write!(f, "{}x{}", block[0], block[1]) }
            }
        }
    }
}

impl std::str::FromStr for Pattern {
    type Err = ();

    /// Reads `2:4`, `50%` or `50%16x1`.
    fn from_str(text: &str) -> Result<Pattern, ()> {
        if let Some((n, m)) = text.split_once(':') {
            let (n, m) = (n.parse().map_err(drop)?, m.parse().map_err(drop)?);
            return if n > 0 && n < m && m <= 32 { Ok(Pattern::Of { n, m }) } else { Err(()) };
        }
        let (share, block) = text.split_once('%').ok_or(())?;
        let gone = (share.parse::<f64>().map_err(drop)? * 10.0).round();
        let block = match block {
            "" => [1, 1],
            block => {
                let (rows, cols) = block.split_once('x').ok_or(())?;
                [rows.parse().map_err(drop)?, cols.parse().map_err(drop)?]
            }
        };
        let fits = (1.0..1000.0).contains(&gone) && block.iter().all(|side| (1..=16).contains(side));
        if fits { Ok(Pattern::Share { gone: gone as u16, block }) } else { Err(()) }
    }
}

impl Sparse {
    /// `None` of values that cannot be left out one by one: those of GGUF's blocks, and of what is sparse already.
    pub fn new(values: Storage, pattern: Pattern) -> Option<Sparse> {
        let values = match values {
            Storage::F32 => Values::F32,
            Storage::F16 => Values::F16,
            Storage::Bf16 => Values::Bf16,
            Storage::Grid(grid @ (Grid::Int { .. } | Grid::Levels { .. })) => Values::Grid(grid),
            Storage::Grid(_) | Storage::Sparse(_) => return None,
        };
        Some(Sparse { values, pattern })
    }

    /// How the values are stored.
    pub fn values(self) -> Storage {
        match self.values {
            Values::F32 => Storage::F32,
            Values::F16 => Storage::F16,
            Values::Bf16 => Storage::Bf16,
            Values::Grid(grid) => Storage::Grid(grid),
        }
    }

    /// Where they may be.
    pub fn pattern(self) -> Pattern {
        self.pattern
    }

    /// Can a row of `cols` values be stored so?
    pub fn fits(self, cols: usize) -> bool {
        cols.is_multiple_of(self.pattern.unit()) && self.values().fits(cols)
    }

    /// Bytes of what the values of a row share, of the pattern, and of the values.
    fn sizes(self, cols: usize) -> [usize; 3] {
        let kept = self.pattern.kept(cols);
        let pattern = self.pattern.bits(cols).div_ceil(8);
        match self.values {
            Values::F32 => [0, pattern, 4 * kept],
            Values::F16 | Values::Bf16 => [0, pattern, 2 * kept],
            Values::Grid(grid) => {
                let blocks = cols.div_ceil(grid.block_len_in(cols).max(1));
                [blocks * grid.header_bytes(), pattern, kept.div_ceil(8) * usize::from(grid.code_bits())]
            }
        }
    }

    /// Bytes of a row of `cols` values.
    pub fn row_bytes(self, cols: usize) -> usize {
        self.sizes(cols).iter().sum()
    }

    /// The parts of a stored row.
    fn parts(self, row: &[u8], cols: usize) -> [&[u8]; 3] {
        let [shared, pattern, _] = self.sizes(cols);
        let (shared, rest) = row.split_at(shared);
        let (pattern, values) = rest.split_at(pattern);
        [shared, pattern, values]
    }

    /// Which values of a stored row are kept.
    pub fn mask(self, row: &[u8], cols: usize) -> Vec<bool> {
        let mut keep = vec![false; cols];
        self.pattern.read(self.parts(row, cols)[1], cols, |j| keep[j] = true);
        keep
    }

    /// From a row as its values are stored without a pattern, of which those at `keep` stay: as many as the pattern says.
    ///
    /// # Panics
    /// If a length is another, which is the caller's fault.
    pub fn compact(self, dense: &[u8], keep: &[bool], out: &mut [u8]) {
        let cols = keep.len();
        assert_eq!(dense.len(), self.values().row_bytes(cols), "bytes of a row");
        assert_eq!(out.len(), self.row_bytes(cols), "bytes of a sparse row");
        let [shared, pattern, _] = self.sizes(cols);
        let (shared, rest) = out.split_at_mut(shared);
        let (pattern, values) = rest.split_at_mut(pattern);
        self.pattern.write(keep, pattern);
        let grid = match self.values {
            Values::Grid(grid) => grid,
            floats => {
                let width = if floats == Values::F32 { 4 } else { 2 };
                let kept = dense.chunks_exact(width).zip(keep).filter(|(_, keep)| **keep);
                return values.chunks_exact_mut(width).zip(kept).for_each(|(to, (from, _))| to.copy_from_slice(from));
            }
        };
        let (len, size, header) = (grid.block_len_in(cols), grid.block_bytes_in(cols), grid.header_bytes());
        let mut all = vec![0u8; cols.next_multiple_of(len.max(1))];
        for ((block, codes), shared) in
            dense.chunks_exact(size).zip(all.chunks_exact_mut(len)).zip(shared.chunks_exact_mut(header))
        {
            shared.copy_from_slice(&block[..header]);
            grid::unpack(grid, block, codes);
        }
        let mut kept: Vec<u8> = all.iter().zip(keep).filter(|(_, keep)| **keep).map(|(code, _)| *code).collect();
        kept.resize(kept.len().next_multiple_of(8), 0);
        grid::pack_bits(&kept, grid.code_bits(), values);
    }

    /// Rounds a row to the storage of its values and keeps those that are largest, each weighed by its importance.
    pub(crate) fn encode_row(self, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        let worth = |(j, x): (usize, &f32)| f64::from(*x).powi(2) * importance.map_or(1.0, |w| f64::from(w[j]));
        let keep = self.pattern.choose(&x.iter().enumerate().map(worth).collect::<Vec<f64>>());
        let held: Vec<f32> = x.iter().zip(&keep).map(|(x, keep)| if *keep { *x } else { 0.0 }).collect();
        let mut dense = vec![0u8; self.values().row_bytes(x.len())];
        crate::weight::encode_row(self.values(), &held, importance, &mut dense);
        self.compact(&dense, &keep, out);
    }

    /// Decodes a row.
    pub(crate) fn decode_row(self, row: &[u8], out: &mut [f32]) {
        let cols = out.len();
        let [shared, pattern, values] = self.parts(row, cols);
        out.fill(0.0);
        let mut next = 0;
        match self.values {
            Values::Grid(grid) => {
                let len = grid.block_len_in(cols).max(1);
                let blocks: Vec<_> =
                    shared.chunks_exact(grid.header_bytes()).map(|header| grid::header(grid, header)).collect();
                let codes = self.codes(grid, values, cols);
                self.pattern.read(pattern, cols, |j| {
                    out[j] = blocks[j / len].value(j % len, codes[next]);
                    next += 1;
                });
            }
            floats => {
                let mut kept = vec![0f32; self.pattern.kept(cols)];
                let storage = Sparse { values: floats, ..self }.values();
                crate::weight::decode_row(storage, values, &mut kept);
                self.pattern.read(pattern, cols, |j| {
                    out[j] = kept[next];
                    next += 1;
                });
            }
        }
    }

    fn codes(self, grid: Grid, values: &[u8], cols: usize) -> Vec<u8> {
        let mut codes = vec![0u8; self.pattern.kept(cols).next_multiple_of(8)];
        grid::unpack_bits(values, grid.code_bits(), &mut codes);
        codes
    }

    /// Calls `at` with each column of a stored row that is kept and its number among those.
    pub(crate) fn each_kept(self, row: &[u8], cols: usize, mut at: impl FnMut(usize, usize)) {
        let mut next = 0;
        self.pattern.read(self.parts(row, cols)[1], cols, |j| {
            at(j, next);
            next += 1;
        });
    }

    /// What the values of a stored row share, and the codes that are kept.
    pub(crate) fn kept_codes(self, grid: Grid, row: &[u8], cols: usize) -> (Vec<u8>, &[u8]) {
        let [shared, _, values] = self.parts(row, cols);
        (self.codes(grid, values, cols), shared)
    }

    /// The bytes of the floats that are kept.
    pub(crate) fn kept_floats(self, row: &[u8], cols: usize) -> &[u8] {
        self.parts(row, cols)[2]
    }
}

impl fmt::Display for Sparse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.values(), self.pattern)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Tensor, Weight};

    const NAMES: [&str; 9] = [
        "f32@50%",
        "bf16@2:4",
        "f16@62.5%",
        "int4g32@2:4",
        "int3g64a@50%1x4",
        "int8@4:8",
        "int5g24z@1:4",
        "nf4@50%16x1",
        "int4@7:16",
    ];

    fn wave(rows: usize, cols: usize) -> Tensor {
        Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| (i as f32 * 0.37).sin() + 0.01).collect())
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in NAMES {
            assert_eq!(Storage::parse(name).unwrap().name(), name);
        }
        for wrong in
            ["bf16@4:4", "bf16@0:4", "bf16@0%", "bf16@100%", "q4_k@2:4", "bf16@50%17x1", "bf16@", "bf16@2:4@2:4"]
        {
            assert!(Storage::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_kept_is_what_its_storage_makes_of_it_and_the_rest_is_zero() {
        let x = wave(5, 96);
        for name in NAMES {
            let storage = Storage::parse(name).unwrap();
            let Storage::Sparse(sparse) = storage else { panic!("{name}") };
            let weight = Weight::encode(&x, storage, None).unwrap();
            assert_eq!(weight.size_bytes(), 5 * sparse.row_bytes(96));
            let rows = weight.to_tensor();
            for r in 0..5 {
                let stored = weight.stored().unwrap().row(r).to_vec();
                let keep = sparse.mask(&stored, 96);
                assert_eq!(keep.iter().filter(|k| **k).count(), sparse.pattern().kept(96), "{name}");
                let held: Vec<f32> = x.row(r).iter().zip(&keep).map(|(x, k)| if *k { *x } else { 0.0 }).collect();
                let dense = Weight::encode(&Tensor::from_vec(1, 96, held), sparse.values(), None).unwrap().to_tensor();
                for (j, keep) in keep.iter().enumerate() {
                    let want = if *keep { dense.row(0)[j] } else { 0.0 };
                    assert_eq!(rows.row(r)[j], want, "{name} {r} {j}");
                }
                let dense =
                    Weight::encode(&Tensor::from_vec(1, 96, rows.row(r).to_vec()), sparse.values(), None).unwrap();
                let mut back = vec![0u8; stored.len()];
                sparse.compact(dense.stored().unwrap().row(0), &keep, &mut back);
                assert_eq!(sparse.mask(&back, 96), keep, "{name}");
            }
        }
    }

    #[test]
    fn the_largest_are_kept_and_zeros_fill_up() {
        let keep = |pattern: &str, x: &[f64]| pattern.parse::<Pattern>().unwrap().choose(x);
        assert_eq!(
            keep("2:4", &[1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 9.0]),
            [false, true, true, false, true, false, false, true]
        );
        assert_eq!(
            keep("50%1x2", &[9.0, 0.0, 4.0, 4.0, 1.0, 1.0, 2.0, 0.0]),
            [true, true, true, true, false, false, false, false]
        );
    }
}
