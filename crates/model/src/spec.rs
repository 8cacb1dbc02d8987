//! `Spec`: everything that tells one GPT from another, as data.

use crate::{Role, Site};
use std::borrow::Cow;
use tensor::ops::{Activation, AttentionShape, NormKind, Rotation};

/// The shape and the switches of a model.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Longest sequence that the model was made for.
    pub context: usize,
    /// The blocks, first to last.
    pub blocks: Vec<BlockSpec>,
    /// The number that each block had in the original model.
    pub origin: Vec<u16>,
    /// Which normalisation.
    pub norm: NormKind,
    /// Its epsilon.
    pub norm_eps: f32,
    /// Rows of the table of learned positions, where there is one.
    pub learned_positions: Option<usize>,
    /// The rotary embeddings that blocks refer to.
    pub ropes: Vec<RopeSpec>,
    /// Attention and feed-forward read the same input and add to it together.
    pub parallel: bool,
    /// Queries and keys are normalised per head.
    pub qk_norm: bool,
    /// What attention and feed-forward return is normalised before it joins the residual.
    pub post_norms: bool,
    /// Has the feed-forward network a gate?
    pub gated: bool,
    /// Its nonlinearity.
    pub activation: Activation,
    /// Is the head the embedding?
    pub tied: bool,
    /// Factor on the embedding.
    pub embed_scale: Option<f32>,
    /// Cap on the logits: `cap tanh(logit / cap)`.
    pub logit_cap: Option<f32>,
    /// Which optional parameters a file may carry: biases of q, k, v; of o; of the feed-forward network; of norms.
    pub biases: Biases,
}

/// Which projections have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// Query, key and value.
    pub qkv: bool,
    /// Output of attention.
    pub o: bool,
    /// Gate, up and down.
    pub mlp: bool,
    /// Norms.
    pub norm: bool,
    /// Head.
    pub head: bool,
}

/// The shape of one block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Width of the feed-forward network.
    pub hidden: usize,
    /// How many positions back a query sees; `None` is all.
    pub window: Option<usize>,
    /// Which of [`Spec::ropes`] turns its queries and keys.
    pub rope: Option<usize>,
    /// Factor on the attention scores.
    pub score_scale: f32,
    /// Cap on the attention scores.
    pub score_cap: Option<f32>,
}

impl BlockSpec {
    /// How its heads attend.
    pub fn attention(&self) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: self.score_scale,
            window: self.window,
            soft_cap: self.score_cap,
        }
    }
}

/// A rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Channels of each head that turn.
    pub rotated: usize,
    /// `[rotated / 2]`.
    pub inverse_frequencies: Vec<f32>,
    /// Factor on cosines and sines.
    pub scale: f32,
    /// Other frequencies for longer sequences.
    pub longer: Option<Longer>,
}

/// The frequencies that hold beyond a length.
#[derive(Clone, Debug, PartialEq)]
pub struct Longer {
    /// Sequences longer than this use them.
    pub beyond: usize,
    /// Which they are.
    pub frequencies: Stretch,
}

/// How frequencies change in sequences longer than those of the training.
#[derive(Clone, Debug, PartialEq)]
pub enum Stretch {
    /// Others that are given, `[rotated / 2]` (LongRoPE, arXiv 2402.13753).
    Fixed(Vec<f32>),
    /// The base grows with the length of the sequence ("dynamic NTK").
    Dynamic {
        /// The base up to the trained length.
        theta: f64,
        /// The strength of its growth.
        factor: f64,
    },
}

impl Spec {
    /// Number of blocks.
    pub fn layers(&self) -> u16 {
        self.blocks.len() as u16
    }

    /// Shape `[outputs, inputs]` of a matrix, or `[1, width]` of a norm; `None` where the model has no such site.
    pub fn shape(&self, site: Site) -> Option<[usize; 2]> {
        let Some(layer) = site.layer else {
            return match site.role {
                Role::Embed | Role::Head => Some([self.vocab, self.dim]),
                Role::Position => self.learned_positions.map(|n| [n, self.dim]),
                Role::FinalNorm => Some([1, self.dim]),
                _ => None,
            };
        };
        let b = self.blocks.get(usize::from(layer))?;
        let (dim, hd) = (self.dim, b.head_dim);
        match site.role {
            Role::Q => Some([b.heads * hd, dim]),
            Role::K | Role::V => Some([b.kv_heads * hd, dim]),
            Role::O => Some([dim, b.heads * hd]),
            Role::Gate => self.gated.then_some([b.hidden, dim]),
            Role::Up => Some([b.hidden, dim]),
            Role::Down => Some([dim, b.hidden]),
            Role::AttnNorm | Role::MlpNorm => Some([1, dim]),
            Role::QNorm | Role::KNorm => self.qk_norm.then_some([1, hd]),
            Role::PostAttnNorm | Role::PostMlpNorm => self.post_norms.then_some([1, dim]),
            _ => None,
        }
    }

