//! Every gradient against finite differences of the exact loss, on every family and every switch.
#![allow(clippy::unwrap_used, clippy::panic)]

mod shared;

use model::{Aim, Backward, Heads, Likelihood, Model, Parameters, Tokens, load, uniform};
use shared::{directories, dot, with_values};
use std::ops::Range;
use tensor::{
    Tensor,
    ops::{self, Activation},
    packed::Form,
    threads,
};

/// Two texts of different lengths, with holes in what counts.
fn batch(model: &Model) -> Tokens {
    let vocab = model.spec.vocab as f64;
    let longest = model.spec.context.min(70);
    let text =
        |seed: u64, len: usize| -> Vec<u32> { (0..len).map(|i| (uniform(seed, i as u64) * vocab) as u32).collect() };
    let sequences = vec![text(1, longest), text(2, longest / 3)];
    let mut targets: Vec<Option<u32>> =
        sequences.iter().flat_map(|s| s[1..].iter().copied().map(Some).chain([None])).collect();
    targets[3] = None;
    Tokens { sequences, targets, ..Tokens::default() }
}

fn packed(model: &Model, values: &Parameters, form: Form) -> (Model, Backward) {
    let mut working = model.clone();
    let mut back = Backward::new(&working, form);
    for (site, matrix) in &values.matrices {
        back.refresh(&mut working, *site, matrix).unwrap();
    }
    values.give_vectors(&mut working);
    (working, back)
}

/// The mean loss of the exact path.
fn loss(model: &Model, values: &Parameters, batch: &Tokens) -> f64 {
    let exact = with_values(model, values);
    let sequences: Vec<&[u32]> = batch.sequences.iter().map(Vec::as_slice).collect();
    let logits = exact.forward(&sequences, &mut ()).unwrap();
    let rows = batch.targets.iter().enumerate();
    let sum: f64 = rows.filter_map(|(t, id)| id.map(|id| -ops::log_prob(logits.row(t), id as usize))).sum();
    sum / batch.counted() as f64
}

fn gradient(model: &Model, values: &Parameters, batch: &Tokens, form: Form) -> (f64, Parameters) {
    let (working, mut back) = packed(model, values, form);
    let mut gradient = values.zeros();
    let count = batch.counted();
    let sum = back.run(&working, batch, &mut Likelihood, 1.0 / count as f32, &mut gradient).unwrap();
    assert_eq!(back.loss(&working, batch).unwrap(), sum, "the loss alone");
    // A second run in the same memory gives the same.
    let mut again = values.zeros();
    back.run(&working, batch, &mut Likelihood, 1.0 / count as f32, &mut again).unwrap();
    assert!(again == gradient, "a second run differs");
    (sum / count as f64, gradient)
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for dir in directories() {
        let model = load::open(&dir).unwrap().model;
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let (values, batch) = (Parameters::of(&model), batch(&model));
        let (mean, gradient) = gradient(&model, &values, &batch, Form::F32);
        let exact = loss(&model, &values, &batch);
        assert!((mean - exact).abs() < 1e-5, "{name}: loss {mean} {exact}");
        for (i, (site, what)) in values.names().collect::<Vec<_>>().into_iter().enumerate() {
            let own = gradient.slices().nth(i).unwrap();
            // Along the gradient itself, bent by chance, so that a wrong part of it shows.
            let size = dot(own, own).sqrt() / (own.len() as f64).sqrt();
            let direction: Vec<f32> = own
                .iter()
                .enumerate()
                .map(|(k, g)| (f64::from(*g) / size.max(1e-12) + 2.0 * uniform(i as u64, k as u64) - 1.0) as f32)
                .collect();
            let slope = dot(own, &direction);
            let at = |h: f32| {
                let mut moved = values.clone();
                let slice = moved.slices_mut().nth(i).unwrap();
                slice.iter_mut().zip(&direction).for_each(|(v, d)| *v += h * d);
                loss(&model, &moved, &batch)
            };
            // A step that changes the loss by some thousandths: above its rounding, below its curvature.
            let h =
                (4e-3 / slope.abs().max(1e-6)).min(2e-2 / dot(&direction, &direction).sqrt().max(1e-6) * 4.0) as f32;
            let wide = (at(h) - at(-h)) / (2.0 * f64::from(h));
            let near = (at(h / 2.0) - at(-h / 2.0)) / f64::from(h);
            // Richardson's extrapolation takes the third derivative away.
            let numeric = (4.0 * near - wide) / 3.0;
            // Between the two ends some inputs cross the bend of a ReLU.
            let part = if model.spec.activation == Activation::Relu { 2e-2 } else { 5e-3 };
            let bound = part * slope.abs() + 2e-6 / f64::from(h);
            assert!(
                (numeric - slope).abs() <= bound,
                "{name}: {what} of {site}: by differences {numeric:.6e}, by the gradient {slope:.6e}, step {h:.1e}"
            );
        }
    }
}

