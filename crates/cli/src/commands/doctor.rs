//! `planish doctor`.

use super::print_json;
use crate::{args::Common, show};
use anyhow::Result;
use optimize::speed;
use serde_json::json;
use tensor::{Storage, Tensor, Weight, kernels, ops};

/// Checks this machine: instruction sets, memory, disk, limits, and that every kernel agrees with the plain one.
pub fn run(common: &Common) -> Result<u8> {
    let tables: Vec<&str> = kernels::available().map(|k| k.isa).collect();
    let used = kernels::kernels().isa;
    let limits = speed::Limits::measure();
    let free = speed::free_memory_bytes();
    let disk = formats::atomic::free_bytes(std::path::Path::new(".")).unwrap_or(0);
    let error = self_test();
    if common.json {
        print_json(&json!({
            "instruction_sets": tables, "used": used, "limits": limits, "free_memory_bytes": free,
            "free_disk_bytes": disk, "self_test_error": error, "healthy": error < 1e-3,
        }))?;
    } else {
        show::table(&[
            vec!["instruction sets".into(), tables.join(", ")],
            vec!["in use".into(), used.into()],
            vec!["threads".into(), limits.threads.to_string()],
            vec!["memory bandwidth".into(), format!("{:.1} GB/s", limits.read_gigabytes_per_second)],
            vec![
                "arithmetic".into(),
                format!(
                    "int8 {:.0}, bf16 {:.0}, f32 {:.0} Gop/s",
                    limits.int8_gigaops, limits.bf16_gigaflops, limits.f32_gigaflops
                ),
            ],
            vec!["free memory".into(), show::size(free)],
            vec!["free disk here".into(), show::size(disk)],
            vec![
                "self test".into(),
                format!("{} (largest error {error:.1e})", if error < 1e-3 { "passed" } else { "FAILED" }),
            ],
        ]);
        println!(
            "Groups that 32 does not divide (int4g24 ...) have no fast form: they are decoded to f32 and multiplied."
        );
    }
    Ok(if error < 1e-3 { 0 } else { crate::exit::FAULT })
}

/// The largest difference between the kernels in use and plain loops, over all storages.
fn self_test() -> f32 {
    let wave = |rows: usize, step: f32| {
        Tensor::from_vec(rows, 512, (0..rows * 512).map(|i| (i as f32 * step).sin()).collect())
    };
    let (x, w) = (wave(5, 0.13), wave(70, 0.71));
    let mut storages = vec![Storage::F32, Storage::F16, Storage::Bf16];
    storages.extend(tensor::grid::Grid::GGUF.iter().map(|g| Storage::Grid(*g)));
    let mut worst = 0f32;
    for storage in storages {
        let Ok(w) = Weight::encode(&w, storage, None) else { return f32::INFINITY };
        let (a, b) = (ops::matmul(&x, &w), ops::matmul_naive(&x, &w));
        worst = a.as_slice().iter().zip(b.as_slice()).map(|(a, b)| (a - b).abs()).fold(worst, f32::max);
    }
    worst
}
