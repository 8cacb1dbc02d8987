//! A model of a given shape with random weights: what a configuration alone tells of speed and memory.

use crate::{Config, Error, Model, Result, Role, Site, Spec, families, model::NormWeights, save::fallback, uniform};
use std::{collections::BTreeMap, path::Path};
use tensor::{Bytes, Linear, LowRank, Storage, Tensor, Weight};

/// Rows that are drawn; larger matrices repeat them.
const ROWS: usize = 64;
/// Deviation of the weights.
const DEVIATION: f32 = 0.02;

/// How the matrices of a model of random weights are stored.
#[derive(Clone, Copy, Debug)]
pub struct Drawn {
    /// All of them.
    pub storage: Storage,
    /// Those outside of blocks, where they are stored otherwise.
    pub edges: Option<Storage>,
    /// Those of blocks as products of two that together hold this part of their parameters.
    pub parameters: Option<f64>,
}

impl Model {
    /// The model that a `config.json` describes, with normally distributed weights. Blocks of equal
    /// shape share their bytes, so it takes the memory of one block until it is packed.
    ///
    /// # Errors
    /// If the configuration is malformed, of no known family, or has rows that the storage does not fit.
    pub fn of_shape(path: &Path, how: Drawn, seed: u64) -> Result<Model> {
        let config = Config::new(path, formats::json::read_object(path)?);
        let mut known: BTreeMap<([usize; 2], String), Weight> = BTreeMap::new();
        let mut drawn = |site: Site, shape: [usize; 2], storage: Storage| {
            if !storage.fits(shape[1]) {
                let reason = format!("rows of {} values do not fit {storage}; take another storage", shape[1]);
                return Err(Error::Site { site, reason });
            }
            let key = (shape, storage.name());
            Ok(match known.get(&key) {
                Some(weight) => weight.clone(),
                None => known.entry(key).or_insert(draw(shape, storage, seed)?).clone(),
            })
        };
        Model::of_config(config, &mut |_, site, shape| {
            let [rows, cols] = shape;
            match how.parameters.filter(|_| site.layer.is_some()) {
                None => drawn(site, shape, how.edges.filter(|_| site.layer.is_none()).unwrap_or(how.storage)),
                Some(part) => {
                    let rank = ((part * (rows * cols) as f64) as usize / (rows + cols)).max(1);
                    let up = drawn(site, [rows, rank], fallback(how.storage, rank))?;
                    let down = drawn(site, [rank, cols], how.storage)?;
                    let product = LowRank::new(up, down, None);
                    product
                        .map(|p| Weight::LowRank(Box::new(p)))
                        .map_err(|e| Error::Site { site, reason: e.to_string() })
                }
            }
        })
    }

    /// A model that has learned nothing: matrices are normally distributed with the deviation that the configuration names
    /// (`initializer_range`; 0.02 where it does not), those that add to the residual stream with one that is smaller by the
    /// root of their number (GPT-2); biases are zero, norms leave their input as it is.
    ///
    /// # Errors
    /// If the configuration is malformed or of no known family.
    pub fn fresh(config: Config, seed: u64) -> Result<Model> {
        let deviation = config.number_or("initializer_range", f64::from(DEVIATION))?;
        let mut number = 0;
        Model::of_config(config, &mut |spec, site, [rows, cols]| {
            let adds = matches!(site.role, Role::O | Role::Down);
            let deviation = if adds { deviation / (2.0 * f64::from(spec.layers())).sqrt() } else { deviation };
            number += 1;
            let own = uniform(seed, number).to_bits();
            let values = (0..rows * cols).map(|i| (deviation * normal(own, i)) as f32).collect();
            Ok(Weight::from_tensor(Tensor::from_vec(rows, cols, values)))
        })
    }

    fn of_config(config: Config, weight: Draw<'_>) -> Result<Model> {
        let family = families::find(&config)?;
        let config = config.assuming(family.assumed)?;
        let spec = (family.spec)(&config)?;
        crate::load::check_size(&config, &spec)?;
        let mut linears = BTreeMap::new();
        for site in spec.matrices() {
            let Some(shape) = spec.shape(site) else { continue };
            let bias = spec.has_bias(site).then(|| vec![0.0; shape[0]]);
            linears.insert(site, Linear::with_bias(weight(&spec, site, shape)?, bias));
        }
        let norm = |site| {
            let [_, width] = spec.shape(site)?;
            let shift = spec.has_bias(site).then(|| vec![0.0; width]);
            Some((site, NormWeights { scale: vec![1.0; width], shift }))
        };
        let norms = spec.norms().into_iter().filter_map(norm).collect();
        Ok(Model { spec, config, family, linears, norms, adapters: BTreeMap::new(), key_value: Default::default() })
    }
}

/// The weight of a site of a shape.
type Draw<'a> = &'a mut dyn FnMut(&Spec, Site, [usize; 2]) -> Result<Weight>;

/// Value `i` of a normal distribution (Box and Muller).
fn normal(seed: u64, i: usize) -> f64 {
    let (u, v) = (uniform(seed, 2 * i as u64), uniform(seed, 2 * i as u64 + 1));
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// A matrix of rounded normal values: [`ROWS`] rows, again and again in another order.
fn draw([rows, cols]: [usize; 2], storage: Storage, seed: u64) -> Result<Weight> {
    let count = rows.min(ROWS);
    let at = (rows * cols) as u64;
    let values =
        Tensor::from_vec(count, cols, (0..count * cols).map(|i| DEVIATION * normal(seed ^ at, i) as f32).collect());
    let few = Weight::encode(&values, storage, None).map_err(|e| Error::Asked(e.to_string()))?;
    let width = storage.row_bytes(cols);
    let mut bytes = Vec::with_capacity(rows * width);
    for row in 0..rows {
        // Another order in every run of rows, so that outputs are not all alike.
        let from = (row + row / count * 7) % count;
        bytes.extend_from_slice(&few.bytes()[from * width..(from + 1) * width]);
    }
    Weight::new(storage, rows, cols, Bytes::from_vec(bytes)).map_err(|e| Error::Asked(e.to_string()))
}
