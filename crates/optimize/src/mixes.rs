//! llama.cpp's mixtures: names under which its files are known, each a storage for most matrices and others for some.
//!
//! As `llama-quantize` chooses with an importance matrix (llama.cpp, `src/llama-quant.cpp`), for models without experts.

use model::{Role, Site, Spec};
use std::collections::BTreeMap;
use tensor::{Storage, grid::Grid};

/// Their names.
pub const NAMES: [&str; 8] = ["q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m"];

/// A mixture for a model: the storage of most matrices, and of those that have another; `None` where none has that name.
/// `fused` says that queries, keys and values are one tensor.
pub fn mix(name: &str, spec: &Spec, fused: bool) -> Option<(Storage, BTreeMap<Site, Storage>)> {
    let name = NAMES.into_iter().find(|n| n.eq_ignore_ascii_case(name))?;
    let most = Grid::parse(name.get(..4)?).ok()?;
    let layers = spec.layers();
    let mut others = BTreeMap::new();
    let mut put = |site: Site, grid: Grid| {
        if grid != most {
            others.insert(site, Storage::Grid(grid));
        }
    };
    put(spec.resolve(Site::HEAD), Grid::Q6K);
    for layer in 0..layers {
        let block = &spec.blocks[usize::from(layer)];
        let shared_heads = block.heads / block.kv_heads.max(1) >= 4;
        let more = more_bits(layer, layers);
        let value = match name {
            "q2_k_s" if shared_heads => Grid::Q4K,
            "q3_k_m" if layer < 2 => Grid::Q5K,
            "q3_k_m" => Grid::Q4K,
            "q3_k_l" => Grid::Q5K,
            "q4_k_s" if layer < 4 => Grid::Q5K,
            "q4_k_m" | "q5_k_m" if more => Grid::Q6K,
            _ => most,
        };
        let down = match name {
            "q2_k_s" if layer < layers / 8 => Grid::Q4K,
            "q3_k_m" if layer < layers / 16 => Grid::Q5K,
            "q3_k_m" => Grid::Q4K,
            "q3_k_l" => Grid::Q5K,
            "q4_k_s" if layer < layers / 8 => Grid::Q5K,
            "q4_k_m" | "q5_k_m" if more => Grid::Q6K,
            _ => most,
        };
        let output = match name {
            "q3_k_m" => Grid::Q4K,
            "q3_k_l" => Grid::Q5K,
            _ => most,
        };
        if fused {
            let all = match name {
                "q3_k_m" | "q3_k_l" => Grid::Q4K,
                "q4_k_m" => Grid::Q5K,
                "q5_k_m" => Grid::Q6K,
                _ => most,
            };
            [Role::Q, Role::K, Role::V].into_iter().for_each(|role| put(Site::of(layer, role), all));
        } else {
            put(Site::of(layer, Role::V), value);
        }
        put(Site::of(layer, Role::Down), down);
        put(Site::of(layer, Role::O), output);
    }
    Some((Storage::Grid(most), others))
}

/// The blocks whose values and down projections llama.cpp gives more bits: the first and last eighth, and every third.
fn more_bits(layer: u16, layers: u16) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}
