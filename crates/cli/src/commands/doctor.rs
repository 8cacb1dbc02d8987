//! `planish doctor`.

use super::print_json;
use crate::{args::Common, show};
use anyhow::Result;
use optimize::speed;
use serde_json::json;
use tensor::{
    Storage, Tensor, Weight,
    grid::{Grid, Zero},
    kernels, ops,
    packed::Packed,
};

/// Checks this machine: instruction sets, memory, disk, limits, and that every kernel agrees with the plain one.
pub fn run(common: &Common) -> Result<u8> {
    let tables: Vec<&str> = kernels::available().map(|k| k.isa).collect();
    let used = kernels::kernels().isa;
    let limits = speed::Limits::measure();
    let free = speed::free_memory_bytes();
    let disk = formats::atomic::free_bytes(std::path::Path::new(".")).unwrap_or(0);
    let error = self_test();
    let rounding = packed_test();
    let healthy = error < 1e-3 && rounding < 0.02;
    if common.json {
        print_json(&json!({
            "instruction_sets": tables, "used": used, "limits": limits, "free_memory_bytes": free,
            "free_disk_bytes": disk, "self_test_error": error, "rounding_error": rounding, "healthy": healthy,
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
                format!(
                    "{} (largest error {error:.1e}; rounded inputs {:.2} % of the result)",
                    if healthy { "passed" } else { "FAILED" },
                    100.0 * rounding
                ),
            ],
        ]);
        sayln!(
            "Groups that 32 does not divide (int4g24 ...), nf4 and fp8 lie in memory as 16-bit floats while a model runs."
        );
    }
    Ok(if healthy { 0 } else { crate::exit::FAULT })
}

/// Inputs of five tokens, and a matrix in every storage.
fn subjects() -> (Tensor, Vec<Weight>) {
    let wave = |rows: usize, step: f32| {
        Tensor::from_vec(rows, 512, (0..rows * 512).map(|i| (i as f32 * step).sin()).collect())
    };
    let w = wave(70, 0.71);
    let mut storages = vec![Storage::F32, Storage::F16, Storage::Bf16];
    storages.extend(Grid::GGUF.iter().map(|g| Storage::Grid(*g)));
    let zeros = [Zero::Middle, Zero::Minimum, Zero::Point];
    storages.extend((2..=8).filter_map(|bits| Grid::int(bits, 64, zeros[usize::from(bits) % 3])).map(Storage::Grid));
    storages.extend(Grid::int(8, 0, Zero::Middle).map(Storage::Grid));
    (wave(5, 0.13), storages.into_iter().filter_map(|s| Weight::encode(&w, s, None).ok()).collect())
}

/// The largest error of a packed product, as a part of the size of the exact one, over all storages.
fn packed_test() -> f32 {
    let (x, weights) = subjects();
    let size = |y: &Tensor| y.as_slice().iter().map(|v| v * v).sum::<f32>().sqrt();
    let mut worst = 0f32;
    for w in weights {
        let Ok(packed) = Packed::all(vec![w.clone()]) else { return f32::INFINITY };
        let (exact, mut fast) = (ops::matmul(&x, &w), ops::matmul(&x, &packed[0]));
        fast.as_mut_slice().iter_mut().zip(exact.as_slice()).for_each(|(a, b)| *a -= b);
        worst = worst.max(size(&fast) / size(&exact));
    }
    worst
}

/// The largest difference between the kernels in use and plain loops, over all storages.
fn self_test() -> f32 {
    let (x, weights) = subjects();
    let mut worst = 0f32;
    for w in weights {
        let (a, b) = (ops::matmul(&x, &w), ops::matmul_naive(&x, &w));
        worst = a.as_slice().iter().zip(b.as_slice()).map(|(a, b)| (a - b).abs()).fold(worst, f32::max);
    }
    worst
}
