//! Matrices that other quantizers stored: read as those who made them read them, and written again to the same bytes.
//! `benches/peers/quantized.py golden` made the files of tests/quantized.
#![allow(clippy::unwrap_used, clippy::panic)]

mod shared;

use formats::{
    quantized::{Format, Scheme},
    safetensors::{self, Archive, Entry},
};
use model::{Model, load, save};
use shared::{largest_error, mean_error, reference};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tensor::{
    Bytes, Storage, Tensor, Weight,
    grid::{Grid, Table, Zero},
};

fn cases() -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/quantized");
    let mut cases: Vec<PathBuf> =
        fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    cases.sort();
    let name = |p: &PathBuf| p.file_name().unwrap().to_string_lossy().into_owned();
    cases.into_iter().map(|p| (name(&p), p)).collect()
}

fn storage(name: &str) -> &'static str {
    match name {
        "awq" | "ct-int4-zero" => "int4g32z",
        "ct-int3" | "gptq-3" => "int3g32",
        "ct-int4" | "gptq-4" => "int4g32",
        "ct-w8a8" | "ct-w8a8-static" => "int8",
        "ct-fp8" | "ct-fp8-tensor" => "fp8_e4m3",
        "gptq-8-v2" => "int8z",
        // Its groups follow the activations.
        "gptq-4-order" => "f32",
        other => panic!("{other}"),
    }
}

fn format(model: &str) -> Format {
    match model.split('-').next().unwrap() {
        "ct" => Format::CompressedTensors,
        other => Format::parse(other).unwrap(),
    }
}

#[test]
fn what_others_stored_computes_what_they_compute() {
    let cases = cases();
    assert!(cases.len() >= 11);
    for (name, dir) in cases {
        let opened = load::open(&dir).unwrap();
        let error = largest_error(&opened.model, &reference(&dir));
        println!("{name}: largest error {error:.1e}");
        if name == "ct-w8a8" {
            // The largest input of a token lies between its two last codes, exactly: which one it takes is chance.
            let with = mean_error(&opened.model, &reference(&dir));
            let mut without = opened.model.clone();
            without.linears.values_mut().for_each(|l| l.rounding = None);
            let without = mean_error(&without, &reference(&dir));
            println!("{name}: mean error {with:.1e}, {without:.1e} without rounding inputs");
            assert!(with < 0.6 * without, "{name}: {with} {without}");
        } else {
            assert!(error < 1e-4, "{name}: {error}");
        }
        let q = opened.model.linears.iter().find(|(s, _)| s.to_string() == "1.down").unwrap().1;
        assert_eq!(q.weight.storage().name(), storage(&name), "{name}");
        assert_eq!(opened.decoded.is_empty(), storage(&name) != "f32", "{name}: {:?}", opened.decoded);
        assert!(opened.unused.is_empty(), "{name}: {:?}", opened.unused);
    }
}

/// The stored tensors of the matrices, by name.
fn stored(dir: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let archive = Archive::open(dir).unwrap();
    let kept = archive.tensors().iter().filter(|(n, _)| n.contains("_proj"));
    kept.map(|(n, t)| (n.clone(), (t.shape.clone(), t.bytes.to_vec()))).collect()
}

#[test]
fn what_is_written_again_is_the_same_bytes() {
    for (name, dir) in cases() {
        let model = load::open(&dir).unwrap().model;
        if storage(&name) == "f32" {
            continue;
        }
        let out = tempfile::tempdir().unwrap();
        save::quantized(&model, out.path(), format(&name)).unwrap();
        let again = load::open(out.path()).unwrap();
        assert_eq!(largest_error(&again.model, &reference(&dir)), largest_error(&model, &reference(&dir)), "{name}");
        let (theirs, ours) = (stored(&dir), stored(out.path()));
        // One scale of a whole tensor as one for each row, and other floats as
        // those of 16 bits.
        let differs = |n: &str| match name.as_str() {
            "ct-fp8-tensor" => n.ends_with("weight_scale"),
            "ct-int4" | "ct-int4-zero" | "ct-int3" => n.ends_with("weight_scale"),
            "awq" => n.ends_with("scales"),
            _ => false,
        };
        assert_eq!(theirs.keys().collect::<Vec<_>>(), ours.keys().collect::<Vec<_>>(), "{name}");
        for (tensor, kept) in &theirs {
            assert!(differs(tensor) || ours[tensor] == *kept, "{name}: {tensor}");
        }
    }
}

fn wave(rows: usize, cols: usize) -> Tensor {
    Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| (i as f32 * 0.731).sin() * 0.1).collect())
}

