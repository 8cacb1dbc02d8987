//! A matrix as the product of two thin ones, and what they leave.

use crate::{Storage, Tensor, Weight};
use rayon::prelude::*;

/// `up down + rest`: few numbers where the rank is small, and fewer multiplications.
#[derive(Clone, Debug)]
pub struct LowRank {
    up: Weight,
    down: Weight,
    rest: Option<Weight>,
}

/// Why matrices do not make a [`LowRank`].
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[error(
    "matrices of {0:?} do not make one of low rank: that takes [outputs, rank], [rank, inputs] and at most [outputs, inputs]"
)]
pub struct Misfit(pub(crate) Vec<[usize; 2]>);

impl LowRank {
    /// Of `up` `[outputs, rank]`, `down` `[rank, inputs]` and `rest` `[outputs, inputs]`, none of which is of low rank itself.
    ///
    /// # Errors
    /// If their shapes do not fit.
    pub fn new(up: Weight, down: Weight, rest: Option<Weight>) -> Result<LowRank, Misfit> {
        let shape = |w: &Weight| [w.rows(), w.cols()];
        let whole = [up.rows(), down.cols()];
        let parts = || [Some(&up), Some(&down), rest.as_ref()].into_iter().flatten();
        let nested = parts().any(|part| part.low_rank().is_some());
        if nested || up.cols() != down.rows() || rest.as_ref().is_some_and(|r| shape(r) != whole) {
            return Err(Misfit(parts().map(shape).collect()));
        }
        Ok(LowRank { up, down, rest })
    }

    /// `[outputs, rank]`.
    pub fn up(&self) -> &Weight {
        &self.up
    }

    /// `[rank, inputs]`.
    pub fn down(&self) -> &Weight {
        &self.down
    }

    /// What the product leaves, `[outputs, inputs]`.
    pub fn rest(&self) -> Option<&Weight> {
        self.rest.as_ref()
    }

    /// How many numbers stand between inputs and outputs.
    pub fn rank(&self) -> usize {
        self.down.rows()
    }

    /// How the rest is stored, or the factors where there is none.
    pub fn storage(&self) -> Storage {
        self.rest.as_ref().unwrap_or(&self.down).storage()
    }

