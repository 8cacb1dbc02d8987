//! The fast path (packed weights, rounded inputs, brain-float cache) against the exact one, on real models.
#![allow(clippy::unwrap_used, clippy::panic)]

use model::{Cache, Gpt, Model, Runner, Wanted};
use std::path::PathBuf;
use tensor::{
    Storage, Weight,
    ops::{self, KeyValue},
};

fn data() -> Option<PathBuf> {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let root = std::env::var_os("PLANISH_DATA").map_or(beside, PathBuf::from);
    if !root.is_dir() {
        use std::io::Write;
        // A closed standard error is no reason to fail a test.
        let _ = writeln!(std::io::stderr(), "skipped: needs ../shared/data");
        return None;
    }
    Some(root)
}

fn open(root: &std::path::Path, name: &str) -> Gpt {
    Gpt::open(&root.join("models").join(name)).unwrap()
}

/// Every product's weight rounded to a storage.
fn stored(model: &Model, storage: Storage) -> Model {
    let mut model = model.clone();
    let head = model.spec.resolve(model::Site::HEAD);
    for (site, linear) in &mut model.linears {
        if site.layer.is_some() || *site == head {
            linear.weight = Weight::encode(&linear.weight.to_tensor(), storage, None).unwrap();
        }
    }
    model
}

fn packed(model: &Model, format: KeyValue) -> Model {
    let mut fast = model.clone();
    assert_eq!(fast.pack().unwrap(), []);
    fast.key_value = format;
    fast
}

/// Mean loss per token of some documents.
fn loss(model: &Model, documents: &[Vec<u32>]) -> f64 {
    let (mut total, mut count) = (0.0, 0);
    for ids in documents {
        let logits = model.forward(&[ids], &mut ()).unwrap();
        total -= (1..ids.len()).map(|i| ops::log_prob(logits.row(i - 1), ids[i] as usize)).sum::<f64>();
        count += ids.len() - 1;
    }
    total / count as f64
}

fn documents(gpt: &Gpt, root: &std::path::Path, count: usize) -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(root.join("text/tinystories/tinystories_sample.txt")).unwrap();
    let texts = text.split("<|endoftext|>").map(str::trim).skip(1).take(count);
    let cut = |t: &str| {
        let mut ids = gpt.tokenizer.encode(t, true).unwrap();
        ids.truncate(gpt.model.spec.context);
        ids
    };
    texts.map(cut).filter(|ids| ids.len() > 1).collect()
}

#[test]
fn perplexity_through_the_fast_path_is_within_a_thousandth_of_the_exact_one() {
    let Some(root) = data() else { return };
    let all = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "iq4_nl", "q2_k", "int4g64", "int3g32a"];
    let cases: [(&str, usize, &[&str]); 2] = [("mix7m-hf", 30, &all), ("babyllama105-hf", 100, &["q8_0", "int4g64"])];
    for (name, count, storages) in cases {
        let gpt = open(&root, name);
        let documents = documents(&gpt, &root, count);
        for storage in storages {
            let storage = Storage::parse(storage).unwrap();
            let exact = stored(&gpt.model, storage);
            let ratio = (loss(&packed(&exact, KeyValue::Bf16), &documents) - loss(&exact, &documents)).exp();
            assert!((ratio - 1.0).abs() < 1e-3, "{name} {storage}: {ratio}");
        }
    }
}

#[test]
fn each_format_of_keys_and_values_costs_what_it_may() {
    let Some(root) = data() else { return };
    let (gpt, narrow) = (open(&root, "mix7m-hf"), open(&root, "babyllama105-hf"));
    // Heads of sixteen channels, whose keys have much in common.
    let (mut model, documents_of_narrow) = (narrow.model.clone(), documents(&narrow, &root, 40));
    model.key_value = KeyValue::Int4;
    let ratio = (loss(&model, &documents_of_narrow) - loss(&narrow.model, &documents_of_narrow)).exp();
    assert!((ratio - 1.0).abs() < 1e-2, "{ratio}");
    let documents = documents(&gpt, &root, 40);
    let exact = loss(&gpt.model, &documents);
    for (format, bound) in [(KeyValue::Bf16, 2e-4), (KeyValue::Int8, 5e-4), (KeyValue::Int4, 5e-3)] {
        let mut model = gpt.model.clone();
        model.key_value = format;
        let ratio = (loss(&model, &documents) - exact).exp();
        assert!((ratio - 1.0).abs() < bound, "{format}: {ratio}");
        // It is really kept so: a smaller format holds fewer bytes.
        let held = |format| {
            let mut model = gpt.model.clone();
            model.key_value = format;
            let mut cache = Cache::new(&model);
            Runner::new(&model).read(&documents[0], &mut cache).unwrap();
            cache.size_bytes()
        };
        assert!(held(format) < held(KeyValue::F32));
    }
}

