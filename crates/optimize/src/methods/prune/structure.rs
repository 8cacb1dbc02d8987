//! Neurons and heads: columns of the matrix that reads them.

use super::{
    super::{Rewrite, at, spectrum::Outputs},
    obs::Surgeon,
    remain, unseen,
};
use crate::{Error, Needs, Result, Stats};
use model::{BlockSpec, Channels, Model, Role, Site, Spec, Widths};
use std::ops::Range;
use tensor::{Storage, Tensor, Weight};

/// What goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// So that a multiple of some number remains.
    Neurons { multiple: Option<usize> },
    /// Key and value heads, with the query heads that read them.
    Heads,
}

/// A method that removes neurons or heads.
pub struct Structure {
    pub method: &'static str,
    pub part: Part,
    pub sparsity: f64,
}

/// Neurons that go together where there are many, so that each elimination reads the inverse once for all of them.
const TOGETHER: usize = 16;
/// Columns up to which they go one by one.
const FEW: usize = 1024;

impl Structure {
    /// The role of the matrix that reads what goes.
    fn reader(&self) -> Role {
        if self.part == Part::Heads { Role::O } else { Role::Down }
    }

    /// How many of a block there are, and remain.
    fn counts(&self, block: &BlockSpec) -> [usize; 2] {
        match self.part {
            Part::Neurons { multiple } => [block.hidden, remain(block.hidden, self.sparsity, multiple)],
            Part::Heads => [block.kv_heads, remain(block.kv_heads, self.sparsity, Some(1))],
        }
    }

    /// Removes groups of so many neighbouring columns until `keep` of them remain.
    fn without(&self, site: Site, weight: &Tensor, [all, keep]: [usize; 2], stats: &Stats) -> Result<Tensor> {
        let (cols, size) = (weight.cols(), weight.cols() / all.max(1));
        let group = |g: usize| -> Vec<usize> { (g * size..(g + 1) * size).collect() };
        let norm = |j: usize| (0..weight.rows()).map(|r| f64::from(weight.row(r)[j]).powi(2)).sum::<f64>();
        let gram = stats.gram.as_ref().filter(|g| g.cols() == cols && g.rows() > 0);
        if self.method == "magnitude" {
            let mut out = weight.clone();
            for g in least(all, all - keep, |g| group(g).into_iter().map(norm).sum()) {
                clear(&mut out, g * size..(g + 1) * size);
            }
            return Ok(out);
        }
        let gram = gram.ok_or_else(|| unseen(site))?.mean();
        // What the others answer does not hang on what outputs count for, what goes does.
        let gradients = stats.gradients.as_ref().filter(|_| self.method == "fisher");
        let outputs = gradients.and_then(|g| Outputs::new(weight.rows(), &g.mean(), 0.01));
        let evened = outputs.as_ref().map(|outputs| outputs.evened(weight));
        let whole =
            |surgeon: &Surgeon| outputs.as_ref().map_or_else(|| surgeon.matrix(), |o| o.back(&surgeon.matrix()));
        let mut surgeon = Surgeon::new(evened.as_ref().unwrap_or(weight), &gram).ok_or_else(|| Error::Site {
            site,
            reason: "its inputs have no usable second moments (are some of them infinite or not a number?)".into(),
        })?;
        let at_once: Option<Box<dyn Fn(usize) -> f64>> = match self.method {
            "wanda" => Some(Box::new(|g| group(g).into_iter().map(|j| norm(j) * gram[j * cols + j]).sum())),
            "taylor" => {
                let columns = &stats.taylor.as_ref().ok_or_else(|| unseen(site))?.columns;
                let text = move |t: usize, g: usize| {
                    columns.row(t)[g * size..(g + 1) * size].iter().map(|c| f64::from(*c)).sum::<f64>()
                };
                Some(Box::new(move |g| (0..columns.rows()).map(|t| text(t, g).powi(2)).sum()))
            }
            _ => None,
        };
        if let Some(worth) = at_once {
            let gone = least(all, all - keep, worth);
            surgeon.remove(&gone.into_iter().flat_map(group).collect::<Vec<usize>>());
            return Ok(whole(&surgeon));
        }
        let mut left: Vec<usize> = (0..all).collect();
        while left.len() > keep {
            let most = if cols > FEW && size == 1 { TOGETHER } else { 1 };
            let count = most.min(left.len() - keep);
            let costs: Vec<f64> = left.iter().map(|g| surgeon.cost(&group(*g))).collect();
            let gone = least(left.len(), count, |i| costs[i]);
            surgeon.remove(&gone.iter().flat_map(|i| group(left[*i])).collect::<Vec<usize>>());
            gone.iter().rev().for_each(|i| {
                left.remove(*i);
            });
        }
        Ok(whole(&surgeon))
    }

