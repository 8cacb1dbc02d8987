//! `Parameters`: numbers by site, in 32-bit floats: values that learn, their gradients, an optimizer's moments.

use crate::{Adapters, Change, Error, Model, NormWeights, Result, Site};
use std::collections::BTreeMap;
use tensor::{Linear, LowRank, Storage, Tensor, Weight};

/// Parameters whose gradients are final together, in the order in which the way back leaves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bucket {
    /// The last norm, and the head where it is not the embedding.
    Head,
    /// A block.
    Block(u16),
    /// Embedding and learned positions.
    Embedding,
}

impl Bucket {
    /// All of a model of so many blocks, in that order.
    pub fn all(layers: u16) -> impl Iterator<Item = Bucket> {
        let blocks = (0..layers).rev().map(Bucket::Block);
        std::iter::once(Bucket::Head).chain(blocks).chain([Bucket::Embedding])
    }

    /// Does it hold the parameters of a site?
    pub fn holds(self, site: Site) -> bool {
        match self {
            Bucket::Block(layer) => site.layer == Some(layer),
            Bucket::Head => site == Site::HEAD || site == Site::FINAL_NORM,
            Bucket::Embedding => site.layer.is_none() && !Bucket::Head.holds(site),
        }
    }
}

/// A number for every parameter of a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parameters {
    /// `[outputs, inputs]`; a tied head is the embedding.
    pub matrices: BTreeMap<Site, Tensor>,
    /// `A` of adapters, `[rank, inputs]`.
    pub downs: BTreeMap<Site, Tensor>,
    /// `B` of adapters, `[outputs, rank]`.
    pub ups: BTreeMap<Site, Tensor>,
    /// What a block's output is multiplied by, to be compared with a teacher's, `[teacher's width, width]`.
    pub projections: BTreeMap<Site, Tensor>,
    /// `[outputs]`.
    pub biases: BTreeMap<Site, Vec<f32>>,
    /// `[width]`.
    pub scales: BTreeMap<Site, Vec<f32>>,
    /// `[width]`.
    pub shifts: BTreeMap<Site, Vec<f32>>,
    /// Lengths of adapted rows, `[outputs]` (DoRA).
    pub magnitudes: BTreeMap<Site, Vec<f32>>,
    /// Of matrices that learn to be codes: what the scales of their sub-blocks are multiplied by.
    pub factors: BTreeMap<Site, Vec<f32>>,
    /// What their offsets are moved by, in those scales.
    pub drifts: BTreeMap<Site, Vec<f32>>,
    /// What the levels of their palettes are moved by, in mean distances between levels.
    pub moves: BTreeMap<Site, Vec<f32>>,
}

/// What tables of parameters are called.
const TABLES: [&str; 4] = ["weight", "lora_a", "lora_b", "projection"];
/// The same of vectors.
const VECTORS: [&str; 7] = ["bias", "scale", "shift", "magnitude", "factor", "drift", "move"];

impl Parameters {
    /// The values of a model; of a matrix that is the product of two those of its factors, and what they leave does not learn.
    pub fn of(model: &Model) -> Parameters {
        let mut all = Parameters::default();
        for (site, linear) in &model.linears {
            match linear.weight.low_rank() {
                Some(low) => {
                    all.downs.insert(*site, low.down().to_tensor());
                    all.ups.insert(*site, low.up().to_tensor());
                }
                None => {
                    all.matrices.insert(*site, linear.weight.to_tensor());
                }
            }
            all.biases.extend(linear.bias.clone().map(|bias| (*site, bias)));
        }
        for (site, norm) in &model.norms {
            all.scales.insert(*site, norm.scale.clone());
            all.shifts.extend(norm.shift.clone().map(|shift| (*site, shift)));
        }
        all
    }