/// A folder with one matrix, and what its configuration says.
fn folder(format: Format, entries: &[Entry]) -> (tempfile::TempDir, Scheme) {
    let dir = tempfile::tempdir().unwrap();
    safetensors::write(&dir.path().join("model.safetensors"), entries, &[]).unwrap();
    let config = serde_json::json!({"quant_method": format.name(), "checkpoint_format": "gptq"});
    (dir, Scheme::read(Path::new("config.json"), config.as_object().unwrap()).unwrap())
}

#[test]
fn every_storage_that_a_format_takes_comes_back_as_it_was() {
    let mut storages = vec![Grid::Q4_0, Grid::Q5_0, Grid::Q8_0, Grid::Mxfp4];
    for bits in 2..=8 {
        for group in [0, 32, 64] {
            storages.extend([Zero::Middle, Zero::Point].map(|z| Grid::int(bits, group, z).unwrap()));
        }
    }
    storages.extend([Table::E4m3, Table::E5m2].map(|table| Grid::Levels { table, group: 0 }));
    let mut taken = BTreeMap::new();
    for format in Format::ALL {
        for grid in &storages {
            let weight = Weight::encode(&wave(96, 128), Storage::Grid(*grid), None).unwrap();
            let entries = match format.entries("a.b", &weight, false, None) {
                Ok(entries) => entries,
                Err(reason) => {
                    assert!(!reason.is_empty());
                    continue;
                }
            };
            let (dir, scheme) = folder(format, &entries);
            let archive = Archive::open(dir.path()).unwrap();
            let found = scheme.matrix(&archive, "a.b").unwrap().unwrap();
            assert_eq!(found.weight.to_tensor(), weight.to_tensor(), "{} {}", format.name(), grid.name());
            assert_eq!(found.names.len(), entries.len(), "{} {}", format.name(), grid.name());
            assert!(found.decoded.is_none() && scheme.matrix(&archive, "a.c").unwrap().is_none());
            *taken.entry(format.name()).or_insert(0) += 1;
        }
    }
    println!("{taken:?}");
    assert!(taken["gptq"] >= 20 && taken["awq"] >= 6 && taken["compressed-tensors"] >= 44, "{taken:?}");
}

#[test]
fn tensors_that_do_not_fit_each_other_are_errors() {
    for format in Format::ALL {
        let weight =
            Weight::encode(&wave(64, 64), Storage::Grid(Grid::int(4, 32, Zero::Point).unwrap()), None).unwrap();
        let entries = format.entries("a", &weight, false, None).unwrap();
        for broken in 0..entries.len() {
            // Missing, of another shape, of another type, of other bytes: an error or another matrix, never a panic.
            for fault in 0..4 {
                let mut entries = entries.clone();
                let e = &mut entries[broken];
                match fault {
                    0 => drop(entries.remove(broken)),
                    1 => {
                        let halved = e.bytes.slice(0..e.bytes.len() / 2).unwrap();
                        (e.shape[0], e.bytes) = (e.shape[0] / 2, halved);
                    }
                    2 => (e.dtype, e.shape) = (formats::Dtype::U8, vec![e.bytes.len()]),
                    _ => e.bytes = Bytes::from_vec(vec![0xff; e.bytes.len()]),
                }
                let (dir, scheme) = folder(format, &entries);
                let archive = Archive::open(dir.path()).unwrap();
                match scheme.matrix(&archive, "a") {
                    Err(e) => assert!(e.to_string().contains("a."), "{e}"),
                    Ok(found) => drop(found),
                }
            }
        }
    }
}

#[test]
fn a_method_that_planish_does_not_read_is_named() {
    let config = serde_json::json!({"quant_method": "exl3"});
    let e = Scheme::read(Path::new("config.json"), config.as_object().unwrap()).unwrap_err().to_string();
    assert!(e.contains("exl3") && e.contains("compressed-tensors"), "{e}");
}

#[test]
fn a_model_says_what_a_format_cannot_hold() {
    let (_, dir) = cases().into_iter().find(|(n, _)| n == "ct-int4").unwrap();
    let mut model: Model = load::open(&dir).unwrap().model;
    let out = tempfile::tempdir().unwrap();
    let embed = model.linear(model::Site::EMBED).unwrap().weight.to_tensor();
    let weight = Weight::encode(&embed, Storage::Grid(Grid::Q4_0), None).unwrap();
    model.replace(model::Site::EMBED, tensor::Linear::new(weight)).unwrap();
    let e = save::quantized(&model, out.path(), Format::Gptq).unwrap_err().to_string();
    assert!(e.contains("embed") && e.contains("floats"), "{e}");
}