#[test]
fn brain_floats_change_gradients_little_and_threads_not_at_all() {
    for name in ["llama-gqa-tied", "gpt2", "gemma3", "neox", "qwen3-tied"] {
        let dir = directories().into_iter().find(|d| d.ends_with(name)).unwrap();
        let model = load::open(&dir).unwrap().model;
        let (values, batch) = (Parameters::of(&model), batch(&model));
        for form in [Form::F32, Form::Bf16] {
            let (many, all) = gradient(&model, &values, &batch, form);
            let (one, alone) = threads::limited(1, || gradient(&model, &values, &batch, form));
            assert_eq!(many, one);
            assert!(all == alone, "{name}: threads change the gradient");
        }
        let (_, exact) = gradient(&model, &values, &batch, Form::F32);
        let (_, brain) = gradient(&model, &values, &batch, Form::Bf16);
        let both = |a: &Parameters, b: &Parameters| a.slices().zip(b.slices()).map(|(a, b)| dot(a, b)).sum::<f64>();
        let cosine = both(&exact, &brain) / (both(&exact, &exact) * both(&brain, &brain)).sqrt();
        assert!(cosine > 0.999, "{name}: cosine {cosine}");
    }
}

/// Weighs what every block returns and what its attention reads, and asks nothing of the logits.
struct Looks {
    seen: f64,
}

impl Aim for Looks {
    fn begin(&mut self, _: &Tokens) -> model::Result<()> {
        self.seen = 0.0;
        Ok(())
    }

    fn rows(
        &mut self,
        _: Range<usize>,
        logits: &mut Tensor,
        _: &[Option<u32>],
        _: f32,
        losses: &mut [f32],
    ) -> model::Result<()> {
        logits.as_mut_slice().fill(0.0);
        losses.fill(0.0);
        Ok(())
    }

    fn looks_at(&self, _: u16) -> bool {
        true
    }

    fn output(&mut self, layer: u16, output: &Tensor, gradient: &mut Tensor, factor: f32, _: &mut Parameters) {
        for (i, (o, g)) in output.as_slice().iter().zip(gradient.as_mut_slice()).enumerate() {
            let weight = uniform(70 + u64::from(layer), i as u64) - 0.5;
            self.seen += weight * f64::from(*o);
            *g += factor * weight as f32;
        }
    }

    fn attended(&mut self, layer: u16, heads: Heads<'_>, gradients: [&mut Tensor; 3], factor: f32) {
        for (at, (values, gradient)) in (90..).zip(heads.values.into_iter().zip(gradients)) {
            for (i, (v, g)) in values.as_slice().iter().zip(gradient.as_mut_slice()).enumerate() {
                let weight = uniform(at + 10 * u64::from(layer), i as u64) - 0.5;
                self.seen += weight * f64::from(*v);
                *g += factor * weight as f32;
            }
        }
    }
}

#[test]
fn what_is_learned_from_outputs_of_blocks_reaches_all_that_made_them() {
    for name in ["llama-gqa-tied", "gpt2", "gemma3", "neox"] {
        let dir = directories().into_iter().find(|d| d.ends_with(name)).unwrap();
        let model = load::open(&dir).unwrap().model;
        let (values, batch) = (Parameters::of(&model), batch(&model));
        let run = |values: &Parameters, again: bool| {
            let (working, mut back) = packed(&model, values, Form::F32);
            if again {
                back.checkpoint_activations();
            }
            let (mut aim, mut gradient) = (Looks { seen: 0.0 }, values.zeros());
            back.run(&working, &batch, &mut aim, 1.0, &mut gradient).unwrap();
            (aim.seen, gradient)
        };
        let (_, gradient) = run(&values, false);
        assert!(run(&values, true).1 == gradient, "{name}: blocks that run again differ");
        let length = gradient.slices().map(|g| dot(g, g)).sum::<f64>().sqrt();
        let at = |h: f64| {
            let mut moved = values.clone();
            for (values, own) in moved.slices_mut().zip(gradient.slices()) {
                values.iter_mut().zip(own).for_each(|(v, g)| *v += (h * f64::from(*g) / length) as f32);
            }
            run(&moved, false).0
        };
        let numeric = (8.0 * (at(5e-3) - at(-5e-3)) - (at(1e-2) - at(-1e-2))) / 6e-2;
        assert!((numeric / length - 1.0).abs() < 1e-2, "{name}: by differences {numeric}, by the gradient {length}");
    }
}