    /// Those of a block that are still there, `keep` of them, in rising order.
    fn kept(&self, weight: &Tensor, [all, keep]: [usize; 2]) -> Vec<usize> {
        let size = weight.cols() / all.max(1);
        let empty =
            |g: usize| (0..weight.rows()).all(|r| weight.row(r)[g * size..(g + 1) * size].iter().all(|v| *v == 0.0));
        // One that was nothing before counts as gone first.
        let gone = least(all, all - keep, |g| f64::from(u8::from(!empty(g))));
        (0..all).filter(|g| !gone.contains(g)).collect()
    }
}

impl Rewrite for Structure {
    fn needs(&self) -> Needs {
        Needs {
            gram: self.method != "magnitude",
            gradients: self.method == "fisher",
            taylor: self.method == "taylor",
            ..Needs::default()
        }
    }

    fn changes_floats(&self) -> bool {
        true
    }

    fn shell(&self, model: &Model) -> Result<Option<Model>> {
        let Some(block) = model.spec.blocks.first() else { return Ok(None) };
        let [_, keep] = self.counts(block);
        let widths = match self.part {
            Part::Neurons { .. } => Widths { hidden: Some(keep), ..Widths::default() },
            Part::Heads => Widths { kv_heads: Some(keep), ..Widths::default() },
        };
        Ok(Some(model.shell(widths)?))
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight> {
        Weight::encode(weight, storage, stats.mean_squares(weight.cols()).as_deref()).map_err(at(site))
    }

    fn matrix_of(&self, spec: &Spec, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight> {
        let block = site.layer.and_then(|layer| spec.blocks.get(usize::from(layer)));
        let Some(block) = block.filter(|_| site.role == self.reader()) else {
            return self.matrix(site, weight, storage, stats);
        };
        let pruned = self.without(site, weight, self.counts(block), stats)?;
        Weight::encode(&pruned, storage, None).map_err(at(site))
    }

    fn cut(&self, model: &Model) -> Result<Option<Model>> {
        let mut channels = Channels::all(model);
        for (layer, block) in (0..model.spec.layers()).zip(&model.spec.blocks) {
            let weight = model.linear(Site::of(layer, self.reader()))?.weight.to_tensor();
            let kept = self.kept(&weight, self.counts(block));
            match self.part {
                Part::Neurons { .. } => channels.hidden[usize::from(layer)] = kept,
                Part::Heads => channels.kv_heads[usize::from(layer)] = kept,
            }
        }
        Ok(Some(model.of_channels(&channels)?))
    }
}

/// The numbers of the `count` of least worth among `all`, in rising order; of equals the last.
fn least(all: usize, count: usize, worth: impl Fn(usize) -> f64) -> Vec<usize> {
    let worth: Vec<f64> = (0..all).map(worth).collect();
    let mut order: Vec<usize> = (0..all).collect();
    order.sort_by(|a, b| worth[*a].total_cmp(&worth[*b]).then(b.cmp(a)));
    order.truncate(count);
    order.sort_unstable();
    order
}

fn clear(x: &mut Tensor, cols: Range<usize>) {
    (0..x.rows()).for_each(|r| x.row_mut(r)[cols.clone()].fill(0.0));
}
