//! Site by site: what a matrix was, what is left of it, and what that costs where its outputs are read.

use crate::{Result, data::Document};
use model::{Model, Point, Site, Stage, Tap};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tensor::{Tensor, Weight, ops};

/// Tokens that matrices are compared on.
const TOKENS: usize = 256;

/// A matrix as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Form {
    /// Outputs and inputs.
    pub shape: [usize; 2],
    /// How.
    pub storage: String,
    /// Numbers that are stored: fewer than the shape has where it has holes or is a product of two.
    pub values: usize,
    /// Bytes, scales and patterns included.
    pub bytes: usize,
}

/// What became of a matrix of the original.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Change {
    /// Its site in the original.
    pub site: String,
    /// What it was.
    pub before: Form,
    /// What is left of it; nothing where its layer is gone.
    pub after: Option<Form>,
    /// Squared error of what it returns, as a part of that: on the inputs that the original has, or, where it reads fewer than it did, on
    /// those that reach it. Nothing where it returns fewer, which counts where they are read.
    pub cost: Option<f64>,
}

impl Form {
    fn of(weight: &Weight) -> Form {
        let stored = |part: &Weight| match part.storage() {
            tensor::Storage::Sparse(sparse) => part.rows() * sparse.pattern().kept(part.cols()),
            _ => part.len(),
        };
        Form {
            shape: [weight.rows(), weight.cols()],
            storage: weight.name(),
            values: weight.parts().into_iter().map(|(_, part)| stored(part)).sum(),
            bytes: weight.size_bytes(),
        }
    }
}

/// What became of each matrix; `numbers` are the layers of the original that are left. Costs are told where both are in one basis
/// (`comparable`).
///
/// # Errors
/// If a model cannot run.
pub fn changes(
    before: &Model,
    after: &Model,
    numbers: &[u16],
    documents: &[Document],
    comparable: bool,
) -> Result<Vec<Change>> {
    let moved = |site: Site| match site.layer {
        None => Some(site),
        Some(layer) => {
            let number = before.spec.origin.get(usize::from(layer))?;
            numbers.iter().position(|n| n == number).map(|at| Site::of(at as u16, site.role))
        }
    };
    let matrix = |site: Site| moved(site).and_then(|site| after.linears.get(&site)).map(|l| &l.weight);
    // What a norm took over of the scale of its outputs.
    let scales = |site: Site| {
        let norm = Stage::ALL.into_iter().find(|stage| stage.roles().contains(&site.role))?.norm()?;
        let norm = Site::of(site.layer?, norm);
        let [was, is] = [&before.norms.get(&norm)?.scale, &after.norms.get(&moved(norm)?)?.scale];
        let by = || was.iter().zip(is).map(|(was, is)| if *was == 0.0 { 0.0 } else { is / was });
        (was.len() == is.len() && was != is).then(|| by().collect::<Vec<f32>>())
    };
    let mut left = if comparable { TOKENS } else { 0 };
    let pieces = documents.iter().map(|d| {
        let piece = &d.ids[..d.ids.len().min(left)];
        left -= piece.len();
        piece
    });
    let texts: Vec<&[u32]> = pieces.take_while(|piece| !piece.is_empty()).collect();
    let head = before.spec.resolve(Site::HEAD);
    let mut watch =
        Watch { before, matrix: &matrix, scales: &scales, head, sums: BTreeMap::new(), returned: BTreeMap::new() };
    let mut second = Second { expected: BTreeMap::new(), sums: BTreeMap::new() };
    for text in texts {
        before.forward(&[text], &mut watch)?;
        let expected = std::mem::take(&mut watch.returned).into_iter();
        second.expected = expected.filter_map(|(site, y)| Some((moved(site)?, (site, y)))).collect();
        if !second.expected.is_empty() {
            after.forward(&[text], &mut second)?;
        }
    }
    let mut sums = watch.sums;
    sums.extend(second.sums);
    let change = |(site, linear): (&Site, &tensor::Linear)| Change {
        site: site.to_string(),
        before: Form::of(&linear.weight),
        after: matrix(*site).map(Form::of),
        cost: sums.get(site).map(|[error, power]| if *power > 0.0 { error / power } else { 0.0 }),
    };
    Ok(before.linears.iter().map(change).collect())
}

/// Adds up squares of differences and of what there should be.
fn compare(sums: &mut [f64; 2], is: &Tensor, should: &Tensor) {
    for (is, should) in is.as_slice().iter().zip(should.as_slice()) {
        sums[0] += f64::from(is - should).powi(2);
        sums[1] += f64::from(*should).powi(2);
    }
}

/// Sees the original run.
struct Watch<'a> {
    before: &'a Model,
    matrix: &'a dyn Fn(Site) -> Option<&'a Weight>,
    scales: &'a dyn Fn(Site) -> Option<Vec<f32>>,
    head: Site,
    sums: BTreeMap<Site, [f64; 2]>,
    /// What matrices return that read fewer inputs now.
    returned: BTreeMap<Site, Tensor>,
}

impl Tap for Watch<'_> {
    fn at(&mut self, point: Point, x: &Tensor) {
        let (Point::Input(site) | Point::Output(site)) = point else { return };
        let site = if site == Site::HEAD { self.head } else { site };
        let Some((was, is)) = self.before.linears.get(&site).map(|l| &l.weight).zip((self.matrix)(site)) else {
            return;
        };
        if was.rows() != is.rows() {
            return;
        }
        match point {
            Point::Input(_) if was.cols() == is.cols() => {
                let mut own = x.clone();
                if let Some(by) = (self.scales)(site) {
                    let rows = own.as_mut_slice().chunks_exact_mut(by.len().max(1));
                    rows.for_each(|row| row.iter_mut().zip(&by).for_each(|(x, by)| *x *= by));
                }
                compare(self.sums.entry(site).or_default(), &ops::matmul(&own, is), &ops::matmul(x, was));
            }
            Point::Output(_) if was.cols() != is.cols() => {
                self.returned.insert(site, x.clone());
            }
            _ => {}
        }
    }
}

/// Sees the result run on the same text.
struct Second {
    /// What the original returned there, by the result's site, and its own.
    expected: BTreeMap<Site, (Site, Tensor)>,
    sums: BTreeMap<Site, [f64; 2]>,
}

impl Tap for Second {
    fn at(&mut self, point: Point, x: &Tensor) {
        if let Point::Output(site) = point
            && let Some((original, y)) = self.expected.get(&site)
        {
            compare(self.sums.entry(*original).or_default(), x, y);
        }
    }
}
