//! Adapters: their gradients against finite differences over every base, what they compute, and their files.
#![allow(clippy::unwrap_used, clippy::panic)]

mod shared;

use model::{
    Adapter, Adapters, Backward, Likelihood, Model, Parameters, Role, Site, Tokens,
    adapter::{self, PEFT_CONFIG, PEFT_WEIGHTS},
    load, save, uniform,
};
use shared::dot;
use std::{
    fs,
    path::{Path, PathBuf},
};
use tensor::{
    Linear, Storage, Tensor, Weight,
    grid::Grid,
    ops::{self, Activation},
    packed::Form,
    threads,
};

/// A family each: fused matrices, transposed ones, heads interleaved, parallel blocks, norms after, norms of heads.
const NAMES: [&str; 6] = ["llama-gqa-tied", "gpt2", "gemma3", "neox", "phi3", "qwen3-tied"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn golden(name: &str) -> Model {
    load::open(&root().join(name)).unwrap().model
}

/// The same in 32-bit floats, so that merging rounds nothing.
fn floats(mut model: Model) -> Model {
    model.linears.values_mut().for_each(|l| l.weight = Weight::from_tensor(l.weight.to_tensor()));
    model
}

/// The same with matrices of codes.
fn quantized(mut model: Model) -> Model {
    for linear in model.linears.values_mut() {
        let grid = [Grid::Q4K, Grid::Q4_0, Grid::Int { bits: 4, group: 8, zero: tensor::grid::Zero::Middle }];
        let grid = grid.into_iter().find(|g| g.fits(linear.weight.cols())).unwrap();
        linear.weight = Weight::encode(&linear.weight.to_tensor(), Storage::Grid(grid), None).unwrap();
    }
    assert!(model.is_quantized());
    model
}

fn drawn(rows: usize, cols: usize, seed: u64, size: f64) -> Tensor {
    Tensor::from_vec(
        rows,
        cols,
        (0..rows * cols).map(|i| (size * (2.0 * uniform(seed, i as u64) - 1.0)) as f32).collect(),
    )
}

/// Adapters that change every linear map of the blocks.
fn adapters(model: &Model, rank: usize, dora: bool, seed: u64) -> Adapters {
    let sites = model.linears.keys().filter(|s| s.layer.is_some());
    let one = |(i, site): (usize, &Site)| {
        let [outputs, inputs] = model.spec.shape(*site).unwrap();
        let seed = seed + 10 * i as u64;
        let magnitude = dora.then(|| {
            let lengths = adapter::magnitude(model, *site).unwrap();
            lengths.iter().enumerate().map(|(o, m)| m * (0.8 + 0.4 * uniform(seed + 2, o as u64) as f32)).collect()
        });
        let (down, up) = (drawn(rank, inputs, seed, 0.3), drawn(outputs, rank, seed + 1, 0.05));
        (*site, Adapter { down, up, scale: 1.5, magnitude })
    };
    sites.enumerate().map(one).collect()
}

fn batch(model: &Model) -> Tokens {
    let vocab = model.spec.vocab as f64;
    let text = |seed: u64, len: usize| (0..len).map(|i| (uniform(seed, i as u64) * vocab) as u32).collect();
    let sequences: Vec<Vec<u32>> = vec![text(1, 30), text(2, 12)];
    let targets = sequences.iter().flat_map(|s| s[1..].iter().copied().map(Some).chain([None])).collect();
    Tokens { sequences, targets, ..Tokens::default() }
}

/// The mean loss of the model whose matrices are `gain (W + scale B A)`, the gains over lengths that are given.
fn loss(model: &Model, values: &Parameters, norms: &Adapters, batch: &Tokens) -> f64 {
    let mut exact = model.clone();
    for (site, down) in &values.downs {
        let (linear, up) = (model.linear(*site).unwrap(), &values.ups[site]);
        let mut w = linear.weight.to_tensor();
        for o in 0..w.rows() {
            let gain = values.magnitudes.get(site).map_or(1.0, |m| m[o] / norms[site].magnitude.as_ref().unwrap()[o]);
            for i in 0..w.cols() {
                let low: f32 = (0..down.rows()).map(|r| up.row(o)[r] * down.row(r)[i]).sum();
                w.row_mut(o)[i] = gain * (w.row(o)[i] + norms[site].scale * low);
            }
        }
        exact.linears.insert(*site, Linear::with_bias(Weight::from_tensor(w), linear.bias.clone()));
    }
    let sequences: Vec<&[u32]> = batch.sequences.iter().map(Vec::as_slice).collect();
    let logits = exact.forward(&sequences, &mut ()).unwrap();
    let rows = batch.targets.iter().enumerate();
    let sum: f64 = rows.filter_map(|(t, id)| id.map(|id| -ops::log_prob(logits.row(t), id as usize))).sum();
    sum / batch.counted() as f64
}

/// Lengths of the rows of changed matrices, in the place of magnitudes.
fn lengths(model: &Model, adapters: &Adapters) -> Adapters {
    let mut plain = adapters.clone();
    plain.values_mut().for_each(|a| a.magnitude = None);
    let mut changed = floats(model.clone());
    changed.attach(&[plain.clone()]).unwrap();
    let merged = changed.merged().unwrap();
    plain.iter_mut().for_each(|(site, a)| a.magnitude = Some(adapter::magnitude(&merged, *site).unwrap()));
    plain
}

fn gradient(model: &Model, adapters: &Adapters, batch: &Tokens, form: Form, checkpoint: bool) -> (f64, Parameters) {
    let (mut working, mut back) = (model.clone(), Backward::new(model, form));
    if checkpoint {
        back.checkpoint_activations();
    }
    for (site, adapter) in adapters {
        back.refresh_adapter(&mut working, *site, adapter.change()).unwrap();
    }
    let mut gradient = Parameters::of_adapters(adapters).zeros();
    let count = batch.counted();
    let sum = back.run(&working, batch, &mut Likelihood, 1.0 / count as f32, &mut gradient).unwrap();
    assert_eq!(back.loss(&working, batch).unwrap(), sum, "the loss alone");
    // Other values in the same memory, and these again.
    for adapter in
        [adapters.values().map(|a| Adapter { scale: 0.1, ..a.clone() }).collect(), adapters.values().cloned().collect()]
            as [Vec<Adapter>; 2]
    {
        for (site, adapter) in adapters.keys().zip(&adapter) {
            back.refresh_adapter(&mut working, *site, adapter.change()).unwrap();
        }
    }
    let mut again = gradient.zeros();
    back.run(&working, batch, &mut Likelihood, 1.0 / count as f32, &mut again).unwrap();
    assert!(again == gradient, "a second run differs");
    (sum / count as f64, gradient)
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (name, dora) in NAMES.iter().flat_map(|n| [(n, false), (n, true)]) {
        for model in [golden(name), quantized(golden(name))] {
            let (adapters, batch) = (adapters(&model, 3, dora, 7), batch(&model));
            let norms = lengths(&model, &adapters);
            let (mean, gradient) = gradient(&model, &adapters, &batch, Form::F32, false);
            let values = Parameters::of_adapters(&adapters);
            let exact = loss(&model, &values, &norms, &batch);
            assert!((mean - exact).abs() < 1e-4, "{name}: loss {mean} {exact}");
            for (i, (site, what)) in values.names().collect::<Vec<_>>().into_iter().enumerate() {
                let own = gradient.slices().nth(i).unwrap();
                let size = dot(own, own).sqrt() / (own.len() as f64).sqrt();
                let bent = |k: usize| 2.0 * uniform(i as u64, k as u64) - 1.0;
                let direction = own.iter().enumerate().map(|(k, g)| (f64::from(*g) / size.max(1e-12) + bent(k)) as f32);
                let direction: Vec<f32> = direction.collect();
                let slope = dot(own, &direction);
                let at = |h: f32| {
                    let mut moved = values.clone();
                    let slice = moved.slices_mut().nth(i).unwrap();
                    slice.iter_mut().zip(&direction).for_each(|(v, d)| *v += h * d);
                    loss(&model, &moved, &norms, &batch)
                };
                let far = 2e-2 / dot(&direction, &direction).sqrt().max(1e-6) * 4.0;
                let h = (4e-3 / slope.abs().max(1e-6)).min(far) as f32;
                let wide = (at(h) - at(-h)) / (2.0 * f64::from(h));
                let near = (at(h / 2.0) - at(-h / 2.0)) / f64::from(h);
                let numeric = (4.0 * near - wide) / 3.0;
                let part = if model.spec.activation == Activation::Relu { 2e-2 } else { 5e-3 };
                let bound = part * slope.abs() + 2e-6 / f64::from(h);
                assert!(
                    (numeric - slope).abs() <= bound,
                    "{name}: {what} of {site}: by differences {numeric:.6e}, by the gradient {slope:.6e}, step {h:.1e}"
                );
            }
        }
    }
}

#[test]
fn checkpoints_threads_and_matrices_that_learn_change_no_byte() {
    for name in NAMES {
        let model = golden(name);
        let batch = batch(&model);
        for form in [Form::F32, Form::Bf16] {
            let own = adapters(&model, 3, true, 7);
            let whole = gradient(&model, &own, &batch, form, false);
            assert!(whole == gradient(&model, &own, &batch, form, true), "{name}: checkpoints change a gradient");
            let alone = threads::limited(1, || gradient(&model, &own, &batch, form, true));
            assert!(whole == alone, "{name}: threads change a gradient");
            // The same of a model that learns as a whole.
            let values = Parameters::of(&model);
            let all = |checkpoint: bool| {
                let (mut working, mut back) = (model.clone(), Backward::new(&model, form));
                if checkpoint {
                    back.checkpoint_activations();
                }
                values.matrices.iter().for_each(|(site, m)| back.refresh(&mut working, *site, m).unwrap());
                let mut into = values.zeros();
                let sums = [(); 2].map(|()| back.run(&working, &batch, &mut Likelihood, 0.1, &mut into).unwrap());
                (sums, into)
            };
            assert!(all(false) == all(true), "{name}: checkpoints change a gradient");
        }
    }
}

fn logits(model: &Model) -> Tensor {
    let ids: Vec<u32> = (0..20).map(|i| (uniform(5, i) * model.spec.vocab as f64) as u32).collect();
    model.forward(&[&ids], &mut ()).unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!((a.rows(), a.cols()), (b.rows(), b.cols()));
    a.as_slice().iter().zip(b.as_slice()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn what_is_merged_computes_what_was_beside_it_and_several_add_up() {
    for name in NAMES {
        let mut model = floats(golden(name));
        let plain = logits(&model);
        let sets = [adapters(&model, 3, true, 7), adapters(&model, 5, false, 70)];
        model.attach(&sets[..1]).unwrap();
        let one = logits(&model);
        assert!(difference(&one, &plain) > 1e-3, "{name}: the adapter changes nothing");
        assert!(difference(&logits(&model.merged().unwrap()), &one) < 1e-4, "{name}: one merged");
        model.attach(&sets).unwrap();
        let both = logits(&model);
        assert!(difference(&both, &one) > 1e-3, "{name}: the second changes nothing");
        assert!(difference(&logits(&model.merged().unwrap()), &both) < 1e-4, "{name}: both merged");
        // Laid out for speed, the base is rounded and the adapters are not.
        let mut fast = model.clone();
        fast.pack().unwrap();
        assert!(difference(&logits(&fast), &both) < 0.05 * (1.0 + difference(&both, &plain)), "{name}: packed");
        model.attach(&[]).unwrap();
        assert!(logits(&model) == plain, "{name}: let go");
    }
}

#[test]
fn a_merged_model_of_codes_has_a_gguf_even_where_one_site_of_a_fused_matrix_was_adapted() {
    let mut model = quantized(golden("gpt2"));
    let mut own = adapters(&model, 3, false, 7);
    own.retain(|site, _| *site == Site::of(0, Role::Q));
    model.attach(&[own]).unwrap();
    let merged = model.merged().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("merged.gguf");
    let as_it_is = |site| match merged.linear(site).unwrap().weight.storage() {
        Storage::Grid(Grid::Int { .. }) => Storage::F32,
        other => other,
    };
    save::gguf(&merged, None, &path, &as_it_is).unwrap();
    let again = load::open(&path).unwrap().model;
    assert!(again.linear(Site::of(0, Role::K)).unwrap().weight.storage() == Storage::Bf16);
    assert!(difference(&logits(&again), &logits(&merged)) < 1e-4);
    assert!(difference(&logits(&again), &logits(&model)) < 0.05);
}

#[test]
fn files_hold_what_was_learned() {
    for (name, dora) in NAMES.iter().flat_map(|n| [(n, false), (n, true)]) {
        let mut model = golden(name);
        // Some sites of fused matrices, and one block less than all.
        let mut own = adapters(&model, 3, dora, 7);
        own.retain(|site, _| !matches!(site.role, Role::K | Role::Gate) && *site != Site::of(0, Role::O));
        model.attach(&[own.clone()]).unwrap();
        let want = logits(&model);
        let dir = tempfile::tempdir().unwrap();
        for rslora in [false, true] {
            adapter::write_peft(&model, &own, rslora, "base", dir.path()).unwrap();
            let read = adapter::load(&model, dir.path()).unwrap();
            if !dora {
                assert!(own.keys().eq(read.keys()), "{name}: sites");
            }
            model.attach(&[read]).unwrap();
            assert!(difference(&logits(&model), &want) < 1e-5, "{name}: PEFT, rslora {rslora}");
        }
        let path = dir.path().join("adapter.gguf");
        if dora {
            let error = adapter::write_gguf(&model, &own, &path).unwrap_err().to_string();
            assert!(error.contains("--merge"), "{error}");
            continue;
        }
        adapter::write_gguf(&model, &own, &path).unwrap();
        model.attach(&[adapter::load(&model, &path).unwrap()]).unwrap();
        assert!(difference(&logits(&model), &want) < 1e-5, "{name}: GGUF");
    }
}

/// Adapters that PEFT made (`benches/training/peft_adapters.py`), with the logits that it computes.
#[test]
fn adapters_of_peft_compute_what_peft_computes() {
    let mut seen = 0;
    for entry in fs::read_dir(root()).unwrap() {
        let base = entry.unwrap().path();
        let folders = fs::read_dir(&base).into_iter().flatten().map(|e| e.unwrap().path());
        for dir in folders.filter(|p| p.join(PEFT_CONFIG).is_file()) {
            let mut model = load::open(&base).unwrap().model;
            model.attach(&[adapter::load(&model, &dir).unwrap()]).unwrap();
            let text = fs::read_to_string(dir.join("logits.json")).unwrap();
            let want: serde_json::Value = serde_json::from_str(&text).unwrap();
            let ids: Vec<u32> = serde_json::from_value(want["tokens"].clone()).unwrap();
            let last: Vec<f32> = serde_json::from_value(want["last"].clone()).unwrap();
            let plain: f32 = serde_json::from_value(want["change"].clone()).unwrap();
            let got = model.forward(&[&ids], &mut ()).unwrap();
            let error = got.row(ids.len() - 1).iter().zip(&last).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            println!("{}: largest error {error:.1e}, the adapter changes {plain:.1e}", dir.display());
            assert!(error < 1e-4 && plain > 1e-2 && last.len() == got.cols());
            seen += 1;
        }
    }
    assert!(seen >= 5, "{seen} adapters");
}

#[test]
fn files_that_cannot_be_are_told() {
    let model = golden("gpt2");
    let dir = tempfile::tempdir().unwrap();
    let own = adapters(&model, 3, false, 7);
    adapter::write_peft(&model, &own, false, "base", dir.path()).unwrap();
    let config = fs::read_to_string(dir.path().join(PEFT_CONFIG)).unwrap();
    let weights = fs::read(dir.path().join(PEFT_WEIGHTS)).unwrap();
    let says = |want: &str| {
        let error = adapter::load(&model, dir.path()).unwrap_err().to_string();
        assert!(error.contains(want), "should say {want:?}: {error}");
    };
    for (from, to, want) in [
        ("\"LORA\"", "\"IA3\"", "peft_type"),
        ("\"none\"", "\"all\"", "bias"),
        ("\"use_dora\": false", "\"use_dora\": true", "magnitudes"),
        ("\"use_dora\": false", "\"use_dora\": 7", "use_dora"),
        ("\"r\": 3", "\"r\": 4", "rank 3"),
        ("\"r\": 3", "\"r\": 0", "`r`"),
        ("\"init_lora_weights\": true", "\"init_lora_weights\": \"pissa\"", "path_initial_model"),
        ("\"inference_mode\": true", "\"modules_to_save\": [\"wte\"]", "modules_to_save"),
        ("\"rank_pattern\": {", "\"rank_pattern\": {\".*attn\": 3, ", "pattern"),
        ("{", "[", "adapter_config.json"),
    ] {
        let changed = config.replacen(from, to, 1);
        assert_ne!(changed, config, "{from}");
        fs::write(dir.path().join(PEFT_CONFIG), changed).unwrap();
        says(want);
    }
    fs::write(dir.path().join(PEFT_CONFIG), &config).unwrap();
    for cut in [0, 7, 100, weights.len() / 2, weights.len() - 1] {
        fs::write(dir.path().join(PEFT_WEIGHTS), &weights[..cut]).unwrap();
        assert!(adapter::load(&model, dir.path()).is_err(), "cut to {cut}");
    }
    // A number that is none.
    let mut bad = weights.clone();
    let last = bad.len() - 4;
    bad[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(dir.path().join(PEFT_WEIGHTS), &bad).unwrap();
    says("not finite");
    // Another model's.
    let other = golden("llama-gqa-tied");
    adapter::write_peft(&other, &adapters(&other, 3, false, 7), false, "base", dir.path()).unwrap();
    says("another model");
    fs::write(dir.path().join(PEFT_CONFIG), &config).unwrap();
    fs::remove_file(dir.path().join(PEFT_WEIGHTS)).unwrap();
    fs::write(dir.path().join("adapter_model.bin"), "x").unwrap();
    says("safe_serialization");
    let error = load::open(dir.path()).err().unwrap().to_string();
    assert!(error.contains("--adapter"), "{error}");
    let wrong = Adapter { up: Tensor::zeros(5, 3), ..own[&Site::of(0, Role::O)].clone() };
    let error = model.clone().attach(&[[(Site::of(0, Role::O), wrong)].into()]).unwrap_err().to_string();
    assert!(error.contains("another model"), "{error}");
}
