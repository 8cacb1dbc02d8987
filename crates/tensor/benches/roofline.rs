//! `cargo bench -p planish-tensor`: every packed product against the limits of this machine.
//!
//! For each storage: one token (limited by reading), eight tokens, and 512 tokens (limited by arithmetic), in rounds
//! that go through all of them in turn; medians of seven. `cargo bench -p planish-tensor -- q4_k bf16` picks some.

use std::time::Instant;
use tensor::{
    Linear, Storage, Tensor, Weight,
    grid::{Grid, Zero},
    kernels::{Arithmetic, kernels},
    limits,
    ops::{Operand, Target, products},
    packed::{Form, InputKind, Packed},
    threads,
};

const ROUNDS: usize = 7;
/// The feed-forward shape of a model of 1.1 B parameters.
const SHAPE: (usize, usize) = (5632, 2048);

/// With holes, beside what is whole.
const SPARSE: [&str; 5] = ["bf16@2:4", "bf16@50%", "int4g64@2:4", "int4g64@50%", "int8g64@2:4"];

fn main() {
    let asked: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let mut storages = vec![Storage::F32, Storage::F16, Storage::Bf16];
    storages.extend(Grid::GGUF.iter().map(|g| Storage::Grid(*g)));
    storages.extend((2..=8).filter_map(|bits| Grid::int(bits, 64, Zero::Middle)).map(Storage::Grid));
    storages.extend(Grid::int(4, 32, Zero::Minimum).map(Storage::Grid));
    storages.extend(SPARSE.map(|name| Storage::parse(name).expect("a storage")));
    storages.retain(|s| asked.is_empty() || asked.contains(&s.name()));
    let read = limits::read_bandwidth(limits::READ).expect("2 GiB of memory");
    let peaks = [Arithmetic::Int8, Arithmetic::Bf16, Arithmetic::F32].map(limits::peak);
    println!(
        "{} on {} threads: reads {:.1} GB/s, int8 {:.0}, bf16 {:.0}, f32 {:.0} Gop/s",
        kernels().isa,
        threads::count(),
        read / 1e9,
        peaks[0] / 1e9,
        peaks[1] / 1e9,
        peaks[2] / 1e9
    );
    println!("{:<12} {:>7} {:>16} {:>18} {:>18}", "storage", "bits/w", "1 token", "8 tokens", "512 tokens");
    for storage in storages {
        run(storage, read, peaks);
    }
}

fn run(storage: Storage, read: f64, peaks: [f64; 3]) {
    let (rows, cols) = SHAPE;
    let values = (0..64 * cols).map(|i| (i as f32 * 0.37).sin() * (i as f32 * 0.011).cos()).collect();
    let part = Weight::encode(&Tensor::from_vec(64, cols, values), storage, None).expect("a row that fits");
    // As many copies as the caches cannot hold.
    let copies = (256 << 20) / Form::of(storage).bytes(rows, cols) + 1;
    let whole = Weight::concat_rows(&vec![part; rows / 64]).expect("equal storages");
    let linears: Vec<Linear> = Packed::all(vec![whole; copies]).expect("memory").into_iter().map(Linear::new).collect();
    let Weight::Packed(packed) = &linears[0].weight else { unreachable!("it has a form") };
    // Panels of sparse matrices are as long as the longest that could be, which is a little more than is read.
    let bytes = packed.packed_bytes();
    let peak = match InputKind::of(packed.form(), kernels()) {
        InputKind::Bytes { .. } => peaks[0],
        InputKind::Bf16 => peaks[1],
        InputKind::F32 | InputKind::Half => peaks[2],
    };
    let tokens = [1usize, 8, 512];
    let mut times = [const { Vec::new() }; 3];
    let mut out = Tensor::default();
    for _ in 0..ROUNDS {
        for (times, tokens) in times.iter_mut().zip(tokens) {
            let x = (0..tokens * cols).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut x = Operand::new(Tensor::from_vec(tokens, cols, x));
            let linears = if tokens > 8 { &linears[..4] } else { &linears[..] };
            let begin = Instant::now();
            for linear in linears {
                products(&mut x, [Target { linear, out: &mut out }]);
            }
            times.push(begin.elapsed().as_secs_f64() / linears.len() as f64);
        }
    }
    let [one, eight, many] = times.map(|mut t| {
        t.sort_by(f64::total_cmp);
        t[ROUNDS / 2]
    });
    let rate = |tokens: usize, time: f64| 2.0 * (tokens * rows * cols) as f64 / time;
    println!(
        "{:<12} {:>7.2} {:>6.1} GB/s {:>3.0} % {:>7.0} Gop/s {:>2.0} % {:>7.0} Gop/s {:>2.0} %",
        storage.name(),
        8.0 * bytes as f64 / (rows * cols) as f64,
        bytes as f64 / one / 1e9,
        100.0 * bytes as f64 / one / read,
        rate(8, eight) / 1e9,
        100.0 * rate(8, eight) / peak,
        rate(512, many) / 1e9,
        100.0 * rate(512, many) / peak,
    );
}