    /// Does the site carry a bias?
    pub fn has_bias(&self, site: Site) -> bool {
        match site.role {
            Role::Q | Role::K | Role::V => self.biases.qkv,
            Role::O => self.biases.o,
            Role::Gate | Role::Up | Role::Down => self.biases.mlp,
            Role::Head => self.biases.head,
            Role::QNorm | Role::KNorm => false,
            role if role.is_norm() => self.biases.norm,
            _ => false,
        }
    }

    /// Every matrix, in the order of execution; a tied head is the embedding and not listed again.
    pub fn matrices(&self) -> Vec<Site> {
        let mut sites = vec![Site::EMBED];
        if self.learned_positions.is_some() {
            sites.push(Site::POSITION);
        }
        for layer in 0..self.layers() {
            let roles = [Role::Q, Role::K, Role::V, Role::O, Role::Gate, Role::Up, Role::Down];
            sites.extend(roles.map(|r| Site::of(layer, r)).into_iter().filter(|s| self.shape(*s).is_some()));
        }
        if !self.tied {
            sites.push(Site::HEAD);
        }
        sites
    }

    /// Every norm, in the order of execution.
    pub fn norms(&self) -> Vec<Site> {
        let roles = [Role::AttnNorm, Role::QNorm, Role::KNorm, Role::PostAttnNorm, Role::MlpNorm, Role::PostMlpNorm];
        let mut sites: Vec<Site> = (0..self.layers())
            .flat_map(|l| roles.map(|r| Site::of(l, r)))
            .filter(|s| self.shape(*s).is_some())
            .collect();
        sites.push(Site::FINAL_NORM);
        sites
    }

    /// The site that holds the weight: a tied head resolves to the embedding.
    pub fn resolve(&self, site: Site) -> Site {
        if site == Site::HEAD && self.tied { Site::EMBED } else { site }
    }

    /// Number of parameters, tied tensors once.
    pub fn parameters(&self) -> usize {
        let size = |s: &Site| self.shape(*s).map_or(0, |[r, c]| r * c);
        let bias = |s: &Site| match self.shape(*s) {
            Some([r, c]) if self.has_bias(*s) => {
                if s.role.is_norm() {
                    c
                } else {
                    r
                }
            }
            _ => 0,
        };
        self.matrices().iter().chain(&self.norms()).map(|s| size(s) + bias(s)).sum()
    }
}

impl RopeSpec {
    /// Inverse frequencies `[rotated / 2]` for a sequence of `length` positions.
    pub fn frequencies(&self, length: usize) -> Cow<'_, [f32]> {
        match &self.longer {
            Some(longer) if length > longer.beyond => match &longer.frequencies {
                Stretch::Fixed(other) => Cow::Borrowed(other),
                Stretch::Dynamic { theta, factor } => {
                    let (dim, stretch) = (self.rotated as f64, length as f64 / longer.beyond as f64);
                    let grown = theta * (factor * stretch - (factor - 1.0)).powf(dim / (dim - 2.0));
                    Cow::Owned(inverse_frequencies(grown, self.rotated))
                }
            },
            _ => Cow::Borrowed(&self.inverse_frequencies),
        }
    }

    /// Are keys that were turned in a sequence of `old` positions turned otherwise in one of `new`?
    pub fn changes(&self, old: usize, new: usize) -> bool {
        self.longer.is_some() && self.frequencies(old) != self.frequencies(new)
    }

    /// Sets cosines and sines for positions, given the whole length of the sequence that each belongs to.
    pub fn rotate(&self, positions: &[usize], lengths: &[usize], out: &mut Rotation) {
        out.reset(positions.len(), self.rotated / 2);
        let mut known: Option<(usize, Cow<'_, [f32]>)> = None;
        for (t, (position, length)) in positions.iter().zip(lengths).enumerate() {
            let table = match known.take() {
                Some((of, table)) if of == *length => table,
                _ => self.frequencies(*length),
            };
            out.turn(t, *position, &table, self.scale);
            known = Some((*length, table));
        }
    }
}

/// `theta^(-2 i / rotated)` in the `f32` arithmetic that models are trained with.
pub fn inverse_frequencies(theta: f64, rotated: usize) -> Vec<f32> {
    (0..rotated / 2).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / rotated as f32)).collect()
}
