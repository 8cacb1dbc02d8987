//! Pruning: what is removed is gone from the file, from memory and from the time of a token.
//!
//! Single values leave holes, which are stored (`tensor::Sparse`) in a pattern. `neurons` and `heads` are columns of the matrix that reads them (down, o), which goes without them as well as it can; when
//! all blocks are done, the model is cut. `layers` and `width` are chosen for the whole model at once.

mod layers;
mod obs;
mod rates;
mod slice;
mod structure;
mod values;
mod vocabulary;

use super::{Method, Plan, options};
use crate::{Error, Result};
use model::Site;
use rates::Rates;
use serde::Deserialize;
use structure::{Part, Structure};
use tensor::Pattern;
use values::Values;

pub use layers::{Cut, Shape};
pub(super) use values::masks;
pub use vocabulary::{Reduced, Vocabulary, reduced};

/// By the weights alone.
pub static MAGNITUDE: Method = Method {
    name: "magnitude",
    about: "Removes values, neurons, heads or channels with the smallest weights.",
    paper: "arXiv 1506.02626",
    cost: "no data; memory of one matrix",
    build: |o| build("magnitude", o),
};

/// By the weights and the size of what they are multiplied by.
pub static WANDA: Method = Method {
    name: "wanda",
    about: "Removes values, neurons or heads that add least to the outputs; the others make up for them.",
    paper: "arXiv 2306.11695",
    cost: "one pass over the calibration data and inputs^3 operations per matrix",
    build: |o| build("wanda", o),
};

/// One after the other, by what the best answer to its absence costs.
pub static SPARSEGPT: Method = Method {
    name: "sparsegpt",
    about: "Removes values, neurons or heads one after the other, those that the others make up for best.",
    paper: "arXiv 2301.00774, of whole columns as ZipLM, arXiv 2302.04089",
    cost: "one pass over the calibration data and inputs^3 operations per matrix",
    build: |o| build("sparsegpt", o),
};

/// By what the loss would change by without them, as far as gradients tell.
pub static TAYLOR: Method = Method {
    name: "taylor",
    about: "Removes values, neurons or heads whose product with their gradients is smallest; the others make up for them.",
    paper: "arXiv 1906.10771",
    cost: "two passes over the calibration data, one with gradients of each text; three times the matrices as 32-bit floats",
    build: |o| build("taylor", o),
};

/// The same by what it costs the loss.
pub static FISHER: Method = Method {
    name: "fisher",
    about: "Removes neurons or heads one by one, each time the one whose absence, made up for, costs the loss least.",
    paper: "arXiv 2301.00774 with the outputs weighed as in K-FAC, arXiv 1503.05671",
    cost: "two passes over the calibration data, one with gradients, and inputs^3 operations per matrix",
    build: |o| build("fisher", o),
};

/// By how little a block changes what goes through it.
pub static INFLUENCE: Method = Method {
    name: "influence",
    about: "Removes the layers whose output is most like their input.",
    paper: "arXiv 2403.03853",
    cost: "one pass over the calibration data",
    build: |o| build("influence", o),
};

/// By what the model says without it.
pub static WITHOUT: Method = Method {
    name: "without",
    about: "Removes layers one by one, each time the one without which the model's predictions change least.",
    paper: "arXiv 2402.02834",
    cost: "some of the calibration data through the model for each layer that is tried",
    build: |o| build("without", o),
};

/// By the directions in which the residual stream varies least.
pub static SLICEGPT: Method = Method {
    name: "slicegpt",
    about: "Removes the directions of the residual stream in which it varies least. A tied head is untied.",
    paper: "arXiv 2401.15024, with one basis for all blocks, which needs no matrices between them",
    cost: "one pass over the calibration data and width^3 operations",
    build: |o| build("slicegpt", o),
};

/// By whether the data has it.
pub static UNUSED: Method = Method {
    name: "unused",
    about: "Removes tokens that the data never uses; it is cut into the same tokens as before.",
    paper: "arXiv 2010.05609",
    cost: "the data cut into tokens twice",
    build: |o| build("unused", o),
};

/// What is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// Of feed-forward networks.
    Neurons,
    /// Key and value heads, with the query heads that read them.
    Heads,
    /// Whole blocks.
    Layers,
    /// Channels of the residual stream.
    Width,
    /// Single values, wherever they are.
    Values,
    /// Tokens.
    Vocabulary,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Prune {
    /// What is removed; where none is named, the first that the method removes.
    pattern: Option<String>,
    /// How much of it, as a fraction, 0.3 where nothing is said; a pattern such as 2:4 says it itself, and of tokens all go that the
    /// data never uses.
    sparsity: Option<f64>,
    /// Neurons and channels that remain are a multiple of this; where none is given, of the largest power of two up to 256 that
    /// divides those that are there.
    multiple: Option<usize>,
    /// Layers that stay whatever they are worth.
    #[serde(default)]
    keep: Vec<u16>,
    /// Layers that are tried each time, those of the least influence; `without` only.
    #[serde(default = "tried")]
    tried: usize,
    /// Do the values that remain make up for the others? Not with `magnitude`, which knows no data.
    #[serde(default = "yes")]
    reconstruct: bool,
    /// Rounds in which values that remain are exchanged for better ones.
    #[serde(default = "rounds")]
    exchanges: usize,
    /// How the share of values that goes is spread over matrices.
    #[serde(default)]
    rates: Rates,
}

fn yes() -> bool {
    true
}

fn rounds() -> usize {
    12
}

/// How much goes where nothing is said.
pub const USUAL: f64 = 0.3;

fn tried() -> usize {
    8
}

