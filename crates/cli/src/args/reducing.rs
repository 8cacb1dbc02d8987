//! Words of the commands that take numbers of a model away.

use super::{Data, Floors, Model, Writing};
use clap::Args;

#[derive(Args)]
pub struct Factorize {
    #[command(flatten)]
    pub model: Model,
    /// svd (by the weights), asvd (and the size of each input), svd-llm (by what comes out) or gfwsvd (by what that does to the
    /// loss); `planish methods` tells more
    #[arg(long, default_value = "gfwsvd")]
    pub method: String,
    /// Numbers that remain of each matrix of the blocks: 80%
    #[arg(long, value_name = "PERCENT", default_value = "80%")]
    pub parameters: String,
    /// How the factors are stored: bf16, f16, f32, q8_0, int8 ... (default: as the model's matrices are)
    #[arg(long, value_name = "NAME")]
    pub storage: Option<String>,
    #[command(flatten)]
    pub reduce: Reduce,
}

#[derive(Args)]
pub struct Prune {
    #[command(flatten)]
    pub model: Model,
    /// sparsegpt, fisher, wanda, taylor or magnitude for neurons and heads, sparsegpt, wanda, taylor or magnitude for values, without or influence
    /// for layers, magnitude or slicegpt for width, unused for vocabulary (default: the first of each); `planish methods` tells more
    #[arg(long)]
    pub method: Option<String>,
    /// What is removed: neurons, heads (key and value heads with the query heads that read them), layers, width; tokens that the data
    /// never uses: vocabulary; or single values: unstructured, 2:4 (two of every four stay; any n:m), 16x1 (blocks of rows x columns)
    #[arg(long, value_name = "NAME", default_value = "neurons")]
    pub pattern: String,
    /// How much of it (default: 30%, of tokens all that are never used); neurons and channels that remain are a multiple of 32 or more where those that are there are
    /// one, and 2:4 says it itself
    #[arg(long, value_name = "PERCENT")]
    pub sparsity: Option<String>,
    /// Spread it so over matrices, of single values: loss (as much as it costs the loss), owl (less where outliers are) or even (default:
    /// loss, where the method looks at data)
    #[arg(long, value_name = "NAME")]
    pub rates: Option<String>,
    /// Reach it in so many rounds, with a part of --heal after each
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// How the share grows from round to round: cubic (most at first), linear, or the exponent of a polynomial
    #[arg(long, value_name = "NAME", default_value = "cubic")]
    pub schedule: String,
    /// Of single values: how those that stay are stored: int4g64, bf16 ... (default: as the model's matrices are)
    #[arg(long, value_name = "NAME")]
    pub storage: Option<String>,
    /// Of single values: store zeros where the others were, for programs that know no holes
    #[arg(long)]
    pub dense: bool,
    /// Layers that stay whatever they are worth: 0,1,7
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    pub keep: Vec<u16>,
    #[command(flatten)]
    pub reduce: Reduce,
}

#[derive(Args)]
pub struct Cluster {
    #[command(flatten)]
    pub model: Model,
    /// Bits of a code, 1 to 8: a matrix has as many levels as a code has values
    #[arg(long, default_value_t = 4)]
    pub bits: u8,
    /// Values that share a scale, a multiple of 8; 0 for a scale per row
    #[arg(long, default_value_t = 128)]
    pub group: u16,
    /// How levels are chosen; `planish methods` tells more
    #[arg(long, default_value = "kmeans")]
    pub method: String,
    /// Let each code take as few bits of the file as how often it is there allows; the file is unfolded when it is read
    #[arg(long)]
    pub entropy_code: bool,
    #[command(flatten)]
    pub reduce: Reduce,
}

/// What all of them take.
#[derive(Args, Clone)]
pub struct Reduce {
    /// Leave some sites as they are: 'down', 'layers 0,1', '3.o'; may be repeated
    #[arg(long = "skip", value_name = "SITES")]
    pub skips: Vec<String>,
    /// Teach the result so many tokens of the calibration text again, as the original would continue them: 2M
    #[arg(long, value_name = "TOKENS")]
    pub heal: Option<String>,
    /// An option of the method or of what heals, as in a recipe: 'ranks={"0.q"=48}', 'distill.lr=3e-4'; may be repeated
    #[arg(long = "option", value_name = "NAME=VALUE")]
    pub options: Vec<String>,
    /// Show what each matrix would become, with size, memory and disk, and do nothing else
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub floor: Floors,
    #[command(flatten)]
    pub data: Data,
    #[command(flatten)]
    pub writing: Writing,
}
