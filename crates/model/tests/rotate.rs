//! Models in other bases say what they said.
#![allow(clippy::unwrap_used)]

mod shared;

use model::{Bases, Changed, Model, Role, Site, Turn, load, uniform};
use shared::directories;
use tensor::{Tensor, ops::NormKind};

/// A reflection `[n, n]`, which with `ones` leaves the vector of ones as it is.
fn reflection(n: usize, ones: bool, seed: u64) -> Turn {
    let mut v: Vec<f64> = (0..n).map(|i| uniform(seed, i as u64) - 0.4).collect();
    let mean = v.iter().sum::<f64>() / n as f64;
    v.iter_mut().filter(|_| ones).for_each(|v| *v -= mean);
    let square: f64 = v.iter().map(|v| v * v).sum();
    let value = |i: usize, j: usize| f64::from(u8::from(i == j)) - 2.0 * v[i] * v[j] / square;
    Turn::new(&Tensor::from_vec(n, n, (0..n * n).map(|i| value(i / n, i % n) as f32).collect()))
}

fn logits(model: &Model) -> Tensor {
    let ids: Vec<u32> = (0..12).map(|i| i * 7 % model.spec.vocab as u32).collect();
    model.forward(&[&ids], &mut ()).unwrap()
}

/// The largest difference over the largest logit.
fn difference(a: &Tensor, b: &Tensor) -> f32 {
    let scale = a.as_slice().iter().fold(0f32, |m, v| m.max(v.abs()));
    a.as_slice().iter().zip(b.as_slice()).fold(0f32, |m, (x, y)| m.max((x - y).abs())) / scale
}

#[test]
fn every_family_says_the_same_in_another_basis() {
    let (mut turned, mut refused) = (0, 0);
    for dir in directories() {
        let model = load::open(&dir).unwrap().model;
        if model.is_quantized() {
            continue;
        }
        let spec = &model.spec;
        let values = spec.blocks.iter().enumerate().map(|(i, b)| (i as u16, reflection(b.head_dim, false, i as u64)));
        let mut bases = Bases { residual: None, values: values.collect() };
        let mut other = match model.rotation_refusal() {
            None => {
                turned += 1;
                bases.residual = Some(reflection(spec.dim, spec.norm == NormKind::Layer, 99));
                model.untied().unwrap()
            }
            Some(_) => {
                refused += 1;
                model.clone()
            }
        };
        assert!(difference(&logits(&model), &logits(&other)) == 0.0, "{}: untied", dir.display());
        let mut parts: Vec<Changed> = vec![other.rotated_edges(&bases).unwrap()];
        parts.extend((0..spec.layers()).map(|layer| other.rotated_block(layer, &bases).unwrap()));
        parts.into_iter().for_each(|part| part.apply(&mut other).unwrap());
        let v = |model: &Model| model.linears[&Site::of(0, Role::V)].weight.to_tensor();
        assert_ne!(v(&other).as_slice(), v(&model).as_slice(), "{}", dir.display());
        let difference = difference(&logits(&model), &logits(&other));
        assert!(difference < 2e-4, "{}: {difference}", dir.display());
    }
    assert!(turned > 20 && refused > 2, "{turned} turned, {refused} refused");
}
