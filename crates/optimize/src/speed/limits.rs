//! What this machine can do at most, and what a model asks of it.

use super::memory::free_memory_bytes;
use model::{Model, Role, Site};
use serde::{Deserialize, Serialize};
use tensor::{
    Linear, Weight,
    kernels::{Arithmetic, kernels},
    limits::{self, READ},
    packed::InputKind,
};

/// What this machine can do at most, measured.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Limits {
    /// Worker threads.
    pub threads: usize,
    /// Instruction set of the kernels.
    pub instruction_set: String,
    /// Reading memory: the best of five or more reads of 2 GiB in huge pages, or of half of what is free.
    pub read_gigabytes_per_second: f64,
    /// Products of 8-bit whole numbers.
    pub int8_gigaops: f64,
    /// Products of brain floats.
    pub bf16_gigaflops: f64,
    /// Products of 32-bit floats.
    pub f32_gigaflops: f64,
}

impl Limits {
    /// Measures this machine.
    pub fn measure() -> Limits {
        let read = limits::read_bandwidth(bytes_to_read()).unwrap_or(f64::NAN);
        Limits::with_bandwidth(read)
    }

    /// The same with a bandwidth, in bytes per second, that is known.
    pub fn with_bandwidth(read: f64) -> Limits {
        Limits {
            threads: tensor::threads::count(),
            instruction_set: kernels().isa.into(),
            read_gigabytes_per_second: read / 1e9,
            int8_gigaops: limits::peak(Arithmetic::Int8) / 1e9,
            bf16_gigaflops: limits::peak(Arithmetic::Bf16) / 1e9,
            f32_gigaflops: limits::peak(Arithmetic::F32) / 1e9,
        }
    }

    /// Operations per second, in billions, of the products of a weight that is no product of others.
    pub fn peak(&self, weight: &Weight) -> f64 {
        match weight {
            Weight::Packed(p) => match InputKind::of(p.form(), kernels()) {
                InputKind::Bytes { .. } => self.int8_gigaops,
                InputKind::Bf16 => self.bf16_gigaflops,
                InputKind::F32 | InputKind::Half => self.f32_gigaflops,
            },
            _ => self.f32_gigaflops,
        }
    }
}

/// Bytes whose reading tells the bandwidth: 2 GiB, or half of what is free.
pub fn bytes_to_read() -> usize {
    READ.min(free_memory_bytes() as usize / 2)
}

/// What one token asks of a machine.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Work {
    /// Stored bytes of the weights that decoding a token reads: all products, and one row of each table.
    pub bytes_per_token: usize,
    /// Multiplications and additions of all products of a token.
    pub operations_per_token: usize,
    /// Those of the blocks: of a prompt's tokens only the last one runs the head.
    pub block_operations_per_token: usize,
    /// Bytes of keys and values per position.
    pub cache_bytes_per_token: usize,
}

impl Work {
    /// That of a model.
    pub fn of(model: &Model) -> Work {
        let operations = |l: &Linear| 2 * l.weight.values();
        let blocks = model.linears.iter().filter(|(s, _)| s.layer.is_some()).map(|(_, l)| operations(l)).sum();
        let head = model.linear(Site::HEAD).map_or(0, operations);
        let mut cache = model::Cache::new(model);
        let mut runner = model::Runner::new(model);
        // A position is asked rather than computed: padding to whole chunks counts over the chunk.
        let fed = vec![0u32; 64.min(model.spec.context)];
        let held = runner.step(&[&fed[..]], std::slice::from_mut(&mut cache), model::Wanted::Nothing);
        let cache_bytes = held.map_or(0, |_| cache.size_bytes() / 64);
        Work {
            bytes_per_token: bytes_per_token(model),
            operations_per_token: blocks + head,
            block_operations_per_token: blocks,
            cache_bytes_per_token: cache_bytes,
        }
    }
}

/// Seconds, in units of a billionth, that the blocks' products of a token take at the machine's peaks.
pub fn least_nanoseconds(model: &Model, limits: &Limits) -> f64 {
    let blocks = model.linears.iter().filter(|(s, _)| s.layer.is_some());
    let parts = blocks.flat_map(|(_, l)| l.weight.parts());
    parts.map(|(_, part)| 2.0 * part.len() as f64 / limits.peak(part)).sum()
}

/// Stored bytes of the weights that decoding one token reads: all products, and one row of each table.
fn bytes_per_token(model: &Model) -> usize {
    let head = model.spec.resolve(Site::HEAD);
    let read = |(site, l): (&Site, &Linear)| {
        let looked_up = *site != head && matches!(site.role, Role::Embed | Role::Position);
        if looked_up { l.weight.size_bytes() / l.weight.rows().max(1) } else { l.weight.size_bytes() }
    };
    model.linears.iter().map(read).sum()
}