    /// The matrices, each with the name of what it is.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &Weight)> {
        [("up", Some(&self.up)), ("down", Some(&self.down)), ("rest", self.rest.as_ref())]
            .into_iter()
            .filter_map(|(name, part)| Some((name, part?)))
    }

    /// What stands beside the factors: the rest, or a matrix of zeros that takes no room.
    pub fn without_factors(&self) -> Weight {
        let none = |rows, cols| Weight::from_tensor(Tensor::zeros(rows, cols));
        self.rest.clone().unwrap_or_else(|| {
            let (up, down) = (none(self.up.rows(), 0), none(0, self.down.cols()));
            Weight::LowRank(Box::new(LowRank { up, down, rest: None }))
        })
    }

    /// Another rest beside the same factors.
    ///
    /// # Errors
    /// If it does not fit.
    pub fn with_rest(&self, rest: Weight) -> Result<LowRank, Misfit> {
        LowRank::new(self.up.clone(), self.down.clone(), Some(rest))
    }

    /// The matrices in the order of [`LowRank::parts`].
    pub(crate) fn into_parts(self) -> Vec<Weight> {
        [Some(self.up), Some(self.down), self.rest].into_iter().flatten().collect()
    }

    /// The outputs that `pick` picks.
    pub(crate) fn of_rows(&self, pick: impl Fn(&Weight) -> Option<Weight>) -> Option<LowRank> {
        let rest = match &self.rest {
            Some(rest) => Some(pick(rest)?),
            None => None,
        };
        Some(LowRank { up: pick(&self.up)?, down: self.down.clone(), rest })
    }

    /// Decodes one row into `out` (`[inputs]`).
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        let (mut factors, mut line) = (vec![0.0; self.rank()], vec![0.0; out.len()]);
        self.up.decode_row(row, &mut factors);
        self.begin_row(row, out);
        for (rank, factor) in factors.iter().enumerate() {
            self.down.decode_row(rank, &mut line);
            out.iter_mut().zip(&line).for_each(|(o, l)| *o += factor * l);
        }
    }

    fn begin_row(&self, row: usize, out: &mut [f32]) {
        match &self.rest {
            Some(rest) => rest.decode_row(row, out),
            None => out.fill(0.0),
        }
    }

    /// Decodes everything, multiplied out: each value is summed as [`LowRank::decode_row`] sums it.
    pub fn to_tensor(&self) -> Tensor {
        let (down, cols) = (self.down.to_tensor(), self.down.cols());
        let mut out = Tensor::zeros(self.up.rows(), cols);
        out.as_mut_slice().par_chunks_mut(cols.max(1)).enumerate().for_each_init(
            || vec![0.0; self.rank()],
            |factors, (row, out)| {
                self.up.decode_row(row, factors);
                self.begin_row(row, out);
                for (rank, factor) in factors.iter().enumerate() {
                    out.iter_mut().zip(down.row(rank)).for_each(|(o, l)| *o += factor * l);
                }
            },
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Linear, ops, ops::Operand, ops::Target, packed::Packed};

    fn wave(rows: usize, cols: usize, step: f32) -> Tensor {
        Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| (i as f32 * step).sin()).collect())
    }

    fn weight(rest: bool, storage: &str) -> Weight {
        let store = |x: Tensor| Weight::encode(&x, Storage::parse(storage).unwrap(), None).unwrap();
        let rest = rest.then(|| store(wave(48, 96, 0.31)));
        let low = LowRank::new(store(wave(48, 32, 0.7)), store(wave(32, 96, 0.13)), rest).unwrap();
        Weight::LowRank(Box::new(low))
    }

    fn products(weight: &Weight, x: &Tensor) -> Tensor {
        let bias = Some((0..weight.rows()).map(|i| i as f32).collect());
        let (one, two) = (Linear::with_bias(weight.clone(), bias), Linear::new(Weight::from_tensor(wave(5, 96, 0.2))));
        let (mut y, mut other) = (Tensor::default(), Tensor::default());
        let targets = [Target { linear: &two, out: &mut other }, Target { linear: &one, out: &mut y }];
        let mut operand = Operand::new(x.clone());
        ops::products(&mut operand, targets);
        assert_eq!(other, ops::matmul(x, &two.weight));
        // What stands in the output before is kept where a product is added to it.
        let before = y.clone();
        ops::add_product(&mut operand, &one, &mut y);
        for (after, before) in y.as_slice().iter().zip(before.as_slice()) {
            assert!((after - 2.0 * before).abs() <= 1e-3 * (1.0 + before.abs()), "{after} {before}");
        }
        before
    }

    #[test]
    fn products_are_those_of_what_it_decodes_to_packed_or_not() {
        for rest in [false, true] {
            for storage in ["f32", "q8_0"] {
                let weight = weight(rest, storage);
                let dense = Weight::from_tensor(weight.to_tensor());
                let packed = Packed::all(vec![weight.clone(), dense.clone()]).unwrap();
                assert!(packed[0].low_rank().unwrap().parts().all(|(_, p)| matches!(p, Weight::Packed(_))));
                for tokens in [1, 7, 40] {
                    let x = wave(tokens, 96, 0.41);
                    let want = products(&dense, &x);
                    let largest = want.as_slice().iter().fold(0f32, |m, v| m.max(v.abs()));
                    for (weight, bound) in [(&weight, 1e-5), (&packed[0], if storage == "f32" { 1e-5 } else { 1e-2 })] {
                        let got = products(weight, &x);
                        for (a, b) in got.as_slice().iter().zip(want.as_slice()) {
                            assert!((a - b).abs() <= bound * largest, "{storage} {tokens}: {a} {b}");
                        }
                        // A token's outputs do not depend on the others.
                        let alone = products(weight, &x.select_rows(&[tokens - 1]));
                        assert_eq!(alone.as_slice(), got.row(tokens - 1), "{storage} {tokens}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_are_picked_and_counted_without_multiplying_out() {
        let weight = weight(true, "f16");
        let whole = weight.to_tensor();
        let (picked, cut) = (weight.select_rows(&[7, 3]), weight.row_range(4, 6).unwrap());
        assert_eq!(picked.to_tensor().row(0), whole.row(7));
        assert_eq!(cut.to_tensor().row(1), whole.row(5));
        assert_eq!(cut.low_rank().unwrap().rank(), 32);
        assert_eq!((weight.len(), weight.values()), (48 * 96, 48 * 96 + 32 * (48 + 96)));
        assert_eq!(weight.size_bytes(), 2 * weight.values());
        assert_eq!(weight.name(), "f16 + rank 32 of f16");
        let mut row = vec![0.0; 96];
        weight.decode_row(11, &mut row);
        assert_eq!(row, whole.row(11));
    }

    #[test]
    fn without_factors_it_is_its_rest_or_nothing() {
        let x = wave(3, 96, 0.4);
        let bare = |rest| weight(rest, "f32").low_rank().unwrap().without_factors();
        assert!(bare(true).low_rank().is_none());
        let nothing = bare(false);
        assert_eq!((nothing.rows(), nothing.cols(), nothing.values()), (48, 96, 0));
        assert!(ops::matmul(&x, &nothing).as_slice().iter().chain(nothing.to_tensor().as_slice()).all(|v| *v == 0.0));
        let (linear, mut y) =
            (Linear::with_bias(nothing, Some(vec![2.0; 48])), Tensor::from_vec(3, 48, vec![1.0; 144]));
        ops::add_product(&mut Operand::new(x), &linear, &mut y);
        assert!(y.as_slice().iter().all(|v| *v == 3.0));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let w = |rows, cols| Weight::from_tensor(wave(rows, cols, 0.1));
        let e = LowRank::new(w(4, 2), w(3, 5), None).unwrap_err();
        assert!(e.to_string().contains("[[4, 2], [3, 5]]"), "{e}");
        assert!(LowRank::new(w(4, 2), w(2, 5), Some(w(4, 4))).is_err());
        let low = Weight::LowRank(Box::new(LowRank::new(w(4, 2), w(2, 5), None).unwrap()));
        assert!(LowRank::new(w(4, 2), w(2, 5), Some(low)).is_err());
    }
}
