//! How a matrix is stored: the closed set of representations and what can be asked of each.
//!
//! How the values were chosen (a method) is not known here.

use crate::{Bytes, LowRank, Misfit, Storage, Tensor, grid::Grid, packed::Packed, stored::Stored};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

/// Why bytes do not make a weight.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightError {
    /// The bytes do not have the length that shape and storage ask for.
    #[error("{rows} x {cols} values stored as {storage} take {want} bytes, not {got}")]
    Length {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// The storage that was claimed.
        storage: Storage,
        /// Bytes that it takes.
        want: usize,
        /// Bytes that were given.
        got: usize,
    },
    /// A row cannot be cut into blocks of that storage.
    #[error("a row of {cols} values cannot be stored as {storage}: it takes multiples of {block}")]
    Row {
        /// Columns of the matrix.
        cols: usize,
        /// The storage that was asked for.
        storage: Storage,
        /// Its block length.
        block: usize,
    },
}

/// A matrix `[rows, cols]` = `[outputs, inputs]` as it is stored and multiplied.
#[derive(Clone, Debug)]
pub enum Weight {
    /// Plain floats.
    Dense(Stored),
    /// Codes on a grid, or values with holes.
    Quant(Stored),
    /// Either, laid out for fast products: made at load time, never saved.
    Packed(Packed),
    /// The product of two thin ones, and what they leave.
    LowRank(Box<LowRank>),
}

impl Weight {
    /// Gives bytes their meaning.
    ///
    /// # Errors
    /// If the length is wrong or rows do not divide into blocks.
    pub fn new(storage: Storage, rows: usize, cols: usize, bytes: Bytes) -> Result<Weight, WeightError> {
        if !storage.fits(cols) {
            return Err(WeightError::Row { cols, storage, block: storage.block_len() });
        }
        let want = storage.row_bytes(cols).saturating_mul(rows);
        if bytes.len() != want {
            return Err(WeightError::Length { rows, cols, storage, want, got: bytes.len() });
        }
        Ok(Weight::of(Stored::new(storage, rows, cols, bytes)))
    }

    /// Stores a tensor as 32-bit floats.
    pub fn from_tensor(x: Tensor) -> Weight {
        let (rows, cols) = (x.rows(), x.cols());
        Weight::Dense(Stored::new(Storage::F32, rows, cols, Bytes::from_f32(x.into_vec())))
    }

    /// Rounds a tensor to a storage: to nearest, or by the grid's own fit, row by row.
    ///
    /// `importance` weighs the squared error of each column (`[cols]`).
    ///
    /// # Errors
    /// If rows do not divide into blocks of that storage.
    pub fn encode(x: &Tensor, storage: Storage, importance: Option<&[f32]>) -> Result<Weight, WeightError> {
        let (rows, cols) = (x.rows(), x.cols());
        let width = storage.row_bytes(cols);
        let mut bytes = vec![0u8; rows * width];
        if !storage.fits(cols) {
            return Err(WeightError::Row { cols, storage, block: storage.block_len() });
        }
        if width > 0 {
            bytes.par_chunks_mut(width).enumerate().for_each(|(r, out)| encode_row(storage, x.row(r), importance, out));
        }
        Weight::new(storage, rows, cols, Bytes::from_vec(bytes))
    }

    fn of(stored: Stored) -> Weight {
        match stored.storage() {
            Storage::Grid(_) | Storage::Sparse(_) => Weight::Quant(stored),
            _ => Weight::Dense(stored),
        }
    }

    /// Becomes 32-bit floats with these values, in the same memory where it has that shape and nothing else shares it.
    pub fn set_floats(&mut self, values: &Tensor) {
        if let Weight::Dense(stored) = self
            && stored.set_floats(values)
        {
            return;
        }
        *self = Weight::from_tensor(values.clone());
    }

    /// The stored rows; `None` once they are packed, and of factors, which have them each ([`Weight::parts`]).
    pub fn stored(&self) -> Option<&Stored> {
        match self {
            Weight::Dense(s) | Weight::Quant(s) => Some(s),
            Weight::Packed(_) | Weight::LowRank(_) => None,
        }
    }

    /// The factors, if it is the product of two.
    pub fn low_rank(&self) -> Option<&LowRank> {
        match self {
            Weight::LowRank(low) => Some(low),
            _ => None,
        }
    }

    /// The matrices that it is stored as, each with the name of what it is: itself, without a name, or its factors.
    pub fn parts(&self) -> Vec<(&'static str, &Weight)> {
        self.low_rank().map_or_else(|| vec![("", self)], |low| low.parts().collect())
    }

    /// The same, to be taken.
    pub fn into_parts(self) -> Vec<Weight> {
        match self {
            Weight::LowRank(low) => low.into_parts(),
            whole => vec![whole],
        }
    }

