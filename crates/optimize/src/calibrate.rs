//! What methods may know of a matrix's inputs, gathered by one tap and only as far as they ask.

use model::{Point, Role, Site, Tap};
use std::collections::BTreeMap;
use tensor::{
    Tensor,
    ops::{self, Cross, Gram, Squares},
};

/// What a method must know of the inputs of a matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The mean of `x x^T`.
    pub gram: bool,
    /// The mean of the square of each input alone; the diagonal of the former serves as well.
    pub squares: bool,
    /// How the inputs differ from the original's: the original then runs beside the model.
    pub shift: bool,
    /// The largest magnitude of each input.
    pub peak: bool,
    /// What each block of the original returns: it then runs beside the model.
    pub outputs: bool,
    /// The second moments of the gradients of what each matrix returns.
    pub gradients: bool,
    /// Their squares alone.
    pub slopes: bool,
    /// What each text's loss would change by without a value, to first order.
    pub taylor: bool,
}

impl Needs {
    /// Does it ask for gradients of any kind?
    pub fn backward(self) -> bool {
        self.gradients || self.slopes || self.taylor
    }

    /// Does the original run beside the model?
    pub fn original(self) -> bool {
        self.shift || self.outputs
    }

    /// Does it need to see any data?
    pub fn data(self) -> bool {
        self.gram || self.squares || self.peak || self.outputs || self.backward()
    }
}

/// Statistics of the inputs of one matrix.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// `sum x x^T`, where it was asked for.
    pub gram: Option<Gram>,
    /// `sum x^2`, where it was asked for without the former.
    pub squares: Option<Squares>,
    /// `sum (o - x) x^T`, where `o` are the original's inputs and it was asked for.
    pub shift: Option<Cross>,
    /// The largest magnitude of each input, where it was asked for.
    pub peak: Option<Vec<f32>>,
    /// `sum g g^T` of the gradients of the outputs of the one matrix in question, where it was asked for.
    pub gradients: Option<Gram>,
    /// `sum g^2`, where it was asked for.
    pub slopes: Option<Squares>,
    /// What single values and columns of the one matrix in question are worth, where it was asked for.
    pub taylor: Option<Taylor>,
}

/// What the loss of texts would change by without parts of a matrix, to first order: values times their gradients (arXiv 1906.10771).
#[derive(Clone, Debug, Default)]
pub struct Taylor {
    /// Sums of squares over texts, `[outputs, inputs]`.
    pub values: Tensor,
    /// Of whole columns, for each text by itself, `[texts, inputs]`.
    pub columns: Tensor,
}

impl Stats {
    /// Adds a batch of inputs.
    pub fn add(&mut self, needs: Needs, x: &Tensor) {
        if needs.gram {
            self.gram.get_or_insert_with(|| Gram::new(x.cols())).add(x);
        } else if needs.squares {
            self.squares.get_or_insert_with(|| Squares::new(x.cols())).add(x);
        }
        if needs.peak {
            let peak = self.peak.get_or_insert_with(|| vec![0.0; x.cols()]);
            peak.iter_mut().zip(ops::absolute_maxima(x)).for_each(|(p, x)| *p = p.max(x));
        }
    }

    /// As if every input had been divided by a number of its own.
    pub fn divide(&mut self, by: &[f32]) {
        if let Some(gram) = &mut self.gram {
            gram.divide(by);
        }
        if let Some(squares) = &mut self.squares {
            squares.divide(by);
        }
        if let Some(shift) = &mut self.shift {
            shift.divide(by);
        }
        if let Some(peak) = &mut self.peak {
            peak.iter_mut().zip(by).for_each(|(p, s)| *p /= s);
        }
    }

    /// Of what a matrix `[outputs, cols]` makes of these inputs, as far as that can be told: where only their squares are known,
    /// as if none hung on another.
    pub fn through(&self, matrix: &Tensor) -> Stats {
        let gram = self.gram.as_ref().filter(|g| g.cols() == matrix.cols());
        let squares = self.squares.as_ref().filter(|s| s.rows() > 0).map(|s| {
            let mean = s.mean();
            let each = (0..matrix.rows()).map(|row| matrix.row(row).iter().zip(&mean));
            let sums = each.map(|row| row.map(|(w, s)| f64::from(*w).powi(2) * f64::from(*s)).sum::<f64>());
            Squares::from_sums(s.rows(), sums.map(|sum| sum * s.rows() as f64).collect())
        });
        Stats { gram: gram.map(|g| g.through(matrix)), squares, ..Stats::default() }
    }

    /// Is nothing known?
    pub fn is_empty(&self) -> bool {
        self.gram.is_none() && self.squares.is_none() && self.peak.is_none()
    }

    /// The mean of the square of each of so many inputs, `[cols]`, where some were seen.
    pub fn mean_squares(&self, cols: usize) -> Option<Vec<f32>> {
        let gram = self.gram.as_ref().filter(|g| g.cols() == cols && g.rows() > 0);
        let squares = self.squares.as_ref().filter(|s| s.cols() == cols && s.rows() > 0);
        gram.map(Gram::mean_squares).or_else(|| squares.map(Squares::mean))
    }

    /// Adds how a batch of inputs differs from the original's.
    pub fn add_shift(&mut self, x: &Tensor, original: &Tensor) {
        let mut off = original.clone();
        off.as_mut_slice().iter_mut().zip(x.as_slice()).for_each(|(o, x)| *o -= x);
        self.shift.get_or_insert_with(|| Cross::new(x.cols())).add(&off, x);
    }
}

/// The site that stands for all matrices which read its inputs: statistics are kept once for all of them.
pub fn reader(site: Site) -> Site {
    let role = match site.role {
        Role::K | Role::V => Role::Q,
        Role::Gate => Role::Up,
        other => other,
    };
    Site { role, ..site }
}

/// A tap that keeps statistics of the inputs of chosen sites.
pub struct Gather {
    needs: Needs,
    sites: Vec<Site>,
    /// What was gathered.
    pub stats: BTreeMap<Site, Stats>,
}

impl Gather {
    /// Watches `sites`.
    pub fn new(needs: Needs, sites: Vec<Site>) -> Gather {
        Gather { needs, sites, stats: BTreeMap::new() }
    }
}

impl Tap for Gather {
    fn at(&mut self, point: Point, x: &Tensor) {
        if let Point::Input(site) = point
            && self.sites.contains(&site)
        {
            self.stats.entry(site).or_default().add(self.needs, x);
        }
    }
}
