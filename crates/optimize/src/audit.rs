//! Audit: what is wrong with a quantized model, alone and beside its original, and how to make its bad matrices anew.

use crate::{
    Error, Result,
    data::Document,
    evaluate::{self, Against},
    progress::{self, Progress},
};
use model::{Model, Site};
use serde::Serialize;
use tensor::{Linear, Tensor, Weight, ops};

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Audit {
    /// Every matrix.
    pub matrices: Vec<Matrix>,
    /// What is wrong beside the matrices: norms and biases.
    pub others: Vec<String>,
    /// Payload of the model.
    pub size_bytes: usize,
    /// Mean bits per parameter that it takes.
    pub bits_per_weight: f64,
    /// Mean bits of information of a parameter's code; of floats the bits that they take.
    pub effective_bits: f64,
    /// The model against its original on text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub against: Option<Against>,
}

/// One matrix.
#[derive(Clone, Debug, Serialize)]
pub struct Matrix {
    /// Its site.
    pub site: String,
    /// How it is stored.
    pub storage: String,
    /// Outputs and inputs.
    pub shape: [usize; 2],
    /// Bits per value, scales included.
    pub bits: f64,
    /// Bits of information of a code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effective_bits: Option<f64>,
    /// Squared error against the original over its power.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
    /// The error that rounding the original to this storage leaves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounding: Option<f64>,
    /// What is wrong with it.
    pub faults: Vec<String>,
}

impl Audit {
    /// The sites whose matrices are bad.
    pub fn bad(&self) -> Vec<Site> {
        self.matrices.iter().filter(|m| !m.faults.is_empty()).filter_map(|m| m.site.parse().ok()).collect()
    }

    /// Is nothing wrong?
    pub fn is_clean(&self) -> bool {
        self.others.is_empty() && self.matrices.iter().all(|m| m.faults.is_empty())
    }
}

/// Part of a code's bits below which most of it is lost.
const COLLAPSED: f64 = 0.4;
/// Times rounding's error from which a matrix was not made with care, or not of this original.
const WORSE: f64 = 4.0;
/// Error of floats against the original that is no rounding.
const OF_FLOATS: f64 = 1e-3;
/// Rows that are rounded anew to know what rounding costs.
const ROWS: usize = 64;

/// Looks at every matrix of a model, beside those of its original where one is given, and reads documents with both.
///
/// # Errors
/// If the original has another shape, or the job was interrupted.
pub fn audit(model: &Model, base: Option<&Model>, documents: &[Document], progress: &dyn Progress) -> Result<Audit> {
    if let Some(base) = base {
        check_shapes(model, base)?;
    }
    let sites: Vec<Site> = model.linears.keys().copied().collect();
    progress.begin(
        "looking at matrices",
        sites.iter().filter_map(|s| model.linear(*s).ok()).map(|l| l.weight.len() as u64).sum(),
    );
    let (mut matrices, mut information) = (Vec::new(), 0.0);
    for site in sites {
        progress::check()?;
        let weight = &model.linear(site)?.weight;
        // A head that is the embedding in one file may stand by itself in the other.
        let original = base.map(|b| b.linear(site)).transpose()?.map(|l| &l.weight);
        let matrix = look(site, weight, original)?;
        information += matrix.effective_bits.unwrap_or(matrix.bits) * weight.len() as f64;
        matrices.push(matrix);
        progress.advance(weight.len() as u64);
    }
    let values: usize = model.linears.values().map(|l| l.weight.len()).sum();
    let against = match base.filter(|_| !documents.is_empty()) {
        Some(base) => {
            progress.begin("reading with both", documents.len() as u64);
            Some(evaluate::summarize_pair(&evaluate::compare(model, base, documents, progress)?))
        }
        None => None,
    };
    Ok(Audit {
        matrices,
        others: others(model, base),
        size_bytes: model.size_bytes(),
        bits_per_weight: model.bits_per_weight(),
        effective_bits: information / values.max(1) as f64,
        against,
    })
}

