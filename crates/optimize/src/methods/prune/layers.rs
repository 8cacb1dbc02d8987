//! Layers and channels of the residual stream, which are chosen for the whole model at once.

use super::{remain, slice};
use crate::{
    Error, Result,
    data::Document,
    evaluate,
    progress::{self, Progress, Silent},
    walk,
};
use model::{Channels, Model, Widths};

/// A cut through the whole model.
#[derive(Clone, Debug)]
pub struct Cut {
    /// How much goes, as a fraction.
    pub sparsity: f64,
    /// Of what.
    pub of: Shape,
}

/// What is cut.
#[derive(Clone, Debug)]
pub enum Shape {
    /// Whole blocks.
    Layers {
        /// Those that stay.
        keep: Vec<u16>,
        /// So many are tried for each that goes; where none is given, influence alone decides.
        tried: Option<usize>,
    },
    /// Channels of the residual stream.
    Width {
        /// What remains is a multiple of this.
        multiple: Option<usize>,
        /// In the basis of the directions in which it varies most, which unties a tied head?
        sliced: bool,
    },
}

/// Tokens that the model says without a layer for each that is tried.
const TOKENS: usize = 4096;

impl Cut {
    /// Does it look at any text?
    pub fn reads(&self) -> bool {
        matches!(self.of, Shape::Layers { .. } | Shape::Width { sliced: true, .. })
    }

    /// The model with the matrices that this needs, which computes the same; none where it has them already.
    ///
    /// # Errors
    /// If the model cannot be cut so.
    pub fn shape(&self, model: &Model) -> Result<Option<Model>> {
        match self.of {
            Shape::Width { sliced: true, .. } => slice::shape(model),
            _ => Ok(None),
        }
    }

    /// What it makes of a model, which blocks or channels that may be, without its weights.
    ///
    /// # Errors
    /// If nothing would go, or the family's configuration cannot say it.
    pub fn shell(&self, model: &Model) -> Result<Model> {
        match &self.of {
            Shape::Layers { .. } => {
                let mut shell = model.clone();
                let left = self.layers_left(model)?;
                shell.spec.blocks.truncate(left);
                shell.spec.origin.truncate(left);
                shell.linears.retain(|site, _| site.layer.is_none_or(|layer| usize::from(layer) < left));
                Ok(shell)
            }
            Shape::Width { multiple, .. } => Ok(model.shell(self.widths(model, *multiple))?),
        }
    }

    fn widths(&self, model: &Model, multiple: Option<usize>) -> Widths {
        Widths { dim: Some(remain(model.spec.dim, self.sparsity, multiple)), ..Widths::default() }
    }

    /// How many layers stay.
    fn layers_left(&self, model: &Model) -> Result<usize> {
        let layers = model.spec.blocks.len();
        let gone = (self.sparsity * layers as f64).round() as usize;
        if gone == 0 || gone >= layers {
            return Err(Error::Asked(format!(
                "{:.0} % of {layers} layers is {gone}: ask for {:.1} % to remove one",
                100.0 * self.sparsity,
                100.0 / layers as f64
            )));
        }
        Ok(layers - gone)
    }

    /// Chooses by texts and cuts.
    ///
    /// # Errors
    /// If too many layers are to stay, what remains cannot be described, or the job was interrupted.
    pub fn run(&self, model: &Model, texts: &[Vec<u32>], progress: &dyn Progress) -> Result<Model> {
        match &self.of {
            Shape::Layers { keep, tried } => self.shortened(model, texts, (keep, *tried), progress),
            Shape::Width { multiple, sliced: true } => {
                slice::sliced(model, remain(model.spec.dim, self.sparsity, *multiple), texts, progress)
            }
            Shape::Width { multiple, sliced: false } => {
                let channels = Channels::largest(model, self.widths(model, *multiple))?;
                Ok(model.of_channels(&channels)?)
            }
        }
    }

    fn shortened(
        &self,
        model: &Model,
        texts: &[Vec<u32>],
        (keep, tried): (&[u16], Option<usize>),
        progress: &dyn Progress,
    ) -> Result<Model> {
        let left = self.layers_left(model)?;
        let mut blocks: Vec<u16> = (0..model.spec.layers()).collect();
        let gone = blocks.len() - left;
        if blocks.iter().filter(|b| !keep.contains(b)).count() < gone {
            return Err(Error::Asked(format!("`keep` leaves fewer than the {gone} layers that are to go")));
        }
        let influence = walk::influence(model, texts, progress)?;
        let mut order: Vec<u16> = blocks.iter().copied().filter(|b| !keep.contains(b)).collect();
        order.sort_by(|a, b| influence[usize::from(*a)].total_cmp(&influence[usize::from(*b)]));
        let documents = documents(texts);
        progress.begin("trying layers", tried.map_or(0, |tried| (gone * tried) as u64));
        while blocks.len() > left {
            let without = |block: u16| -> Vec<u16> { blocks.iter().copied().filter(|b| *b != block).collect() };
            let mut best: Option<(f64, u16)> = None;
            for block in &order[..tried.unwrap_or(1).min(order.len())] {
                progress::check()?;
                let kl = match tried {
                    Some(_) => divergence(&model.of_blocks(&without(*block))?, model, &documents)?,
                    None => 0.0,
                };
                progress.advance(1);
                if best.is_none_or(|(least, _)| kl < least) {
                    best = Some((kl, *block));
                }
            }
            let Some((kl, block)) = best else { break };
            let said = tried.map_or(String::new(), |_| format!(", after which the model diverges by {kl:.4} nats"));
            progress.note(&format!("layer {block} goes: influence {:.4}{said}", influence[usize::from(block)]));
            blocks = without(block);
            order.retain(|b| *b != block);
        }
        Ok(model.of_blocks(&blocks)?)
    }
}

/// The first texts, as documents.
fn documents(texts: &[Vec<u32>]) -> Vec<Document> {
    let mut tokens = 0;
    let few = texts.iter().take_while(|ids| {
        let first = tokens == 0;
        tokens += ids.len();
        first || tokens <= TOKENS
    });
    few.map(|ids| Document { ids: ids.clone(), bytes: 0, percentile: 0, learned: None }).collect()
}

/// Mean divergence from the original, nats.
fn divergence(model: &Model, base: &Model, documents: &[Document]) -> Result<f64> {
    let pairs = evaluate::compare(model, base, documents, &Silent)?;
    let (sum, count) = pairs.iter().flat_map(|p| &p.kl).fold((0.0, 0usize), |(s, n), kl| (s + f64::from(*kl), n + 1));
    Ok(sum / count.max(1) as f64)
}
