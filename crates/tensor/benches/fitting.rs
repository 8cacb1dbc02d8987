//! `cargo bench -p planish-tensor --bench fitting`: how long storing a matrix takes, and the error that is left, for every grid;
//! `-- q4_k q6_k` picks some. The values are the sums of four even ones, nearly normal. Medians of five on all cores.

use std::time::Instant;
use tensor::{Storage, Tensor, Weight, grid::Grid, threads};

const ROUNDS: usize = 5;
const SHAPE: (usize, usize) = (512, 2048);

fn main() {
    let asked: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let mut storages: Vec<Storage> = Grid::GGUF.iter().map(|g| Storage::Grid(*g)).collect();
    storages
        .extend(["int4g64", "int3g64", "int4g32a", "int4g128z", "nf4"].iter().filter_map(|n| Storage::parse(n).ok()));
    storages.retain(|s| asked.is_empty() || asked.contains(&s.name()));
    let mut state = 1u64;
    let mut even = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let (rows, cols) = SHAPE;
    let x = Tensor::from_vec(rows, cols, (0..rows * cols).map(|_| (0..4).map(|_| even()).sum()).collect());
    let power: f64 = x.as_slice().iter().map(|v| f64::from(*v).powi(2)).sum();
    println!("{:>12} {:>12} {:>14}", "storage", "ns a value", "error / power");
    for storage in storages {
        let mut times = Vec::new();
        let mut error = 0.0;
        for _ in 0..ROUNDS {
            let begin = Instant::now();
            let Ok(weight) = Weight::encode(&x, storage, None) else { break };
            times.push(begin.elapsed().as_secs_f64());
            let back = weight.to_tensor();
            error = x.as_slice().iter().zip(back.as_slice()).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        }
        times.sort_by(f64::total_cmp);
        if let Some(median) = times.get(ROUNDS / 2) {
            let each = median * 1e9 * threads::count() as f64 / (rows * cols) as f64;
            println!("{:>12} {each:>12.1} {:>14.6}", storage.name(), error / power);
        }
    }
}
