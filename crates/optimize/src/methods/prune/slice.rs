//! Directions of the residual stream in which it hardly varies: the model is brought to the basis of its principal components, and
//! the last ones go (SliceGPT, arXiv 2401.15024). One basis serves all blocks, so that the result is an ordinary smaller model.

use crate::{
    Error, Result,
    methods::{at, spectrum::eigen},
    progress::{self, Progress},
    walk,
};
use faer::Mat;
use model::{Bases, Channels, Model, Role, Site, Turn};
use tensor::{Tensor, Weight};

/// The model with a head of its own where it has none; none where it has.
///
/// # Errors
/// If the residual stream of the model has no other basis.
pub fn shape(model: &Model) -> Result<Option<Model>> {
    let refuse = |reason: &str| {
        let reason = format!("the residual stream of this model has no other basis: {reason}; take --method magnitude");
        Error::Options { method: "slicegpt".into(), reason }
    };
    if let Some(reason) = model.rotation_refusal() {
        return Err(refuse(reason));
    }
    if model.keeps_ones() {
        return Err(refuse("its norms subtract the mean, which is one of all channels that there are"));
    }
    if !model.spec.tied {
        return Ok(None);
    }
    model.untied().map(Some).map_err(|e| refuse(&e.to_string()))
}

/// The model with the `keep` directions of its residual stream in which it varies most on some texts.
///
/// # Errors
/// If its moments are of no use, what remains cannot be described, or the job was interrupted.
pub fn sliced(model: &Model, keep: usize, texts: &[Vec<u32>], progress: &dyn Progress) -> Result<Model> {
    let dim = model.spec.dim;
    let moments = walk::residual_moments(model, texts, progress)?;
    if moments.rows() == 0 {
        return Err(Error::Asked("method slicegpt needs calibration data: give --data FILE".into()));
    }
    let mean = moments.mean();
    let useless = || Error::Asked("the residual stream has no usable second moments: is the model damaged?".into());
    let moments = Mat::from_fn(dim, dim, |i, j| mean[i * dim + j]);
    let (_, vectors) = eigen(&moments).ok_or_else(useless)?;
    let values = (0..dim * dim).map(|at| vectors[(at / dim, at % dim)] as f32).collect();
    let basis = Tensor::from_vec(dim, dim, values);
    let bases = Bases { residual: Some(Turn::new(&basis)), ..Bases::default() };
    let mut turned = model.clone();
    model.rotated_edges(&bases)?.apply(&mut turned)?;
    for layer in 0..model.spec.layers() {
        progress::check()?;
        model.rotated_block(layer, &bases)?.apply(&mut turned)?;
    }
    let channels = Channels { dim: (0..keep).collect(), ..Channels::all(&turned) };
    let mut small = turned.of_channels(&channels)?;
    // Turned matrices are 32-bit floats; what is left is stored as it was.
    for (site, linear) in &mut small.linears {
        let floats = model.linear(*site)?.weight.storage().dense();
        if !floats.is_coded() {
            linear.weight = Weight::encode(&linear.weight.to_tensor(), floats, None).map_err(at(*site))?;
        }
    }
    // The length of a token is over fewer channels now, and is nearly as long.
    let scale = (dim as f64 / keep as f64).sqrt() as f32;
    let of_heads = |site: &Site| matches!(site.role, Role::QNorm | Role::KNorm);
    for (_, norm) in small.norms.iter_mut().filter(|(site, _)| !of_heads(site)) {
        norm.scale.iter_mut().for_each(|s| *s *= scale);
    }
    Ok(small)
}
