//! A model of a given shape with random weights: what a configuration alone tells of speed and memory.

use crate::{Config, Error, Model, Result, families, model::NormWeights, uniform};
use std::{collections::BTreeMap, path::Path};
use tensor::{Bytes, Linear, Storage, Tensor, Weight};

/// Rows that are drawn; larger matrices repeat them.
const ROWS: usize = 64;
/// Deviation of the weights.
const DEVIATION: f32 = 0.02;

impl Model {
    /// The model that a `config.json` describes, with normally distributed weights in one storage. Blocks of equal
    /// shape share their bytes, so it takes the memory of one block until it is packed.
    ///
    /// # Errors
    /// If the configuration is malformed, of no known family, or has rows that the storage does not fit.
    pub fn of_shape(path: &Path, storage: Storage, seed: u64) -> Result<Model> {
        let config = Config::new(path, formats::json::read_object(path)?);
        let family = families::find(&config)?;
        let config = config.assuming(family.assumed)?;
        let spec = (family.spec)(&config)?;
        crate::load::check_size(&config, &spec)?;
        let mut drawn: BTreeMap<[usize; 2], Weight> = BTreeMap::new();
        let mut linears = BTreeMap::new();
        for site in spec.matrices() {
            let Some(shape) = spec.shape(site) else { continue };
            if !storage.fits(shape[1]) {
                let reason = format!("rows of {} values do not fit {storage}; take another storage", shape[1]);
                return Err(Error::Site { site, reason });
            }
            let weight = match drawn.get(&shape) {
                Some(weight) => weight.clone(),
                None => drawn.entry(shape).or_insert(draw(shape, storage, seed)?).clone(),
            };
            let bias = spec.has_bias(site).then(|| vec![0.0; shape[0]]);
            linears.insert(site, Linear { weight, bias });
        }
        let norm = |site| {
            let [_, width] = spec.shape(site)?;
            let shift = spec.has_bias(site).then(|| vec![0.0; width]);
            Some((site, NormWeights { scale: vec![1.0; width], shift }))
        };
        let norms = spec.norms().into_iter().filter_map(norm).collect();
        Ok(Model { spec, config, family, linears, norms, key_value: Default::default() })
    }
}

/// A matrix of rounded normal values: [`ROWS`] rows, again and again in another order.
fn draw([rows, cols]: [usize; 2], storage: Storage, seed: u64) -> Result<Weight> {
    let count = rows.min(ROWS);
    let at = (rows * cols) as u64;
    let normal = |i: usize| {
        let (u, v) = (uniform(seed ^ at, 2 * i as u64), uniform(seed ^ at, 2 * i as u64 + 1));
        DEVIATION * ((-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    };
    let values = Tensor::from_vec(count, cols, (0..count * cols).map(normal).collect());
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
