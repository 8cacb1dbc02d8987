//! What gradients of the likelihood of calibration texts tell of matrices, gathered before a step begins.

use crate::{
    Needs, Result,
    calibrate::Taylor,
    data::batches,
    progress::{self, Progress},
    walk::BATCH,
};
use model::{Backward, Likelihood, Model, Parameters, Site, Tokens};
use std::collections::BTreeMap;
use tensor::{
    Storage, Tensor,
    ops::{Gram, Squares},
    packed::Form,
};

/// As far as a method asks.
#[derive(Default)]
pub struct Gradients {
    /// Second moments of those of what matrices return.
    pub outputs: BTreeMap<Site, Gram>,
    /// Their squares alone.
    pub slopes: BTreeMap<Site, Squares>,
    /// What values and columns are worth by them.
    pub taylor: BTreeMap<Site, Taylor>,
}

/// What a method asks to know of the gradients of the likelihood of calibration texts; by value only of the sites in question.
///
/// # Errors
/// If the model cannot run, or the job was interrupted.
pub fn gradients(
    model: &Model,
    needs: Needs,
    sites: &BTreeMap<Site, Storage>,
    calibration: &[Vec<u32>],
    progress: &dyn Progress,
) -> Result<Gradients> {
    let (outputs, slopes) = match (needs.gradients, needs.slopes) {
        (true, _) => of_outputs(model, needs, calibration, progress)?,
        (_, true) => of_outputs(model, needs, some(calibration), progress)?,
        _ => Default::default(),
    };
    let taylor = if needs.taylor { of_values(model, sites, calibration, progress)? } else { BTreeMap::new() };
    Ok(Gradients { outputs, slopes, taylor })
}

/// Tokens whose gradients are squared: a number for each output settles soon, and walking back takes twice as long as forth.
const FEW: usize = 16_384;

/// The first texts, of about [`FEW`] tokens.
fn some(calibration: &[Vec<u32>]) -> &[Vec<u32>] {
    let mut tokens = 0;
    let count = calibration.iter().take_while(|text| {
        let before = tokens;
        tokens += text.len();
        before < FEW
    });
    &calibration[..count.count()]
}

/// What a batch of texts is to predict: nothing follows the last token of a text.
fn predicted(sequences: Vec<Vec<u32>>) -> Tokens {
    let targets = sequences.iter().flat_map(|s| s[1..].iter().copied().map(Some).chain([None])).collect();
    Tokens { sequences, targets, places: Vec::new() }
}

/// What values and columns of matrices are worth to each text.
fn of_values(
    model: &Model,
    sites: &BTreeMap<Site, Storage>,
    calibration: &[Vec<u32>],
    progress: &dyn Progress,
) -> Result<BTreeMap<Site, Taylor>> {
    let mut back = Backward::new(model, Form::F32);
    let sites = || sites.keys().filter(|site| site.layer.is_some());
    let mut values: BTreeMap<Site, Tensor> = BTreeMap::new();
    let mut taylor: BTreeMap<Site, Taylor> = BTreeMap::new();
    let mut found = Parameters::default();
    for site in sites() {
        let matrix = model.linear(*site)?.weight.to_tensor();
        let zeros = || Tensor::zeros(matrix.rows(), matrix.cols());
        found.matrices.insert(*site, zeros());
        taylor.insert(*site, Taylor { values: zeros(), columns: Tensor::zeros(calibration.len(), matrix.cols()) });
        values.insert(*site, matrix);
    }
    progress.begin("gathering gradients of values", calibration.len() as u64);
    for (text, tokens) in calibration.iter().enumerate() {
        progress::check()?;
        back.run(model, &predicted(vec![tokens.clone()]), &mut Likelihood, 1.0, &mut found)?;
        for (site, gradient) in &mut found.matrices {
            let (Some(matrix), Some(own)) = (values.get(site), taylor.get_mut(site)) else { continue };
            let Taylor { values, columns } = own;
            let columns = columns.row_mut(text);
            for row in 0..matrix.rows() {
                let worth = values.row_mut(row).iter_mut().zip(&mut *columns);
                for ((worth, column), (w, g)) in worth.zip(matrix.row(row).iter().zip(gradient.row(row))) {
                    *worth += (w * g).powi(2);
                    *column += w * g;
                }
            }
            gradient.as_mut_slice().fill(0.0);
        }
        progress.advance(1);
    }
    Ok(taylor)
}

/// The second moments of the gradients of what the matrices of blocks return, or their squares.
fn of_outputs(
    model: &Model,
    needs: Needs,
    calibration: &[Vec<u32>],
    progress: &dyn Progress,
) -> Result<(BTreeMap<Site, Gram>, BTreeMap<Site, Squares>)> {
    let mut back = Backward::new(model, Form::F32);
    if needs.gradients {
        back.watch_outputs();
    }
    if needs.slopes {
        back.watch_squares();
    }
    progress.begin("gathering gradients", calibration.iter().map(|s| s.len() as u64).sum());
    for range in batches(calibration, BATCH) {
        progress::check()?;
        let sequences = calibration[range].to_vec();
        let count = sequences.iter().map(Vec::len).sum::<usize>();
        back.run(model, &predicted(sequences), &mut Likelihood, 1.0, &mut Parameters::default())?;
        progress.advance(count as u64);
    }
    Ok(back.watched())
}