fn check_shapes(model: &Model, base: &Model) -> Result<()> {
    for site in model.spec.matrices() {
        let (own, other) = (model.spec.shape(site), base.spec.shape(base.spec.resolve(site)));
        if own != other {
            let reason = format!("is {own:?} here and {other:?} in the original: that is another model");
            return Err(Error::Site { site, reason });
        }
    }
    Ok(())
}

fn look(site: Site, weight: &Weight, original: Option<&Weight>) -> Result<Matrix> {
    let values = weight.to_tensor();
    let effective_bits = weight.code_entropy();
    let mut faults = faults_of(&values);
    let grid = weight.grid().filter(|_| weight.low_rank().is_none());
    if let (Some(effective), Some(grid)) = (effective_bits, grid)
        && effective < COLLAPSED * f64::from(grid.code_bits())
        && faults.is_empty()
    {
        faults.push(format!("uses {effective:.2} bits of codes of {}: it has collapsed", grid.code_bits()));
    }
    let (mut error, mut rounding) = (None, None);
    if let Some(original) = original.filter(|_| values.is_finite()) {
        let original = original.to_tensor();
        let e = relative(&values, &original);
        error = Some(e);
        let most = match grid {
            // What a low rank leaves out was meant to go.
            None if weight.low_rank().is_some() => 1.0,
            None => OF_FLOATS,
            Some(_) => {
                let rows = values.rows();
                let picked: Vec<usize> = (0..rows).step_by(rows.div_ceil(ROWS)).collect();
                let some = original.select_rows(&picked);
                let rounded = Weight::encode(&some, weight.storage(), None)
                    .map_err(|e| Error::Site { site, reason: e.to_string() })?;
                let r = relative(&rounded.to_tensor(), &some);
                rounding = Some(r);
                WORSE * r.max(1e-6)
            }
        };
        if e > most {
            let beside = rounding.map_or(String::new(), |r| format!(", rounding it leaves {r:.1e}"));
            faults.push(format!("differs from the original by {e:.1e} of its power{beside}"));
        }
    }
    Ok(Matrix {
        site: site.to_string(),
        storage: weight.name(),
        shape: [weight.rows(), weight.cols()],
        bits: 8.0 * weight.size_bytes() as f64 / weight.len().max(1) as f64,
        effective_bits,
        error,
        rounding,
        faults,
    })
}

/// What is wrong with a matrix by itself.
pub fn faults_of(values: &Tensor) -> Vec<String> {
    let mut faults = Vec::new();
    let bad = values.as_slice().iter().filter(|v| !v.is_finite()).count();
    if bad > 0 {
        faults.push(format!("holds {bad} values that are infinite or not numbers"));
        return faults;
    }
    let constant = |row: &[f32]| row.len() > 1 && row.iter().all(|v| *v == row[0]);
    let same = (0..values.rows()).filter(|r| constant(values.row(*r))).count();
    if same == values.rows() {
        let zero = values.as_slice().iter().all(|v| *v == 0.0);
        faults.push(if zero { "is zero throughout".into() } else { "every output is one value throughout".into() });
    } else if same * 4 > values.rows() {
        faults.push(format!("{same} of {} outputs are one value throughout", values.rows()));
    }
    let peak = ops::absolute_maxima(values).into_iter().fold(0f32, f32::max);
    let mean =
        values.as_slice().iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.as_slice().len().max(1) as f64;
    if f64::from(peak) > 1e4 * mean.sqrt() {
        faults.push(format!("one value ({peak:.1e}) is ten thousand times the others"));
    }
    faults
}

/// The squared error over the power of what should be there.
fn relative(got: &Tensor, want: &Tensor) -> f64 {
    let pairs = || got.as_slice().iter().zip(want.as_slice()).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let (error, power) = (pairs().map(|(a, b)| (a - b).powi(2)).sum::<f64>(), pairs().map(|(_, b)| b * b).sum::<f64>());
    if power > 0.0 { error / power } else { error }
}

