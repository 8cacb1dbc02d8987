//! Ten steps beside PyTorch's, loss by loss, from the same values on the same tokens (`xtask/golden_training.py`).
#![allow(clippy::unwrap_used, clippy::panic)]

use model::{Likelihood, Tokens, load};
use std::{fs, path::Path};
use train::{Learner, OptimizerKind, Precision, Rule};

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn numbers(value: &serde_json::Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

#[test]
fn ten_steps_are_those_of_pytorch() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let (mut seen, mut others) = (0, 0);
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
            ..Tokens::default()
        };
        let number = |key: &str| training[key].as_f64().unwrap() as f32;
        let beta = numbers(&training["beta"]);
        let rule = Rule {
            beta: [beta[0] as f32, beta[1] as f32],
            eps: number("eps"),
            decay: number("decay"),
            clip: number("clip"),
            ..Rule::default()
        };
        let model = load::open(&dir).unwrap().model;
        let run = |rule: Rule, rate: f64, golden: &serde_json::Value, what: &str| {
            let mut learner = Learner::new(&model, Precision::F32, rule).unwrap();
            let (losses, norms) = (numbers(&golden["losses"]), numbers(&golden["norms"]));
            for (step, (loss, norm)) in losses.iter().zip(norms).enumerate() {
                let got = learner.step(std::slice::from_ref(&batch), &mut Likelihood, rate).unwrap();
                assert!((got.loss - loss).abs() < 1e-4, "{name} {what}, step {step}: loss {} and {loss}", got.loss);
                assert!((got.norm / norm - 1.0).abs() < 1e-3, "{name} {what}, step {step}: {} and {norm}", got.norm);
            }
        };
        run(rule, f64::from(number("rate")), &training, "adamw");
        for (what, golden) in training.get("others").and_then(|o| o.as_object()).into_iter().flatten() {
            let (_, optimizer) = *OptimizerKind::ALL.iter().find(|(name, _)| name == what).unwrap();
            let rule = Rule { optimizer, beta: optimizer.beta(), ..rule };
            run(rule, golden["rate"].as_f64().unwrap(), golden, what);
            others += 1;
        }
        seen += 1;
    }
    assert!(seen >= 9 && others >= 6, "{seen} models, {others} other optimizers");
}

#[test]
fn parts_of_a_batch_give_the_gradient_of_the_whole() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llama-gqa-tied");
    let model = load::open(&root).unwrap().model;
    let text = |seed: u64| -> Vec<u32> { (0..33).map(|i| (model::uniform(seed, i) * 64.0) as u32).collect() };
    let part = |seed: u64| {
        let ids = text(seed);
        Tokens {
            sequences: vec![ids[..32].to_vec()],
            targets: ids[1..].iter().map(|id| Some(*id)).collect(),
            ..Tokens::default()
        }
    };
    let parts: Vec<Tokens> = (0..5).map(part).collect();
    let whole = Tokens {
        sequences: parts.iter().flat_map(|p| p.sequences.clone()).collect(),
        targets: parts.iter().flat_map(|p| p.targets.clone()).collect(),
        ..Tokens::default()
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
    let batch =
        Tokens { sequences: vec![vec![5, 6, 7]], targets: vec![Some(6), Some(7), Some(8)], ..Tokens::default() };
    let error = learner.step(&[batch], &mut Likelihood, 1e-3).unwrap_err().to_string();
    assert!(error.contains("step 1") && error.contains("the loss is not finite"), "{error}");
    assert_eq!(learner.steps(), 0);
}

#[test]
fn eight_bits_and_16_bit_floats_learn_as_well_nearly() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llama-gqa-tied");
    let model = load::open(&root).unwrap().model;
    let ids: Vec<u32> = (0..65).map(|i| (model::uniform(5, i) * 64.0) as u32).collect();
    let batch = Tokens {
        sequences: vec![ids[..64].to_vec()],
        targets: ids[1..].iter().map(|id| Some(*id)).collect(),
        ..Tokens::default()
    };
    let run = |precision: Precision, optimizer: OptimizerKind, bits: u8| {
        let rule = Rule { optimizer, bits, beta: optimizer.beta(), ..Rule::default() };
        let mut learner = Learner::new(&model, precision, rule).unwrap();
        let rate = if optimizer == OptimizerKind::Lion { 5e-4 } else { 4e-3 };
        let steps = (0..40).map(|_| learner.step(std::slice::from_ref(&batch), &mut Likelihood, rate).unwrap());
        let loss = steps.last().unwrap().loss;
        (loss, learner.optimizer_bytes())
    };
    for optimizer in [OptimizerKind::AdamW, OptimizerKind::Lion] {
        let ((exact, whole), (near, eighth)) = (run(Precision::F32, optimizer, 32), run(Precision::F32, optimizer, 8));
        assert!((near / exact - 1.0).abs() < 0.05, "{optimizer:?}: {near} and {exact}");
        assert!(eighth < whole, "{eighth} of {whole} bytes");
        let (half, _) = run(Precision::Fp16, optimizer, 32);
        assert!((half / exact - 1.0).abs() < 0.02, "{optimizer:?}: {half} and {exact}");
    }
}

#[test]
fn a_gradient_too_large_for_16_bits_is_skipped_and_the_scale_halved() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llama-mha");
    let model = load::open(&root).unwrap().model;
    let ids: Vec<u32> = (0..9).map(|i| i * 5).collect();
    let batch = [Tokens {
        sequences: vec![ids[..8].to_vec()],
        targets: ids[1..].iter().map(|id| Some(*id)).collect(),
        ..Tokens::default()
    }];
    let mut learner = Learner::new(&model, Precision::Fp16, Rule::default()).unwrap();
    let begun = learner.scaling().scale;
    // A head that is a thousand times as large has gradients that are, too.
    let head = model.spec.resolve(model::Site::HEAD);
    let enlarge = |learner: &mut Learner, times: f32| {
        let mut values = learner.values().clone();
        values.matrices.get_mut(&head).unwrap().as_mut_slice().iter_mut().for_each(|v| *v *= times);
        learner.set_values(values.clone()).unwrap();
        values
    };
    // The first batch is tried again until it fits.
    let values = enlarge(&mut learner, 1e3);
    let first = learner.step(&batch, &mut Likelihood, 1e-3).unwrap();
    assert!(!first.skipped && first.norm > 0.0, "{first:?}");
    let found = learner.scaling();
    assert!(found.scale < begun && found.skipped == 0 && learner.steps() == 1, "{found:?}");
    assert!(*learner.values() != values, "the first step is taken");
    // Later ones are skipped.
    let values = enlarge(&mut learner, 8.0);
    let second = learner.step(&batch, &mut Likelihood, 1e-3).unwrap();
    assert!(second.skipped && second.loss.is_finite(), "{second:?}");
    assert_eq!((learner.scaling().scale, learner.scaling().skipped), (found.scale / 2.0, 1));
    assert!(*learner.values() == values, "a skipped step changes nothing");
    let taken = (0..30).find(|_| !learner.step(&batch, &mut Likelihood, 1e-3).unwrap().skipped);
    assert!(taken.is_some() && *learner.values() != values, "{:?}", learner.scaling());
}
