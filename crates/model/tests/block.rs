//! The gradient of one block alone against finite differences of the exact path, on every family and every switch.
#![allow(clippy::unwrap_used, clippy::panic)]

mod shared;

use model::{BlockBackward, Flow, Model, Parameters, Site, load, uniform};
use shared::{directories, dot, with_values};
use tensor::{Tensor, ops::Activation, packed::Form, threads};

/// Two texts of different lengths.
const ROWS: [usize; 2] = [40, 13];

fn flow(model: &Model) -> Flow {
    let token = |i: usize| (uniform(7, i as u64) * model.spec.vocab as f64) as u32;
    let text: Vec<u32> = (0..ROWS[0] + ROWS[1]).map(token).collect();
    model.start(&[&text[..ROWS[0]], &text[ROWS[0]..]], &[0, 0]).unwrap()
}

/// What the outputs are multiplied by, and summed to a loss.
fn asked(x: &Tensor) -> Tensor {
    let value = |i: usize| (2.0 * uniform(9, i as u64) - 1.0) as f32;
    Tensor::from_vec(x.rows(), x.cols(), (0..x.as_slice().len()).map(value).collect())
}

/// The values of a block.
fn values(model: &Model, layer: u16) -> Parameters {
    let mut all = Parameters::of(model);
    let own = |site: &Site| site.layer == Some(layer);
    all.matrices.retain(|site, _| own(site));
    all.biases.retain(|site, _| own(site));
    all.scales.retain(|site, _| own(site));
    all.shifts.retain(|site, _| own(site));
    all
}

/// The loss of the exact path.
fn loss(model: &Model, layer: u16, values: &Parameters, inputs: &Tensor) -> f64 {
    let exact = with_values(model, values);
    let mut flow = flow(model);
    flow.stand_at(inputs);
    exact.block_once(layer, &mut flow, &mut ()).unwrap();
    dot(flow.residual().as_slice(), asked(inputs).as_slice())
}

/// Outputs and gradients, of the inputs last.
fn gradient(model: &Model, layer: u16, values: &Parameters, inputs: &Tensor) -> (Tensor, Parameters, Tensor) {
    let mut working = model.clone();
    let mut back = BlockBackward::new(&working, Form::F32);
    for (site, matrix) in &values.matrices {
        back.refresh(&mut working, *site, matrix).unwrap();
    }
    values.give_vectors(&mut working);
    // Another text before leaves nothing behind.
    back.forward(&working, layer, &[5], &Tensor::zeros(5, inputs.cols())).unwrap();
    let outputs = back.forward(&working, layer, &ROWS, inputs).unwrap().clone();
    let mut into = values.zeros();
    let inward = back.backward(&working, layer, &asked(inputs), &mut into).unwrap().clone();
    (outputs, into, inward)
}

#[test]
fn gradients_of_a_block_are_those_of_finite_differences() {
    for dir in directories() {
        let model = load::open(&dir).unwrap().model;
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let layer = model.spec.layers() - 1;
        let mut before = flow(&model);
        (0..layer).for_each(|layer| model.block_once(layer, &mut before, &mut ()).unwrap());
        let inputs = before.residual().clone();
        let values = values(&model, layer);
        let (outputs, gradient, inward) = gradient(&model, layer, &values, &inputs);
        let exact = loss(&model, layer, &values, &inputs);
        let sum = dot(outputs.as_slice(), asked(&inputs).as_slice());
        assert!((sum - exact).abs() < 1e-4 * exact.abs().max(10.0), "{name}: {sum} {exact}");
        let check = |what: String, own: &[f32], chance: u64, at: &dyn Fn(&[f32], f32) -> f64| {
            let size = dot(own, own).sqrt() / (own.len() as f64).sqrt();
            // Along the gradient itself, bent by chance, so that a wrong part of it shows.
            let direction: Vec<f32> = own
                .iter()
                .enumerate()
                .map(|(k, g)| (f64::from(*g) / size.max(1e-12) + 2.0 * uniform(chance, k as u64) - 1.0) as f32)
                .collect();
            let slope = dot(own, &direction);
            let h = (2e-2 / dot(&direction, &direction).sqrt().max(1e-6)) as f32;
            let wide = (at(&direction, h) - at(&direction, -h)) / (2.0 * f64::from(h));
            let near = (at(&direction, h / 2.0) - at(&direction, -h / 2.0)) / f64::from(h);
            // Richardson's extrapolation takes the third derivative away.
            let numeric = (4.0 * near - wide) / 3.0;
            let part = if model.spec.activation == Activation::Relu { 2e-2 } else { 5e-3 };
            // Sums of thousands of outputs are right to some ten-thousandths.
            let bound = part * slope.abs() + 1e-4 / f64::from(h);
            assert!(
                (numeric - slope).abs() <= bound,
                "{name}: {what}: by differences {numeric:.6e}, by the gradient {slope:.6e}, step {h:.1e}"
            );
        };
        for (i, (site, what)) in values.names().collect::<Vec<_>>().into_iter().enumerate() {
            check(format!("{what} of {site}"), gradient.slices().nth(i).unwrap(), i as u64, &|direction, h| {
                let mut moved = values.clone();
                let slice = moved.slices_mut().nth(i).unwrap();
                slice.iter_mut().zip(direction).for_each(|(v, d)| *v += h * d);
                loss(&model, layer, &moved, &inputs)
            });
        }
        check("inputs".into(), inward.as_slice(), 99, &|direction, h| {
            let mut moved = inputs.clone();
            moved.as_mut_slice().iter_mut().zip(direction).for_each(|(v, d)| *v += h * d);
            loss(&model, layer, &values, &moved)
        });
    }
}

#[test]
fn threads_change_nothing() {
    for name in ["llama-gqa-tied", "gpt2", "gemma3", "neox", "qwen3-tied"] {
        let dir = directories().into_iter().find(|d| d.ends_with(name)).unwrap();
        let model = load::open(&dir).unwrap().model;
        let (values, inputs) = (values(&model, 0), flow(&model).residual().clone());
        let many = gradient(&model, 0, &values, &inputs);
        let one = threads::limited(1, || gradient(&model, 0, &values, &inputs));
        assert!(many == one, "{name}");
    }
}
