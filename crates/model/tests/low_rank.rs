//! Models whose matrices are products of two: the same as if they were multiplied out, in files, at speed and on the way back.
#![allow(clippy::unwrap_used, clippy::panic)]

use model::{Backward, Likelihood, Model, Parameters, Role, Site, Tokens, load, save};
use std::path::Path;
use tensor::{Linear, LowRank, Tensor, Weight, packed::Form};

/// Fused matrices, transposed ones, heads interleaved, parallel blocks, norms after.
const NAMES: [&str; 5] = ["llama-gqa-tied", "gpt2", "gemma3", "neox", "phi3"];

fn wave(rows: usize, cols: usize, step: f32) -> Tensor {
    Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| 0.3 * (i as f32 * step).sin()).collect())
}

/// The model in 32-bit floats with products of two in its first block, and the same multiplied out.
fn pair(name: &str) -> [Model; 2] {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let mut factored = load::open(&root.join(name)).unwrap().model;
    factored.linears.values_mut().for_each(|l| l.weight = Weight::from_tensor(l.weight.to_tensor()));
    let mut whole = factored.clone();
    for (role, rest) in [(Role::V, false), (Role::O, true), (Role::Up, true), (Role::Down, false)] {
        let site = Site::of(0, role);
        let linear = factored.linear(site).unwrap().clone();
        let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
        let rest = rest.then(|| linear.weight.clone());
        let part = |rows, cols, step| Weight::from_tensor(wave(rows, cols, step));
        let low = LowRank::new(part(rows, 3, 0.7), part(3, cols, 0.31), rest).unwrap();
        let weight = Weight::LowRank(Box::new(low));
        let dense = Weight::from_tensor(weight.to_tensor());
        whole.replace(site, Linear { weight: dense, ..linear.clone() }).unwrap();
        factored.replace(site, Linear { weight, ..linear }).unwrap();
    }
    [factored, whole]
}

fn tokens(model: &Model) -> Vec<u32> {
    (0..12).map(|i| i * 7 % model.spec.vocab as u32).collect()
}

fn near(a: &[f32], b: &[f32], within: f32, what: &str) {
    let scale = b.iter().fold(0f32, |m, v| m.max(v.abs()));
    let far = a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(a.len() == b.len() && far <= within * scale, "{what}: {far} of {scale}");
}

#[test]
fn it_says_what_the_product_says_and_is_read_again_as_factors() {
    for name in NAMES {
        let [factored, whole] = pair(name);
        let logits = |model: &Model| model.forward(&[&tokens(model)], &mut ()).unwrap();
        near(logits(&factored).as_slice(), logits(&whole).as_slice(), 1e-4, name);
        assert!(factored.parameters() != whole.parameters() && factored.is_factored() && !whole.is_factored());

        let folder = tempfile::tempdir().unwrap();
        save::directory(&factored, folder.path()).unwrap();
        let again = load::open(folder.path()).unwrap();
        assert!(again.unused.is_empty(), "{name}: {:?}", again.unused);
        assert_eq!(logits(&again.model), logits(&factored), "{name}");
        assert_eq!(again.model.size_bytes(), factored.size_bytes(), "{name}");

        let mut fast = factored.clone();
        assert!(fast.pack().unwrap().is_empty());
        near(logits(&fast).as_slice(), logits(&factored).as_slice(), 2e-2, name);
    }
}

#[test]
fn gradients_go_through_factors_as_through_their_product() {
    for name in NAMES {
        let [factored, whole] = pair(name);
        let sequences = vec![tokens(&factored)];
        let targets = sequences[0][1..].iter().copied().map(Some).chain([None]).collect();
        let batch = Tokens { sequences, targets, places: Vec::new() };
        // What lies before the factors learns; they do not.
        let site = if factored.linears.contains_key(&Site::of(0, Role::Gate)) { Role::Gate } else { Role::Q };
        let sites = [Site::of(0, site), Site::of(0, Role::Q)];
        let gradient = |model: &Model| {
            let mut working = model.clone();
            let mut back = Backward::new(&working, Form::F32);
            let mut into = Parameters::default();
            for site in sites {
                let values = model.linear(site).unwrap().weight.to_tensor();
                back.refresh(&mut working, site, &values).unwrap();
                into.matrices.insert(site, Tensor::zeros(values.rows(), values.cols()));
            }
            into.scales.extend(model.norms.iter().map(|(site, norm)| (*site, vec![0.0; norm.scale.len()])));
            back.run(&working, &batch, &mut Likelihood, 1.0, &mut into).unwrap();
            into
        };
        let (own, other) = (gradient(&factored), gradient(&whole));
        for ((own, other), which) in own.slices().zip(other.slices()).zip(own.names()) {
            near(own, other, 2e-3, &format!("{name} {which:?}"));
        }
    }
}

#[test]
fn half_a_product_is_an_error_that_names_it() {
    let [factored, _] = pair("llama-gqa-tied");
    let folder = tempfile::tempdir().unwrap();
    save::directory(&factored, folder.path()).unwrap();
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let fails = |from: &str, to: &str, says: &str| {
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let mut broken = bytes.clone();
        broken[at..at + from.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&path, broken).unwrap();
        let e = load::open(folder.path()).err().unwrap().to_string();
        assert!(e.contains(says), "{e}");
    };
    // In the metadata, which name the parts; of the first one only `rest` remains beside `down`.
    fails(r#"\"0.o.up\""#, r#"\"0.q.up\""#, "nor both its factors");
    fails(r#"\"0.o.up\""#, r#"\"0.o.uq\""#, "0.o.uq");
}