    /// What [`Weight::into_parts`] took apart, or others of its shapes.
    ///
    /// # Errors
    /// If they do not fit each other.
    pub fn of_parts(parts: Vec<Weight>) -> Result<Weight, Misfit> {
        let shapes = || Misfit(parts.iter().map(|p| [p.rows(), p.cols()]).collect());
        let mut each = parts.clone().into_iter();
        match (each.next(), each.next(), each.next(), each.next()) {
            (Some(whole), None, ..) => Ok(whole),
            (Some(up), Some(down), rest, None) => Ok(Weight::LowRank(Box::new(LowRank::new(up, down, rest)?))),
            _ => Err(shapes()),
        }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        match self {
            Weight::Dense(s) | Weight::Quant(s) => s.rows(),
            Weight::Packed(p) => p.rows(),
            Weight::LowRank(l) => l.up().rows(),
        }
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        match self {
            Weight::Dense(s) | Weight::Quant(s) => s.cols(),
            Weight::Packed(p) => p.cols(),
            Weight::LowRank(l) => l.down().cols(),
        }
    }

    /// Number of values that it decodes to.
    pub fn len(&self) -> usize {
        self.rows() * self.cols()
    }

    /// Number of values that are stored: fewer than [`Weight::len`] where the product of two thin matrices stands for it.
    pub fn values(&self) -> usize {
        self.parts().iter().map(|(_, part)| part.len()).sum()
    }

    /// Has it no values?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How it is stored; of factors, how what they leave is, or they themselves where that is nothing.
    pub fn storage(&self) -> Storage {
        match self {
            Weight::Dense(s) | Weight::Quant(s) => s.storage(),
            Weight::Packed(p) => p.storage(),
            Weight::LowRank(l) => l.storage(),
        }
    }

    /// How it is stored, in words: `q4_k`, `rank 64 of f16`, `q4_k + rank 16 of int8`.
    pub fn name(&self) -> String {
        let Some(low) = self.low_rank() else { return self.storage().name() };
        let rest = low.rest().map(|rest| format!("{} + ", rest.storage())).unwrap_or_default();
        format!("{rest}rank {} of {}", low.rank(), low.down().storage())
    }

    /// The grid, if it lies on one.
    pub fn grid(&self) -> Option<Grid> {
        match self.storage() {
            Storage::Grid(grid) => Some(grid),
            _ => None,
        }
    }

    /// Payload as it is stored, scales included.
    pub fn size_bytes(&self) -> usize {
        self.parts().iter().map(|(_, part)| part.storage().row_bytes(part.cols()) * part.rows()).sum()
    }

    /// The stored bytes, row by row; those of a packed matrix are gone, and factors have their own ([`Weight::parts`]).
    pub fn bytes(&self) -> &Bytes {
        static GONE: std::sync::OnceLock<Bytes> = std::sync::OnceLock::new();
        self.stored().map_or_else(|| GONE.get_or_init(|| Bytes::from_vec(Vec::new())), Stored::bytes)
    }

    /// Decodes one row into `out` (`[cols]`).
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Weight::Dense(s) | Weight::Quant(s) => decode_row(s.storage(), s.row(row), out),
            Weight::Packed(p) => p.decode_row(row, out),
            Weight::LowRank(l) => l.decode_row(row, out),
        }
    }

    /// Decodes everything.
    pub fn to_tensor(&self) -> Tensor {
        if let Weight::LowRank(low) = self {
            return low.to_tensor();
        }
        let mut out = Tensor::zeros(self.rows(), self.cols());
        let cols = self.cols().max(1);
        out.as_mut_slice().par_chunks_mut(cols).enumerate().for_each(|(r, row)| self.decode_row(r, row));
        out
    }

    /// Mean bits of information of a code: the entropy of how often each is used, at most the bits that it takes. `None` for
    /// floats, and where the codes are packed.
    pub fn code_entropy(&self) -> Option<f64> {
        let (grid, stored) = (self.grid()?, self.stored()?);
        let counts = (0..self.rows())
            .into_par_iter()
            .fold(
                || [0u64; 256],
                |mut counts, row| {
                    grid.count_codes(stored.row(row), self.cols(), &mut counts);
                    counts
                },
            )
            .reduce(|| [0; 256], |a, b| std::array::from_fn(|i| a[i] + b[i]));
        let total = counts.iter().sum::<u64>() as f64;
        let share = counts.iter().filter(|c| **c > 0).map(|c| *c as f64 / total);
        Some(share.map(|p| -p * p.log2()).sum())
    }

    /// Rows `from..to` without a copy; `None` where there are not so many, or they are packed.
    pub fn row_range(&self, from: usize, to: usize) -> Option<Weight> {
        if let Weight::LowRank(low) = self {
            return low.of_rows(|part| part.row_range(from, to)).map(|low| Weight::LowRank(Box::new(low)));
        }
        self.stored()?.range(from, to).map(Weight::of)
    }

    /// The listed rows, without a copy: any storage can be permuted along its outputs.
    pub fn select_rows(&self, rows: &[usize]) -> Weight {
        match self {
            Weight::Dense(s) | Weight::Quant(s) => Weight::of(s.select(rows)),
            Weight::Packed(_) => Weight::from_tensor(self.to_tensor().select_rows(rows)),
            Weight::LowRank(low) => match low.of_rows(|part| Some(part.select_rows(rows))) {
                Some(low) => Weight::LowRank(Box::new(low)),
                None => Weight::from_tensor(self.to_tensor().select_rows(rows)),
            },
        }
    }

    /// Matrices one below the other; `None` where storages or columns differ, or for none at all.
    pub fn concat_rows(parts: &[Weight]) -> Option<Weight> {
        let first = parts.first()?;
        if parts.len() == 1 {
            return Some(first.clone());
        }
        if parts.iter().any(|p| p.stored().is_none() || p.storage() != first.storage() || p.cols() != first.cols()) {
            return None;
        }
        let bytes = parts.iter().flat_map(|p| p.bytes().iter().copied()).collect();
        let rows = parts.iter().map(Weight::rows).sum();
        Weight::new(first.storage(), rows, first.cols(), Bytes::from_vec(bytes)).ok()
    }

    /// The transposed matrix, kept in its float type; `None` for codes on a grid, whose rows are indivisible.
    pub fn transposed(&self) -> Option<Weight> {
        let Weight::Dense(s) = self else { return None };
        let (rows, cols, width) = (s.rows(), s.cols(), s.storage().row_bytes(1));
        let mut bytes = vec![0u8; rows * cols * width];
        for r in 0..rows {
            for (c, value) in s.row(r).chunks_exact(width).enumerate() {
                bytes[(c * rows + r) * width..][..width].copy_from_slice(value);
            }
        }
        Weight::new(s.storage(), cols, rows, Bytes::from_vec(bytes)).ok()
    }
}