/// What is removed, under which names, and the methods that remove it, the usual one first.
const KNOWN: [(What, &str, &[&str]); 6] = [
    (What::Neurons, "neurons", &["sparsegpt", "fisher", "wanda", "taylor", "magnitude"]),
    (What::Heads, "heads", &["sparsegpt", "fisher", "wanda", "taylor", "magnitude"]),
    (What::Layers, "layers", &["without", "influence"]),
    (What::Width, "width", &["magnitude", "slicegpt"]),
    (What::Values, "unstructured", &["sparsegpt", "wanda", "taylor", "magnitude"]),
    (What::Vocabulary, "vocabulary", &["unused"]),
];

/// The names of what can be removed.
pub fn patterns() -> impl Iterator<Item = &'static str> {
    KNOWN.iter().map(|(_, name, _)| *name).chain(["2:4", "4:8 (any n:m)", "16x1 (blocks of rows x columns)"])
}

/// The method that a pattern is removed by where none is named.
pub fn usual(pattern: &str) -> Option<&'static str> {
    known(pattern).map(|(_, _, methods)| methods[0])
}

fn known(pattern: &str) -> Option<&'static (What, &'static str, &'static [&'static str])> {
    // Any share will do to see whether it is a pattern of values.
    let values = values_of(pattern, 0.5).is_some();
    KNOWN.iter().find(|(what, name, _)| *name == pattern || values && *what == What::Values)
}

/// The pattern of single values of that name, of which so many go: `unstructured`, `2:4`, `16x1`.
pub fn values_of(pattern: &str, sparsity: f64) -> Option<Pattern> {
    let share = format!("{}%", 100.0 * sparsity);
    match pattern {
        "unstructured" => share.parse().ok(),
        of if of.contains(':') => of.parse().ok(),
        block => format!("{share}{block}").parse().ok().filter(|_| block.contains('x')),
    }
}

fn build(method: &'static str, table: toml::Table) -> Result<Plan> {
    let bad = |reason: String| Error::Options { method: method.into(), reason };
    let asked = options::<Prune>(method, table)?;
    if asked.sparsity.is_some_and(|sparsity| !(sparsity > 0.0 && sparsity < 1.0)) {
        return Err(bad("`sparsity` lies above 0 and below 1".into()));
    }
    if asked.tried == 0 || asked.multiple == Some(0) {
        return Err(bad("`tried` and `multiple` are at least 1".into()));
    }
    let of_method = || KNOWN.iter().find(|(_, _, methods)| methods.contains(&method));
    let found = asked.pattern.as_deref().map_or_else(of_method, known);
    let (what, name, methods) = found.ok_or_else(|| {
        let names: Vec<&str> = patterns().collect();
        bad(format!("`pattern` is one of {}", names.join(", ")))
    })?;
    if !methods.contains(&method) {
        return Err(bad(format!("{name} are removed by {}", methods.join(", "))));
    }
    let Prune { multiple, keep, tried, reconstruct, exchanges, rates, .. } = asked;
    let sparsity = asked.sparsity.unwrap_or(USUAL);
    let part = match what {
        What::Neurons => Part::Neurons { multiple },
        What::Heads => Part::Heads,
        What::Layers => {
            let tried = (method == "without").then_some(tried);
            return Ok(Plan::Cut(Cut { sparsity, of: Shape::Layers { keep, tried } }));
        }
        What::Vocabulary => return Ok(Plan::Vocabulary(Vocabulary { sparsity: asked.sparsity })),
        What::Width => {
            return Ok(Plan::Cut(Cut { sparsity, of: Shape::Width { multiple, sliced: method == "slicegpt" } }));
        }
        What::Values => {
            let pattern = asked.pattern.and_then(|pattern| values_of(&pattern, sparsity));
            if rates != Rates::Even && matches!(pattern, Some(Pattern::Of { .. })) {
                return Err(bad(
                    "`rates` differ where a share goes; a pattern such as 2:4 is the same everywhere".into()
                ));
            }
            let values = Values { pattern, reconstruct, exchanges, rates, ..Values::of(method) };
            return Ok(Plan::EachMatrix(Box::new(values)));
        }
    };
    Ok(Plan::EachMatrix(Box::new(Structure { method, part, sparsity })))
}

fn unseen(site: Site) -> Error {
    Error::Site { site, reason: "no calibration data reached it".into() }
}

/// How many of `all` remain: as near to what is asked as a multiple allows, one of them at least.
fn remain(all: usize, sparsity: f64, multiple: Option<usize>) -> usize {
    let multiple = multiple.unwrap_or_else(|| 1 << all.trailing_zeros().min(8));
    // Rounding to whole blocks of 256 must not make nothing or everything of a small width.
    let multiple = if multiple * 8 > all { (multiple / 8).max(1) } else { multiple };
    let asked = all as f64 * (1.0 - sparsity);
    (((asked / multiple as f64).round() as usize) * multiple).clamp(multiple.min(all), all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_remains_is_a_multiple_of_blocks_near_what_is_asked() {
        assert_eq!(remain(768, 0.3, None), 544);
        assert_eq!(remain(5632, 0.5, None), 2816);
        assert_eq!(remain(768, 0.3, Some(1)), 538);
        assert_eq!(remain(5, 0.99, None), 1);
        assert_eq!(remain(4096, 0.3, None), 2816);
    }

    #[test]
    fn a_pattern_names_the_methods_that_remove_it() {
        assert_eq!((usual("neurons"), usual("layers"), usual("nose")), (Some("sparsegpt"), Some("without"), None));
        let e = build("wanda", toml::from_str("pattern = 'layers'\nsparsity = 0.5").unwrap()).err().unwrap();
        assert!(e.to_string().contains("without, influence"), "{e}");
        let e = build("wanda", toml::from_str("pattern = 'neurons'\nsparsity = 1.5").unwrap()).err().unwrap();
        assert!(e.to_string().contains("below 1"), "{e}");
    }
}