#[test]
fn packed_models_write_what_their_exact_twins_write() {
    let Some(root) = data() else { return };
    for name in ["stories260K-hf", "babyllama105-hf", "tinygpt-shakespeare-hf", "mix7m-hf"] {
        let gpt = open(&root, name);
        let text = std::fs::read_to_string(root.join("models").join(name).join("reference.json")).unwrap();
        let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
        let ids: Vec<u32> =
            reference["greedy_ids"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
        let prompt = reference["input_ids"].as_array().unwrap().len();
        let fast = packed(&stored(&gpt.model, Storage::F32), KeyValue::F32);
        let mut runner = Runner::new(&fast);
        let mut cache = Cache::with_room(&fast, ids.len());
        let mut next = ops::argmax(runner.read(&ids[..prompt], &mut cache).unwrap().row(0)) as u32;
        for want in &ids[prompt..] {
            assert_eq!(next, *want, "{name}");
            let logits = runner.step(&[[next]], std::slice::from_mut(&mut cache), Wanted::Last).unwrap();
            next = ops::argmax(logits.row(0)) as u32;
        }
    }
}

#[test]
fn many_texts_at_once_give_the_logits_of_each_alone() {
    let Some(root) = data() else { return };
    let gpt = open(&root, "mix7m-hf");
    let documents = documents(&gpt, &root, 9);
    let (bf16, int4) = (KeyValue::Bf16, KeyValue::Int4);
    for (storage, kept) in [("bf16", bf16), ("q4_k", bf16), ("q8_0", bf16), ("int3g64a", bf16), ("q4_k", int4)] {
        let model = packed(&stored(&gpt.model, Storage::parse(storage).unwrap()), kept);
        let mut runner = Runner::new(&model);
        let mut together: Vec<Cache> = documents.iter().map(|_| Cache::new(&model)).collect();
        let mut alone = together.clone();
        let starts: Vec<&[u32]> = documents.iter().enumerate().map(|(i, d)| &d[..3 + 7 * i % 40]).collect();
        runner.step(&starts, &mut together, Wanted::Nothing).unwrap();
        let nexts: Vec<&[u32]> = documents.iter().map(|d| &d[50..51]).collect();
        let all = runner.step(&nexts, &mut together, Wanted::Last).unwrap().clone();
        for i in 0..documents.len() {
            // Token by token where the batch read a prompt at once.
            for token in starts[i] {
                runner.step(&[[*token]], &mut alone[i..=i], Wanted::Nothing).unwrap();
            }
            let one = runner.step(&[nexts[i]], &mut alone[i..=i], Wanted::Last).unwrap();
            assert!(one.row(0) == all.row(i), "{storage} text {i}");
        }
    }
}

#[test]
fn a_token_allocates_nothing() {
    let Some(root) = data() else { return };
    for (name, kept) in [
        ("mix7m-hf", KeyValue::Bf16),
        ("stories260K-hf", KeyValue::Bf16),
        ("mix7m-hf", KeyValue::Int4),
        ("babyllama105-hf", KeyValue::Int4),
    ] {
        let gpt = open(&root, name);
        let model = packed(&gpt.model, kept);
        let mut runner = Runner::new(&model);
        let mut cache = [Cache::with_room(&model, 200)];
        runner.read(&[1, 2, 3], &mut cache[0]).unwrap();
        let mut step = |n: usize| {
            for _ in 0..n {
                runner.step(&[[5u32]], &mut cache, Wanted::Last).unwrap();
            }
        };
        // The first tokens make what later ones use again; one worker's tasks are larger than those of several.
        tensor::threads::limited(1, || step(70));
        let count = allocation_counter::measure(|| tensor::threads::limited(1, || step(100))).count_total;
        assert_eq!(count, 0, "{name} {kept}");
    }
}