/// Norms and biases that are no numbers, or other ones than the original's.
fn others(model: &Model, base: Option<&Model>) -> Vec<String> {
    let mut found = Vec::new();
    let mut check = |name: String, values: &[f32], original: Option<&[f32]>| {
        if values.iter().any(|v| !v.is_finite()) {
            return found.push(format!("{name} holds values that are infinite or not numbers"));
        }
        let Some(original) = original else { return };
        if original.len() != values.len() {
            return found.push(format!("{name} has {} values, the original's {}", values.len(), original.len()));
        }
        let largest = original.iter().fold(0f32, |m, v| m.max(v.abs())).max(1e-6);
        let off = values.iter().zip(original).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        if off > 0.02 * largest {
            found.push(format!("{name} differs from the original's by up to {off:.1e}"));
        }
    };
    for (site, norm) in &model.norms {
        let original = base.and_then(|b| b.norms.get(site));
        check(site.to_string(), &norm.scale, original.map(|n| &n.scale[..]));
        if let Some(shift) = &norm.shift {
            check(format!("the shift of {site}"), shift, original.and_then(|n| n.shift.as_deref()));
        }
    }
    for (site, linear) in &model.linears {
        if let Some(bias) = &linear.bias {
            let original = base.and_then(|b| b.linears.get(site)).and_then(|l| l.bias.as_deref());
            check(format!("the bias of {site}"), bias, original);
        }
    }
    found
}

/// The model with some matrices made anew: the original's, rounded to the storage that they have. Where norms or biases are
/// not the original's, all of them are taken from it.
///
/// # Errors
/// If a storage cannot hold one.
pub fn repaired(model: &Model, base: &Model, found: &Audit) -> Result<Model> {
    let mut out = model.clone();
    for site in found.bad() {
        let (own, original) = (model.linear(site)?, base.linear(site)?);
        let weight = Weight::encode(&original.weight.to_tensor(), own.weight.storage(), None)
            .map_err(|e| Error::Site { site, reason: e.to_string() })?;
        out.replace(site, Linear { weight, ..own.clone() })?;
    }
    if !found.others.is_empty() {
        out.norms.clone_from(&base.norms);
        for (site, linear) in &mut out.linears {
            linear.bias = base.linear(*site)?.bias.clone();
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(rows: usize, cols: usize) -> Tensor {
        Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| ((i * i) as f32 * 0.731).sin()).collect())
    }

    #[test]
    fn faults_of_a_matrix_are_named_and_a_good_one_has_none() {
        let site = Site::of(0, model::Role::Up);
        let storage = tensor::Storage::parse("int4g32").unwrap();
        let x = wave(40, 64);
        let original = Weight::from_tensor(x.clone());
        let good = Weight::encode(&x, storage, None).unwrap();
        let found = look(site, &good, Some(&original)).unwrap();
        assert!(found.faults.is_empty(), "{:?}", found.faults);
        assert!(found.effective_bits.unwrap() > 3.0 && found.error.unwrap() < 2.0 * found.rounding.unwrap());
        let spoiled = |change: &dyn Fn(&mut Tensor)| {
            let mut y = x.clone();
            change(&mut y);
            Weight::encode(&y, storage, None).unwrap()
        };
        let faults = |w: &Weight, base: Option<&Weight>| look(site, w, base).unwrap().faults.join("; ");
        let zero = spoiled(&|y| y.as_mut_slice().fill(0.0));
        assert!(faults(&zero, None).contains("zero throughout"));
        let half = spoiled(&|y| y.as_mut_slice()[..20 * 64].fill(0.0));
        assert!(faults(&half, None).contains("20 of 40 outputs"));
        let signs = spoiled(&|y| y.as_mut_slice().iter_mut().for_each(|v| *v = v.signum()));
        assert!(faults(&signs, None).contains("collapsed"), "{}", faults(&signs, None));
        let turned = spoiled(&|y| y.as_mut_slice().reverse());
        assert!(
            faults(&turned, None).is_empty() && faults(&turned, Some(&original)).contains("differs from the original")
        );
        let mut y = x.clone();
        y.as_mut_slice()[7] = f32::NAN;
        assert!(faults(&Weight::from_tensor(y), None).contains("holds 1 values that are infinite"));
    }
}