/// Rounds one row to a storage.
pub(crate) fn encode_row(storage: Storage, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    match storage {
        Storage::F32 => out.chunks_exact_mut(4).zip(x).for_each(|(o, v)| o.copy_from_slice(&v.to_le_bytes())),
        Storage::F16 => {
            out.chunks_exact_mut(2).zip(x).for_each(|(o, v)| o.copy_from_slice(&f16::from_f32(*v).to_le_bytes()))
        }
        Storage::Bf16 => {
            out.chunks_exact_mut(2).zip(x).for_each(|(o, v)| o.copy_from_slice(&bf16::from_f32(*v).to_le_bytes()))
        }
        Storage::Grid(grid) => grid.quantize_row(x, importance, out),
        Storage::Sparse(sparse) => sparse.encode_row(x, importance, out),
    }
}

/// Decodes one stored row.
pub(crate) fn decode_row(storage: Storage, bytes: &[u8], out: &mut [f32]) {
    match storage {
        Storage::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = f32::from_le_bytes(*b);
            }
        }
        Storage::F16 => {
            // Files begin their tensors at even places, whose values are converted many at a time.
            if let Ok(halves) = bytemuck::try_cast_slice::<u8, f16>(bytes)
                && cfg!(target_endian = "little")
                && halves.len() == out.len()
            {
                return halves.convert_to_f32_slice(out);
            }
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        Storage::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
        Storage::Grid(grid) => grid.decode_row(bytes, out),
        Storage::Sparse(sparse) => sparse.decode_row(bytes, out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(rows: usize, cols: usize) -> Tensor {
        Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| (i as f32 * 0.37).sin()).collect())
    }

    #[test]
    fn float_storages_round_trip_within_their_precision() {
        let x = ramp(5, 40);
        for (storage, bound) in [(Storage::F32, 0.0), (Storage::F16, 5e-4), (Storage::Bf16, 4e-3)] {
            let y = Weight::encode(&x, storage, None).unwrap().to_tensor();
            for (a, b) in x.as_slice().iter().zip(y.as_slice()) {
                assert!((a - b).abs() <= bound, "{storage}: {a} {b}");
            }
        }
    }

    #[test]
    fn rows_can_be_cut_and_permuted_in_any_storage() {
        let x = ramp(6, 32);
        for storage in [Storage::F32, Storage::Bf16, Storage::Grid(Grid::Q4_0), Storage::Grid(Grid::Q8_0)] {
            let w = Weight::encode(&x, storage, None).unwrap();
            let all = w.to_tensor();
            assert_eq!(w.row_range(2, 4).unwrap().to_tensor().row(1), all.row(3));
            let picked = w.select_rows(&[5, 0, 3]);
            assert_eq!(picked.to_tensor().row(0), all.row(5));
            // Picked from once more, cut, and as bytes that another weight takes.
            let again = picked.select_rows(&[2, 0]).row_range(0, 1).unwrap();
            assert_eq!(again.to_tensor().as_slice(), all.row(3));
            let copied = Weight::new(storage, 3, 32, picked.bytes().clone()).unwrap();
            assert_eq!(copied.to_tensor(), picked.to_tensor());
            assert!(w.row_range(5, 7).is_none());
        }
    }

    #[test]
    fn wrong_lengths_are_errors() {
        let e = Weight::new(Storage::F16, 2, 3, Bytes::from_vec(vec![0; 11])).unwrap_err();
        assert!(e.to_string().contains("12 bytes, not 11"), "{e}");
        let e = Weight::new(Storage::Grid(Grid::Q4K), 1, 100, Bytes::from_vec(vec![0; 144])).unwrap_err();
        assert!(e.to_string().contains("multiples of 256"), "{e}");
    }
}
