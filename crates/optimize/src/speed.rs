//! Speed: prefill and decode of a model, this machine's limits, and the memory that the process took.

use crate::{Result, progress};
use model::{Cache, Model, uniform};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};
use tensor::{Tensor, Weight, ops};

/// Runs of a measurement; the median counts.
const RUNS: usize = 5;

/// What `bench` prints.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Speed {
    /// Many tokens at once.
    pub prefill: Prefill,
    /// One token after another.
    pub decode: Decode,
    /// Most memory that this process held.
    pub peak_rss_bytes: u64,
    /// What this machine can do at most.
    pub limits: Limits,
}

/// Speed of many tokens at once.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Prefill {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Median.
    pub tokens_per_second: f64,
    /// 2 x weights of the blocks x tokens, over the peak of `f32` arithmetic.
    pub share_of_peak: f64,
}

/// Speed of one token after another.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Decode {
    /// Tokens generated.
    pub tokens: usize,
    /// Median.
    pub tokens_per_second: f64,
    /// Slowest and fastest run.
    pub range: [f64; 2],
    /// Stored bytes of the weights that a token reads, times tokens per second.
    pub gigabytes_per_second: f64,
    /// That over the bandwidth of reading memory.
    pub share_of_bandwidth: f64,
}

/// What this machine can do at most, measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
pub struct Limits {
    /// Worker threads.
    pub threads: usize,
    /// Reading memory.
    pub read_gigabytes_per_second: f64,
    /// `f32` multiply and add of the product kernel.
    pub f32_gigaflops: f64,
}

/// Measures a model. `prefill` tokens are read at once, then `decode` tokens are generated one by one.
///
/// # Errors
/// If the model's context is too short, or the job was interrupted.
pub fn measure(model: &Model, prefill: usize, decode: usize) -> Result<Speed> {
    let prompt: Vec<u32> = (0..prefill).map(|i| (uniform(1, i as u64) * model.spec.vocab as f64) as u32).collect();
    let (mut fill, mut step) = (Vec::new(), Vec::new());
    // One more run than counts: the first one finds cold caches.
    for run in 0..=RUNS {
        progress::check()?;
        let mut cache = [Cache::new(model)];
        let begin = Instant::now();
        let mut logits = model.decode(&[&prompt], &mut cache)?;
        let read = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        for _ in 0..decode {
            let next = ops::argmax(logits.row(0)) as u32;
            logits = model.decode(&[&[next]], &mut cache)?;
        }
        if run > 0 {
            fill.push(prefill as f64 / read);
            step.push(decode as f64 / begin.elapsed().as_secs_f64());
        }
    }
    let limits = limits();
    let blocks: usize = model.linears.iter().filter(|(s, _)| s.layer.is_some()).map(|(_, l)| l.weight.len()).sum();
    let rate = median(&mut fill);
    let steps = median(&mut step);
    let read = bytes_per_token(model) as f64 * steps / 1e9;
    Ok(Speed {
        prefill: Prefill {
            tokens: prefill,
            tokens_per_second: rate,
            share_of_peak: 2.0 * blocks as f64 * rate / 1e9 / limits.f32_gigaflops,
        },
        decode: Decode {
            tokens: decode,
            tokens_per_second: steps,
            range: [step[0], step[step.len() - 1]],
            gigabytes_per_second: read,
            share_of_bandwidth: read / limits.read_gigabytes_per_second,
        },
        peak_rss_bytes: peak_rss_bytes(),
        limits,
    })
}

/// Rounds of a comparison of speeds.
const ROUNDS: usize = 7;
/// How long a comparison that nobody asked for may take: two rounds are made in any case.
const PATIENCE: Duration = Duration::from_secs(20);

/// Decode speed of two models in turn, so that a machine that slows down slows both: the ratio new / old of
/// each round, rising. Where a floor depends on it (`asked`) it is 64 tokens after 128, however long that takes.
///
/// # Errors
/// As [`measure`].
pub fn decode_ratios(model: &Model, base: &Model, asked: bool) -> Result<Vec<f64>> {
    let room = model.spec.context.saturating_sub(2);
    let (prompt, tokens) = (128.min(room / 2).max(1), 64.min(room / 2).max(1));
    let one = |m: &Model, tokens: usize| -> Result<f64> {
        let ids: Vec<u32> = (0..prompt).map(|i| (uniform(1, i as u64) * m.spec.vocab as f64) as u32).collect();
        let mut cache = [Cache::new(m)];
        let mut logits = m.decode(&[&ids], &mut cache)?;
        let begin = Instant::now();
        for _ in 0..tokens {
            progress::check()?;
            logits = m.decode(&[&[ops::argmax(logits.row(0)) as u32]], &mut cache)?;
        }
        Ok(tokens as f64 / begin.elapsed().as_secs_f64())
    };
    let begin = Instant::now();
    let slower = one(model, 1)?.min(one(base, 1)?);
    // Two rounds of both models within the patience, warm-up included.
    let affordable = (slower * PATIENCE.as_secs_f64() / 8.0) as usize;
    let tokens = if asked { tokens } else { tokens.min(affordable.max(2)) };
    let mut ratios = Vec::new();
    while ratios.len() < ROUNDS && (asked || ratios.len() < 2 || begin.elapsed() < PATIENCE) {
        ratios.push(one(model, tokens)? / one(base, tokens)?);
    }
    ratios.sort_by(f64::total_cmp);
    Ok(ratios)
}

/// Stored bytes of the weights that decoding one token reads: all products, and one row of each table.
pub fn bytes_per_token(model: &Model) -> usize {
    let tied = model.spec.tied;
    let read = |(site, l): (&model::Site, &tensor::Linear)| {
        let table = matches!(site.role, model::Role::Embed | model::Role::Position);
        if table && !(site.role == model::Role::Embed && tied) {
            l.weight.storage().row_bytes(l.weight.cols())
        } else {
            l.weight.size_bytes()
        }
    };
    model.linears.iter().map(read).sum()
}

/// Measures this machine: best of five reads of 512 MiB, best of five products that stay in the caches.
pub fn limits() -> Limits {
    let threads = tensor::threads::count();
    let block = Tensor::zeros(threads * 32, 1 << 20);
    let mut read = 0f64;
    for _ in 0..5 {
        let begin = Instant::now();
        let sum = ops::sum(&block);
        assert!(sum == 0.0, "a sum of zeros");
        read = read.max(4.0 * block.as_slice().len() as f64 / begin.elapsed().as_secs_f64() / 1e9);
    }
    let (x, w) = (Tensor::zeros(384, 512), Weight::from_tensor(Tensor::zeros(64 * threads, 512)));
    let mut flops = 0f64;
    for _ in 0..20 {
        let begin = Instant::now();
        let y = ops::matmul(&x, &w);
        flops = flops.max(2.0 * (y.as_slice().len() * 512) as f64 / begin.elapsed().as_secs_f64() / 1e9);
    }
    Limits { threads, read_gigabytes_per_second: read, f32_gigaflops: flops }
}

/// Most memory that this process held, in bytes.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).map_or(0, |k| k * 1024)
}

/// Memory that the system could give this process without swapping, in bytes.
pub fn free_memory_bytes() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).map_or(0, |k| k * 1024)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