    /// The values of adapters, those of the model beneath them left out: they do not learn.
    pub fn of_adapters(adapters: &Adapters) -> Parameters {
        let mut all = Parameters::default();
        for (site, adapter) in adapters {
            all.downs.insert(*site, adapter.down.clone());
            all.ups.insert(*site, adapter.up.clone());
            all.magnitudes.extend(adapter.magnitude.clone().map(|m| (*site, m)));
        }
        all
    }

    /// The adapter of a site, with its scale; `None` where there is none.
    pub fn change(&self, site: Site, scale: f32) -> Option<Change<'_>> {
        let (down, up) = (self.downs.get(&site)?, self.ups.get(&site)?);
        Some(Change { down, up, scale, magnitude: self.magnitudes.get(&site).map(Vec::as_slice) })
    }

    /// Zeros of the same shapes.
    pub fn zeros(&self) -> Parameters {
        let tensors =
            |all: &BTreeMap<Site, Tensor>| all.iter().map(|(s, m)| (*s, Tensor::zeros(m.rows(), m.cols()))).collect();
        let zeros = |all: &BTreeMap<Site, Vec<f32>>| all.iter().map(|(s, v)| (*s, vec![0.0; v.len()])).collect();
        Parameters {
            matrices: tensors(&self.matrices),
            downs: tensors(&self.downs),
            ups: tensors(&self.ups),
            projections: tensors(&self.projections),
            biases: zeros(&self.biases),
            scales: zeros(&self.scales),
            shifts: zeros(&self.shifts),
            magnitudes: zeros(&self.magnitudes),
            factors: zeros(&self.factors),
            drifts: zeros(&self.drifts),
            moves: zeros(&self.moves),
        }
    }

    /// All tables, in the order of their words.
    fn all_tables(&self) -> [&BTreeMap<Site, Tensor>; 4] {
        [&self.matrices, &self.downs, &self.ups, &self.projections]
    }

    /// All vectors, in the order of their words.
    fn all_vectors(&self) -> [&BTreeMap<Site, Vec<f32>>; 7] {
        let Parameters { biases, scales, shifts, magnitudes, factors, drifts, moves, .. } = self;
        [biases, scales, shifts, magnitudes, factors, drifts, moves]
    }

    /// All numbers, parameter by parameter in a fixed order: [`Parameters::tables`] first.
    pub fn slices(&self) -> impl Iterator<Item = &[f32]> {
        let vectors = self.all_vectors().into_iter().flat_map(BTreeMap::values).map(Vec::as_slice);
        self.all_tables().into_iter().flat_map(BTreeMap::values).map(Tensor::as_slice).chain(vectors)
    }

    /// The same to be written.
    pub fn slices_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let Parameters {
            matrices,
            downs,
            ups,
            projections,
            biases,
            scales,
            shifts,
            magnitudes,
            factors,
            drifts,
            moves,
        } = self;
        let vectors = [biases, scales, shifts, magnitudes, factors, drifts, moves];
        let vectors = vectors.into_iter().flat_map(BTreeMap::values_mut).map(Vec::as_mut_slice);
        let tables = [matrices, downs, ups, projections].into_iter().flat_map(BTreeMap::values_mut);
        tables.map(Tensor::as_mut_slice).chain(vectors)
    }

    /// Which parameter each slice is, in the same order: its site, and a word: `weight`, `lora_a`, `bias` ...
    pub fn names(&self) -> impl Iterator<Item = (Site, &'static str)> {
        let tables = self.all_tables().into_iter().zip(TABLES);
        let tables = tables.flat_map(|(all, name)| all.keys().map(move |site| (*site, name)));
        let vectors = self.all_vectors().into_iter().zip(VECTORS);
        tables.chain(vectors.flat_map(|(all, name)| all.keys().map(move |site| (*site, name))))
    }

    /// How many of the slices are tables of numbers, which a weight decay takes part of; the others are vectors.
    pub fn tables(&self) -> usize {
        self.matrices.len() + self.downs.len() + self.ups.len() + self.projections.len()
    }

    /// The tables, in the order of [`Parameters::slices`].
    pub fn each_table(&self) -> impl Iterator<Item = &Tensor> {
        [&self.matrices, &self.downs, &self.ups, &self.projections].into_iter().flat_map(BTreeMap::values)
    }

    /// The same to be written.
    pub fn each_table_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let Parameters { matrices, downs, ups, projections, .. } = self;
        [matrices, downs, ups, projections].into_iter().flat_map(BTreeMap::values_mut)
    }

    /// The numbers of a bucket, in the order of [`Parameters::slices`].
    pub fn bucket(&self, bucket: Bucket) -> impl Iterator<Item = &[f32]> {
        self.names().zip(self.slices()).filter(move |((site, _), _)| bucket.holds(*site)).map(|(_, slice)| slice)
    }

    /// The same to be written.
    pub fn bucket_mut(&mut self, bucket: Bucket) -> impl Iterator<Item = &mut [f32]> {
        let held: Vec<bool> = self.names().map(|(site, _)| bucket.holds(site)).collect();
        self.slices_mut().zip(held).filter_map(|(slice, held)| held.then_some(slice))
    }

    /// How many numbers.
    pub fn len(&self) -> usize {
        self.slices().map(<[f32]>::len).sum()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts the vectors into a model; its matrices are packed ([`crate::Backward::refresh`]).
    pub fn give_vectors(&self, model: &mut Model) {
        for (site, bias) in &self.biases {
            if let Some(linear) = model.linears.get_mut(site) {
                linear.bias = Some(bias.clone());
            }
        }
        for (site, scale) in &self.scales {
            let shift = self.shifts.get(site).cloned();
            model.norms.insert(*site, NormWeights { scale: scale.clone(), shift });
        }
    }

    /// A model with these values, its matrices stored as those of `like` where these are floats, else as brain floats. Where a
    /// matrix of `like` is the product of two, `downs` and `ups` are these.
    ///
    /// # Errors
    /// If a matrix cannot be stored.
    pub fn model(&self, like: &Model) -> Result<Model> {
        let mut model = like.clone();
        let mut put = |site: Site, weight| {
            model.linears.insert(site, Linear::with_bias(weight, self.biases.get(&site).cloned()));
        };
        for (site, values) in &self.matrices {
            put(*site, stored_like(values, &like.linear(*site)?.weight, *site)?);
        }
        for (site, down) in &self.downs {
            let linear = like.linear(*site)?;
            let (Some(low), Some(up)) = (linear.weight.low_rank(), self.ups.get(site)) else { continue };
            let (up, down) = (stored_like(up, low.up(), *site)?, stored_like(down, low.down(), *site)?);
            let low = LowRank::new(up, down, low.rest().cloned());
            put(*site, Weight::LowRank(Box::new(low.map_err(|e| Error::Site { site: *site, reason: e.to_string() })?)));
        }
        self.give_vectors(&mut model);
        Ok(model)
    }

    /// The matrix of a site.
    ///
    /// # Errors
    /// If there is none.
    pub fn matrix(&mut self, site: Site) -> Result<&mut Tensor> {
        let none = || Error::Site { site, reason: "the model has no such matrix".into() };
        self.matrices.get_mut(&site).ok_or_else(none)
    }

    /// Scale and shift of a norm; `None` where it does not learn.
    pub fn norm(&mut self, site: Site) -> Option<(&mut [f32], Option<&mut [f32]>)> {
        let scale = self.scales.get_mut(&site)?;
        Some((scale, self.shifts.get_mut(&site).map(Vec::as_mut_slice)))
    }
}

/// Values stored as others are, where these are floats, else as brain floats.
fn stored_like(values: &Tensor, like: &Weight, site: Site) -> Result<Weight> {
    let weight = match like.storage() {
        Storage::F32 => Ok(Weight::from_tensor(values.clone())),
        coded if coded.is_coded() => Weight::encode(values, Storage::Bf16, None),
        float => Weight::encode(values, float, None),
    };
    weight.map_err(|e| Error::Site { site, reason: e.to_string() })
}
