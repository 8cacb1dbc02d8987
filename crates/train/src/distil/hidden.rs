//! What blocks return, beside what a teacher's do (arXiv 1909.10351): a student's blocks are drawn towards the teacher's at
//! the same part of the depth, through a projection that learns along where widths differ.

use model::{Parameters, Role, Site, Spec, uniform};
use std::collections::BTreeMap;
use tensor::{Tensor, Weight, ops};

/// Looks at the outputs of blocks.
pub(super) struct Hidden {
    /// Share of the loss, for all blocks together.
    weight: f32,
    /// The teacher's block beside each of the student's.
    beside: BTreeMap<u16, u16>,
    /// What the teacher's blocks returned for the batch at hand.
    said: BTreeMap<u16, Tensor>,
    /// Which tokens count.
    counts: Vec<bool>,
    projections: BTreeMap<Site, Tensor>,
}

/// Where a projection of a block's output is found among parameters.
fn site(layer: u16) -> Site {
    Site::of(layer, Role::Down)
}

/// The first projections from a student's width to a teacher's; none where they are the same.
pub fn projections(student: &Spec, teacher: &Spec, seed: u64) -> BTreeMap<Site, Tensor> {
    if student.dim == teacher.dim {
        return BTreeMap::new();
    }
    let (rows, cols) = (teacher.dim, student.dim);
    // Sums of twelve are nearly normal; the outputs are as large as the inputs.
    let normal = |own: u64, i: usize| (0..12).map(|k| uniform(own, 12 * i as u64 + k)).sum::<f64>() - 6.0;
    let one = |layer: u16| {
        let own = seed ^ 0x7072_6f6a ^ u64::from(layer) << 40;
        let values = (0..rows * cols).map(|i| (normal(own, i) / (cols as f64).sqrt()) as f32).collect();
        (site(layer), Tensor::from_vec(rows, cols, values))
    };
    (0..student.layers()).map(one).collect()
}

impl Hidden {
    pub fn new(weight: f32, student: u16, teacher: u16) -> Hidden {
        // The ends of equal parts of the depth.
        let at = |layer: u16| (u32::from(layer + 1) * u32::from(teacher)).div_ceil(u32::from(student)) as u16 - 1;
        let beside = (0..student).map(|layer| (layer, at(layer))).collect();
        let (said, counts, projections) = Default::default();
        Hidden { weight, beside, said, counts, projections }
    }

    pub fn begin(&mut self, targets: &[Option<u32>]) {
        self.counts.clear();
        self.counts.extend(targets.iter().map(Option::is_some));
    }

    /// A block of the teacher returned this.
    pub fn hear(&mut self, layer: u16, output: &Tensor) {
        if self.beside.values().any(|heard| *heard == layer) {
            self.said.entry(layer).or_default().copy_from(output);
        }
    }

    /// Takes the projections as they are now.
    pub fn take(&mut self, values: &Parameters) {
        if !values.projections.is_empty() {
            self.projections.clone_from(&values.projections);
        }
    }

    /// Adds the gradient of `factor` times the squares of what is missing to the teacher's, in parts of those of its output.
    pub fn output(
        &mut self,
        layer: u16,
        output: &Tensor,
        gradient: &mut Tensor,
        factor: f32,
        into: &mut BTreeMap<Site, Tensor>,
    ) {
        let Some(said) = self.beside.get(&layer).and_then(|at| self.said.get(at)) else { return };
        let projection = self.projections.get(&site(layer));
        let mut apart = match projection {
            Some(p) => ops::matmul(output, &Weight::from_tensor(p.clone())),
            None => output.clone(),
        };
        let weight = 2.0 * factor * self.weight / self.beside.len() as f32;
        for row in 0..apart.rows() {
            let (own, other) = (apart.row_mut(row), said.row(row));
            if !self.counts.get(row).is_some_and(|counts| *counts) {
                own.fill(0.0);
                continue;
            }
            let power: f32 = other.iter().map(|v| v * v).sum();
            let each = weight / power.max(f32::MIN_POSITIVE);
            own.iter_mut().zip(other).for_each(|(o, t)| *o = each * (*o - t));
        }
        let add = |to: &mut Tensor, from: &Tensor| {
            to.as_mut_slice().iter_mut().zip(from.as_slice()).for_each(|(t, f)| *t += f);
        };
        match projection {
            None => add(gradient, &apart),
            Some(p) => {
                add(gradient, &ops::matmul(&apart, &Weight::from_tensor(p.transposed())));
                if let Some(own) = into.get_mut(&site(layer)) {
                    add(own, &ops::matmul(&apart.transposed(), &Weight::from_tensor(output.transposed())));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(rows: usize, cols: usize, seed: u64) -> Tensor {
        Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| uniform(seed, i as u64) as f32 - 0.5).collect())
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (rows, narrow, wide) = (5, 6, 8);
        for cols in [narrow, wide] {
            let (output, said) = (wave(rows, cols, 1), wave(rows, wide, 2));
            let mut hidden = Hidden::new(0.7, 2, 4);
            let projection = (cols != wide).then(|| wave(wide, cols, 3));
            hidden.projections.extend(projection.clone().map(|p| (site(1), p)));
            hidden.begin(&[Some(1), None, Some(2), Some(3), Some(4)]);
            // The end of the student's second half stands beside the teacher's last block.
            hidden.hear(3, &said);
            let loss = |output: &Tensor, projection: Option<&Tensor>| -> f64 {
                let seen = projection.map_or(output.clone(), |p| ops::matmul(output, &Weight::from_tensor(p.clone())));
                let row = |row: usize| {
                    let pairs = seen.row(row).iter().zip(said.row(row));
                    let apart: f64 = pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum();
                    apart / said.row(row).iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()
                };
                0.7 / 2.0 * 0.25 * [0, 2, 3, 4].map(row).iter().sum::<f64>()
            };
            let mut gradient = Tensor::zeros(rows, cols);
            let mut into: BTreeMap<Site, Tensor> =
                projection.iter().map(|p| (site(1), Tensor::zeros(p.rows(), p.cols()))).collect();
            hidden.output(1, &output, &mut gradient, 0.25, &mut into);
            let slope = |at: &dyn Fn(f32) -> f64| (at(1e-2) - at(-1e-2)) / 2e-2;
            let moved = |x: &Tensor, i: usize, h: f32| {
                let mut x = x.clone();
                x.as_mut_slice()[i] += h;
                x
            };
            for i in 0..rows * cols {
                let want = slope(&|h| loss(&moved(&output, i, h), projection.as_ref()));
                assert!((f64::from(gradient.as_slice()[i]) - want).abs() < 1e-4, "output {i}: {want}");
            }
            if let Some(p) = &projection {
                for i in 0..wide * cols {
                    let want = slope(&|h| loss(&output, Some(&moved(p, i, h))));
                    assert!((f64::from(into[&site(1)].as_slice()[i]) - want).abs() < 1e-4, "projection {i}: {want}");
                }
            }
        }
    }
}
