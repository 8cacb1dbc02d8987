//! Ten steps beside PyTorch's, loss by loss, from the same values on the same tokens (`xtask/golden_training.py`).
#![allow(clippy::unwrap_used, clippy::panic)]

use model::{Likelihood, Tokens, load};
use std::{fs, path::Path};
use train::{Learner, Precision, Rule};

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn numbers(value: &serde_json::Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

#[test]
fn ten_steps_are_those_of_pytorch() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let mut seen = 0;
    for dir in root.read_dir().unwrap().map(|e| e.unwrap().path()).filter(|d| d.join("training.json").is_file()) {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let read = |file: &str| -> serde_json::Value {
            serde_json::from_str(&fs::read_to_string(dir.join(file)).unwrap()).unwrap()
        };
        let (training, reference) = (read("training.json"), read("reference.json"));
        let texts: Vec<Vec<u32>> =
            reference["sequences"].as_array().unwrap().iter().map(|s| ids(&s["tokens"])).collect();
        let batch = Tokens {
            sequences: texts.iter().map(|t| t[..t.len() - 1].to_vec()).collect(),
            targets: texts.iter().flat_map(|t| t[1..].iter().map(|id| Some(*id))).collect(),
        };
        let number = |key: &str| training[key].as_f64().unwrap() as f32;
        let beta = numbers(&training["beta"]);
        let rule = Rule {
            beta: [beta[0] as f32, beta[1] as f32],
            eps: number("eps"),
            decay: number("decay"),
            clip: number("clip"),
        };
        let model = load::open(&dir).unwrap().model;
        let mut learner = Learner::new(&model, Precision::F32, rule).unwrap();
        let (losses, norms) = (numbers(&training["losses"]), numbers(&training["norms"]));
        for (step, (loss, norm)) in losses.iter().zip(norms).enumerate() {
            let got = learner.step(std::slice::from_ref(&batch), &mut Likelihood, f64::from(number("rate"))).unwrap();
            assert!((got.loss - loss).abs() < 1e-4, "{name}, step {step}: loss {} and {loss}", got.loss);
            assert!((got.norm / norm - 1.0).abs() < 1e-3, "{name}, step {step}: norm {} and {norm}", got.norm);
        }
        seen += 1;
    }
    assert!(seen >= 9, "{seen} models");
}

#[test]
fn parts_of_a_batch_give_the_gradient_of_the_whole() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llama-gqa-tied");
    let model = load::open(&root).unwrap().model;
    let text = |seed: u64| -> Vec<u32> { (0..33).map(|i| (model::uniform(seed, i) * 64.0) as u32).collect() };
    let part = |seed: u64| {
        let ids = text(seed);
        Tokens { sequences: vec![ids[..32].to_vec()], targets: ids[1..].iter().map(|id| Some(*id)).collect() }
    };
    let parts: Vec<Tokens> = (0..5).map(part).collect();
    let whole = Tokens {
        sequences: parts.iter().flat_map(|p| p.sequences.clone()).collect(),
        targets: parts.iter().flat_map(|p| p.targets.clone()).collect(),
    };
    let step = |parts: &[Tokens]| {
        let mut learner = Learner::new(&model, Precision::F32, Rule::default()).unwrap();
        let stepped = learner.step(parts, &mut Likelihood, 1e-3).unwrap();
        (stepped.loss, stepped.norm, learner.values().clone())
    };
    let (apart, together) = (step(&parts), step(&[whole]));
    assert!((apart.0 - together.0).abs() < 1e-6 && (apart.1 / together.1 - 1.0).abs() < 1e-5);
    let one = tensor::threads::limited(1, || step(&parts));
    assert!(one == apart, "threads change a step");
}

#[test]
fn what_is_not_finite_is_named_and_changes_nothing() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llama-mha");
    let mut model = load::open(&root).unwrap().model;
    let site = model::Site::of(1, model::Role::MlpNorm);
    model.norms.get_mut(&site).unwrap().scale[3] = f32::NAN;
    let mut learner = Learner::new(&model, Precision::F32, Rule::default()).unwrap();
    let batch = Tokens { sequences: vec![vec![5, 6, 7]], targets: vec![Some(6), Some(7), Some(8)] };
    let error = learner.step(&[batch], &mut Likelihood, 1e-3).unwrap_err().to_string();
    assert!(error.contains("step 1") && error.contains("the loss is not finite"), "{error}");
    assert_eq!(learner.steps(), 0);
}
