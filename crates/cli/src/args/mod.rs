//! The words of the command line. They are a contract: scripts rely on them.

mod learning;
mod reducing;

pub use learning::{Distill, Finetune, Lesson, Train};
pub use reducing::{Cluster, Factorize, Prune, Reduce};

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Makes the smallest and fastest GPT that meets your target, and proves that its quality held.
///
/// Exit codes: 0 done, 1 the gate said no, 2 wrong usage or bad input, 3 out of memory, disk or time,
/// 4 input/output or internal fault, 130 interrupted (the same command goes on).
#[derive(Parser)]
#[command(name = "planish", version, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub command: Command,
}

/// Words that every command takes.
#[derive(Args, Clone)]
pub struct Common {
    /// Print one JSON object on standard output; progress goes to standard error
    #[arg(long, global = true)]
    pub json: bool,
    /// Worker threads (default: one per core); results do not depend on it
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Most memory to use, for example 2GiB (default: 80 % of what is free)
    #[arg(long, global = true, value_name = "SIZE")]
    pub max_ram: Option<String>,
    /// Start of all random numbers
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    pub seed: u64,
}

#[derive(Subcommand)]
pub enum Command {
    /// Find and make the best model that meets a target
    #[command(
        after_help = "Examples:\n  planish optimize\n  planish optimize ./model --max-size 30% --max-loss 1% --data text.txt --out small\n  planish optimize model.gguf --max-size 400MB --out small.gguf"
    )]
    Optimize(Optimize),
    /// Show what `optimize` would do, with memory, disk and time; write the recipe and nothing else
    #[command(after_help = "Example:\n  planish plan ./model --max-size 30% --data text.txt --recipe recipe.toml")]
    Plan(PlanArgs),
    /// Replay a recipe
    #[command(after_help = "Example:\n  planish run small/planish.toml --model ./model --data text.txt --out again")]
    Run(Run),
    /// Show family, sites, shapes, sizes and storage of a model
    Inspect(Model),
    /// Store a model's matrices in fewer bits, by one method
    #[command(
        after_help = "Examples:\n  planish quantize ./model --bits 4 --group 32 --data text.txt --out small\n  planish quantize ./model --storage q4_k_m --data text.txt --out small.gguf\n  planish quantize ./model --bits 4.25 --data text.txt --out small.gguf\n  planish quantize ./model --storage q4_k --override head=q6_k --override 'layers 0,1: 6 bits' --data text.txt --out small.gguf\n  planish quantize ./model --bits 4 --group 128 --format compressed-tensors --data text.txt --out for-vllm\n  planish quantize ./model --storage int8 --activations int8 --format compressed-tensors --data text.txt --out w8a8\n  planish quantize ./model --storage q4_k_m --dry-run"
    )]
    Quantize(Quantize),
    /// Take single values, neurons, heads, layers, channels or tokens out of a model
    #[command(
        after_help = "Examples:\n  planish prune ./model --pattern vocabulary --data text.txt --out small\n  planish prune ./model --pattern neurons --sparsity 30% --data text.txt --out narrow\n  planish prune ./model --pattern layers --sparsity 25% --keep 0,1 --heal 5M --data text.txt --out short\n  planish prune ./model --pattern heads --sparsity 50% --method wanda --data text.txt --out small.gguf\n  planish prune ./model --pattern width --sparsity 25% --heal 20M --option distill.lr=1e-3 --data text.txt --out slim\n  planish prune ./model --pattern 2:4 --storage int4g64 --data text.txt --out sparse\n\nWithout neurons, heads, layers or width the result is a model of the same family with another config.json, which transformers and llama.cpp load. Single values leave holes, which planish stores and runs; --dense writes zeros for others."
    )]
    Prune(Prune),
    /// Make each matrix the product of two thin ones
    #[command(
        after_help = "Examples:\n  planish factorize ./model --parameters 80% --data text.txt --out thin\n  planish factorize ./model --parameters 60% --skip down --heal 2M --option distill.lr=3e-4 --data text.txt --out thin\n  planish factorize ./model --method svd --parameters 50% --storage q8_0 --out thin\n\nOnly planish runs products of two as such; `planish export` multiplies them out for other programs."
    )]
    Factorize(Factorize),
    /// Give each matrix a few levels of its own, and its file no more bits than they need
    #[command(
        after_help = "Examples:\n  planish cluster ./model --bits 4 --data text.txt --out small\n  planish cluster ./model --bits 4 --entropy-code --data text.txt --out smaller\n  planish cluster ./sparse --bits 3 --group 64 --data text.txt --out both      # holes stay holes\n\nThe result is a directory of planish's own storage; `planish export` writes it for others as floats."
    )]
    Cluster(Cluster),
    /// Gather statistics of the inputs of matrices, for any number of jobs with --stats
    #[command(
        after_help = "Examples:\n  planish calibrate ./model --data text.txt --out imatrix.gguf      # llama.cpp's importance matrix\n  planish calibrate ./model --data chats.jsonl --packed --out stats.safetensors\n  planish quantize ./model --method imatrix --storage q3_k_m --stats imatrix.gguf --out small.gguf\n  planish quantize ./model --method gptq --bits 3 --stats stats.safetensors --out small\n\nOf the text the part for calibration is read, so that the rest can prove the result; --whole reads all of it."
    )]
    Calibrate(Calibrate),
    /// Teach a model a text
    #[command(
        after_help = "Examples:\n  planish finetune ./model --data text.txt --steps 500 --lr 1e-4 --out taught\n  planish finetune ./model --data text.txt --precision f32 --batch 8 --context 256 --patience 3 --out taught\n  planish finetune small.gguf --data text.txt --lora rank=16,sites=q+v --lr 3e-4 --out adapter\n  mpirun -n 4 planish finetune ./model --data text.txt --batch 32 --part 2 --out taught   # built with the feature mpi\n\nThe same command goes on where an interrupted one stopped, and ends in the same bytes."
    )]
    Finetune(Finetune),
    /// Teach a small model what a large one would say
    #[command(
        after_help = "Examples:\n  planish distill --teacher ./model --student-layers 0,2,4,6 --data text.txt --steps 2000 --lr 1e-3 --out student\n  planish distill ./student --teacher ./model --data text.txt --temperature 2 --share 0.5 --out taught"
    )]
    Distill(Distill),
    /// Make a model from nothing: its shape, its tokenizer and what it learns, as a file says
    #[command(
        after_help = "Examples:\n  planish train recipes/stories.toml --data stories.txt --out stories\n\nThe file:\n  [model]                  # as in config.json of any family that planish reads\n  architectures = [\"LlamaForCausalLM\"]\n  hidden_size = 256\n  ...\n  [tokenizer]\n  vocab = 4096             # learned from the text; or: from = \"DIR\"\n  [data]\n  train = \"stories.txt\"    # text, or tokens of two bytes (.u16)\n  [training]               # as the options of `planish finetune`\n  steps = 2000\n  lr = 2e-3"
    )]
    Train(Train),
    /// Measure quality, alone or against the original, with intervals
    #[command(after_help = "Example:\n  planish evaluate small --against ./model --data text.txt")]
    Evaluate(Evaluate),
    /// Look for what is wrong with a quantized model that somebody published, and make its bad matrices anew
    #[command(
        after_help = "Examples:\n  planish audit model.gguf\n  planish audit ./model-awq --against ./model --data text.txt\n  planish audit ./model-gptq --against ./model --repair ./model-gptq-repaired\n\nExits with 1 where something is wrong. An original's matrix is rounded to the storage that the bad one has."
    )]
    Audit(Audit),
    /// Write a model for another program
    #[command(
        after_help = "Examples:\n  planish export small --to gguf --out small.gguf\n  planish export ./model --to gguf --type q8_0 --out model.gguf\n  planish export ./model --to compressed-tensors --type int8 --out for-vllm\n  planish export ./model --adapter taught --merge --to safetensors --out merged\n  planish export ./model --adapter taught --to gguf --out adapter.gguf"
    )]
    Export(Export),
    /// Continue a prompt
    #[command(
        after_help = "Examples:\n  planish generate ./model --prompt 'Once upon a time' --tokens 100 --temperature 0.8\n  planish generate ./model --prompt-file minutes.txt --lookup --stats\n  planish generate ./model --prompt 'Once upon a time' --draft ./small --speculate 6"
    )]
    Generate(Generate),
    /// Talk with a model that has a chat template
    #[command(
        after_help = "Examples:\n  planish chat ./model --system 'Answer in one sentence.'\n  planish chat ./model --message 'What is a plane tree?' --draft ./small"
    )]
    Chat(Chat),
    /// Measure prefill and decode speed, memory, and the share of this machine's limits
    #[command(
        after_help = "Examples:\n  planish bench model.gguf --prefill 512 --decode 64 --profile\n  planish bench --shape config.json --storage q4_k\n  planish bench ./model --storage q4_k --context 4096 --sequences 8"
    )]
    Bench(Bench),
    /// Check an artefact against its manifest
    Verify(Artefact),
    /// Check this machine
    Doctor,
    /// List the methods
    Methods,
}

/// A model to read.
#[derive(Args, Clone)]
pub struct Model {
    /// A Hugging Face directory or a GGUF file; the built-in sample where none is given
    pub model: Option<PathBuf>,
}

/// Adapters of a model.
#[derive(Args, Clone, Default)]
pub struct Attached {
    /// A PEFT directory or GGUF file with a LoRA or DoRA of the model; may be repeated: what several change adds up
    #[arg(long = "adapter", value_name = "PATH")]
    pub adapters: Vec<PathBuf>,
}

/// An artefact to check.
#[derive(Args)]
pub struct Artefact {
    /// A directory or GGUF file that planish wrote
    pub artefact: PathBuf,
}

/// Where text comes from.
#[derive(Args, Clone)]
pub struct Data {
    #[command(flatten)]
    pub text: Texts,
    /// `self`: the model writes its own text, which is what happens without --data
    #[arg(long, value_name = "WHAT", conflicts_with = "data", value_parser = ["self"])]
    pub calibrate: Option<String>,
    /// Statistics of the inputs of matrices in place of a pass over calibration text: .gguf (or .dat), llama.cpp's
    /// importance matrix, for --method imatrix; .safetensors, full second moments, for gptq, awq and smoothquant too. Where
    /// the file is not there yet they are gathered and written
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
}

/// Text, and how methods see it.
#[derive(Args, Clone)]
pub struct Texts {
    /// Text for calibration, solver and gate; without it the model writes its own. Plain text, tokens (.u16), or .jsonl and
    /// .parquet, whose "messages" are put into the model's chat template
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Join documents and cut them into full sequences of the context (at most 2048 tokens) for calibration, as most tools
    /// do; otherwise each document is a sequence of its own
    #[arg(long)]
    pub packed: bool,
    /// What separates documents in the text
    #[arg(long, value_name = "TEXT", default_value = optimize::data::SEPARATOR)]
    pub separator: String,
    /// Most tokens that methods see
    #[arg(long, value_name = "N", default_value_t = 65_536)]
    pub calibration_tokens: usize,
}

/// What the result must meet.
#[derive(Args, Clone)]
pub struct Target {
    /// Largest size: `30%` of 2 bytes per parameter, or `400MB`
    #[arg(long, value_name = "SIZE")]
    pub max_size: Option<String>,
    /// Most that the perplexity may rise: `1%`
    #[arg(long, value_name = "PERCENT")]
    pub max_loss: Option<String>,
    /// Largest mean KL divergence from the original in nats: `0.01`
    #[arg(long, value_name = "NATS")]
    pub max_kl: Option<f64>,
    /// Least decode speed: `2x` the original's, or `40tok/s`; measured, never guessed
    #[arg(long, value_name = "SPEED")]
    pub min_speed: Option<String>,
}

/// How a result is written.
#[derive(Args, Clone)]
pub struct Writing {
    /// Where the result goes: a directory, or a file that ends in .gguf
    #[arg(long, value_name = "PATH")]
    pub out: Option<PathBuf>,
    /// For whom, where the ending does not tell: hf (planish's own), rans (the same with entropy-coded codes), gguf,
    /// compressed-tensors (vLLM, transformers), gptq or awq
    #[arg(long, value_name = "NAME")]
    pub format: Option<String>,
    /// Replace what lies there
    #[arg(long)]
    pub overwrite: bool,
    /// Discard unfinished work of another job
    #[arg(long)]
    pub restart: bool,
    /// Write a result that misses its floor, and record that it does
    #[arg(long)]
    pub force: bool,
    /// Fail where a matrix cannot be treated as asked
    #[arg(long)]
    pub strict: bool,
    /// Quantize what is quantized already
    #[arg(long)]
    pub requantize: bool,
}

#[derive(Args)]
pub struct Optimize {
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub target: Target,
    #[command(flatten)]
    pub data: Data,
    #[command(flatten)]
    pub writing: Writing,
}

#[derive(Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub target: Target,
    #[command(flatten)]
    pub data: Data,
    #[command(flatten)]
    pub writing: Writing,
    /// Where the recipe goes
    #[arg(long, value_name = "FILE", default_value = "planish.toml")]
    pub recipe: PathBuf,
}

#[derive(Args)]
pub struct Run {
    /// The recipe
    pub recipe: PathBuf,
    /// The model, in place of the recipe's
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// The text, in place of the recipe's
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Statistics of the inputs of matrices, in place of the recipe's
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
    #[command(flatten)]
    pub writing: Writing,
}

/// Quality that a result must have to be written.
#[derive(Args, Clone)]
pub struct Floors {
    /// Most that the perplexity may rise: `1%`
    #[arg(long, value_name = "PERCENT")]
    pub max_loss: Option<String>,
    /// Largest mean KL divergence from the original in nats
    #[arg(long, value_name = "NATS")]
    pub max_kl: Option<f64>,
}

#[derive(Args)]
pub struct Quantize {
    #[command(flatten)]
    pub model: Model,
    /// rtn, hqq, imatrix, awq, gptq, gptaq, autoround or qat; rotate or smoothquant go before another: rotate,gptq or
    /// rotate,smoothquant,gptq; `planish methods` tells more
    #[arg(long, default_value = "gptaq")]
    pub method: String,
    /// Bits of a code, 2 to 8; a fraction such as 4.25 is the average of the whole model, scales, embedding and head
    /// included: each matrix then gets what it needs
    #[arg(long, value_name = "B", default_value_t = 4.0)]
    pub bits: f64,
    /// Values that share a scale; 0: one scale for each row
    #[arg(long, value_name = "G", default_value_t = 32)]
    pub group: u16,
    /// Give each group a minimum as well
    #[arg(long, conflicts_with = "zero_point")]
    pub asymmetric: bool,
    /// Give each group a code of its own for zero, as GPTQ, AWQ and compressed-tensors do
    #[arg(long)]
    pub zero_point: bool,
    /// A storage by name in place of --bits and --group: q4_k, iq4_xs, iq2_xxs, mxfp4, int3g64, int8, nf4, fp8_e4m3 ..., or
    /// one of llama.cpp's mixtures: q4_k_m, q3_k_l ...
    #[arg(long, value_name = "NAME")]
    pub storage: Option<String>,
    /// Round the inputs of products as well, where the format tells its readers: int8 or fp8 (a scale per token), int8-static
    /// or fp8-static (one scale, from the calibration data)
    #[arg(long, value_name = "NAME")]
    pub activations: Option<String>,
    /// Another storage for some sites: 'head=q6_k', 'down=q8_0', 'layers 0,1: 6 bits'; may be repeated
    #[arg(long = "override", value_name = "SITES=STORAGE")]
    pub overrides: Vec<String>,
    /// Leave some sites as they are: 'head', 'layers 0,1', '3.down'; may be repeated
    #[arg(long = "skip", value_name = "SITES")]
    pub skips: Vec<String>,
    /// Show what each matrix would become, with size, memory and disk, and do nothing else
    #[arg(long)]
    pub dry_run: bool,
    /// An option of the method, as in a recipe: 'steps=500', 'lr=2e-4', 'schedule="linear"' of qat, 'rotate.values=false' of
    /// one before it; may be repeated
    #[arg(long = "option", value_name = "NAME=VALUE")]
    pub options: Vec<String>,
    /// Part of the mean diagonal that gptq and gptaq add to it
    #[arg(long, value_name = "X")]
    pub damping: Option<f64>,
    /// gptq, gptaq: round the columns with the largest inputs first
    #[arg(long)]
    pub activation_order: bool,
    #[command(flatten)]
    pub floor: Floors,
    #[command(flatten)]
    pub data: Data,
    #[command(flatten)]
    pub writing: Writing,
}

#[derive(Args)]
pub struct Calibrate {
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub text: Texts,
    /// Read all of the text, not only the 60 % of documents that jobs with the same --data calibrate on: where the same text
    /// will not prove the result
    #[arg(long)]
    pub whole: bool,
    /// Where the statistics go: a file that ends in .gguf (llama.cpp's importance matrix) or .safetensors (full second
    /// moments)
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Replace what lies there
    #[arg(long)]
    pub overwrite: bool,
}

#[derive(Args)]
pub struct Evaluate {
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub attached: Attached,
    /// The text to measure on
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// The original to compare with
    #[arg(long, value_name = "MODEL")]
    pub against: Option<PathBuf>,
    /// What separates documents
    #[arg(long, value_name = "TEXT", default_value = optimize::data::SEPARATOR)]
    pub separator: String,
    /// Longest document in tokens (default: the model's context)
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// `documents`, or `blocks`: one stream in full blocks, as papers measure
    #[arg(long, value_name = "NAME", default_value = "documents")]
    pub protocol: String,
    /// Most documents to measure
    #[arg(long, value_name = "N")]
    pub documents: Option<usize>,
    /// Write raw logits as little-endian f32 [tokens, vocab] to FILE, and token ids as u32 to FILE.ids
    #[arg(long, value_name = "FILE")]
    pub logits: Option<PathBuf>,
    /// Measure the model as `generate` runs it, inputs of products rounded, and not exactly what its file says; the
    /// original that it is compared with stays exact
    #[arg(long)]
    pub fast: bool,
    /// How keys and values are kept: f32, bf16, int8 or int4 (default: f32; bf16 with --fast)
    #[arg(long, value_name = "FORMAT")]
    pub kv: Option<String>,
}

#[derive(Args)]
pub struct Audit {
    #[command(flatten)]
    pub model: Model,
    /// The original
    #[arg(long, value_name = "MODEL")]
    pub against: Option<PathBuf>,
    /// A text to read with both, for the divergence
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// What separates documents
    #[arg(long, value_name = "TEXT", default_value = optimize::data::SEPARATOR)]
    pub separator: String,
    /// Write the model with its bad matrices made anew from the original
    #[arg(long, value_name = "PATH", requires = "against")]
    pub repair: Option<PathBuf>,
    /// Replace what lies there
    #[arg(long)]
    pub overwrite: bool,
    /// Show every matrix, not only the bad ones
    #[arg(long)]
    pub all: bool,
}

#[derive(Args)]
pub struct Export {
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub attached: Attached,
    /// Write the model with its adapters in it, in floats; without it, --to gguf and --adapter write the adapter alone
    #[arg(long, requires = "adapters")]
    pub merge: bool,
    /// gguf, safetensors (plain floats), compressed-tensors, gptq or awq
    #[arg(long, value_name = "FORMAT")]
    pub to: String,
    /// Storage of the matrices: f32, f16, bf16, q8_0, q4_k ... (default: as they are)
    #[arg(long = "type", value_name = "NAME")]
    pub kind: Option<String>,
    /// Where it goes
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// Replace what lies there
    #[arg(long)]
    pub overwrite: bool,
    /// Fail where a matrix cannot be stored as asked
    #[arg(long)]
    pub strict: bool,
    /// Quantize what is quantized already
    #[arg(long)]
    pub requantize: bool,
}

/// How tokens are chosen.
#[derive(Args, Clone)]
pub struct Choosing {
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub tokens: usize,
    /// 0 takes the likeliest token; 1 draws as the model says
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub temperature: f32,
    /// Only the likeliest K tokens; 0 is all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// The likeliest tokens whose probabilities reach P
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Only tokens at least P times as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub min_p: f32,
    /// Makes tokens that were said before less likely; 1 is off
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// End at this text; may be repeated
    #[arg(long = "stop", value_name = "TEXT")]
    pub stops: Vec<String>,
}

#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub attached: Attached,
    /// The text to continue
    #[arg(long, value_name = "TEXT", default_value = "", conflicts_with = "prompt_file")]
    pub prompt: String,
    /// A file whose text (UTF-8) is continued
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    #[command(flatten)]
    pub choosing: Choosing,
    #[command(flatten)]
    pub speculating: Speculating,
    #[command(flatten)]
    pub running: Running,
}

#[derive(Args)]
pub struct Chat {
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub attached: Attached,
    /// One message in place of a conversation
    #[arg(long, value_name = "TEXT")]
    pub message: Option<String>,
    /// What the model is told first
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// A chat template in place of the model's
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
    #[command(flatten)]
    pub choosing: Choosing,
    #[command(flatten)]
    pub speculating: Speculating,
    #[command(flatten)]
    pub running: Running,
}

/// How tokens are guessed ahead of the model, which checks several in one step; the output stays the same.
#[derive(Args, Clone)]
pub struct Speculating {
    /// Guess that the text goes on as it did after the same words before: faster where it repeats itself, as in
    /// summaries, code and corrections
    #[arg(long, group = "guesses")]
    pub lookup: bool,
    /// Let a smaller model with the same tokenizer guess, for example a pruned or quantized copy
    #[arg(long, value_name = "MODEL", group = "guesses")]
    pub draft: Option<PathBuf>,
    /// Most tokens to guess in one step, 1 to 64 (default: 8)
    #[arg(long, value_name = "K", requires = "guesses", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub speculate: Option<u8>,
    /// Say on standard error what was read, guessed and how fast
    #[arg(long)]
    pub stats: bool,
}

/// How numbers are kept while a model runs.
#[derive(Args, Clone)]
pub struct Running {
    /// Multiply what the file says in 32-bit floats, instead of rounding the inputs of products to 8 bits (weights of
    /// codes) or brain floats (weights of brain floats)
    #[arg(long)]
    pub exact: bool,
    /// How keys and values are kept: f32, bf16, int8 or int4 (default: bf16; f32 with --exact)
    #[arg(long, value_name = "FORMAT")]
    pub kv: Option<String>,
}

#[derive(Args)]
pub struct Bench {
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub attached: Attached,
    /// A config.json in place of a model: random weights of its shape
    #[arg(long, value_name = "CONFIG", conflicts_with = "model")]
    pub shape: Option<PathBuf>,
    /// Storage of the matrices: q4_k, q8_0, bf16, int4g64 ... (default: as they are; bf16 with --shape)
    #[arg(long, value_name = "NAME")]
    pub storage: Option<String>,
    /// With --shape: another storage of embedding and head
    #[arg(long, value_name = "NAME", requires = "shape")]
    pub edges: Option<String>,
    /// With --shape: matrices of blocks as `factorize` makes them, with so much of their numbers: 50%
    #[arg(long, value_name = "PERCENT", requires = "shape")]
    pub parameters: Option<String>,
    /// Tokens that are read at once
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub prefill: usize,
    /// Tokens that are generated one by one
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub decode: usize,
    /// Decode after N earlier tokens as well; may be repeated
    #[arg(long = "context", value_name = "N")]
    pub contexts: Vec<usize>,
    /// Decode of N texts at once as well; may be repeated
    #[arg(long = "sequences", value_name = "N")]
    pub sequences: Vec<usize>,
    /// Runs; the median counts
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub runs: usize,
    /// Time every operation
    #[arg(long)]
    pub profile: bool,
    #[command(flatten)]
    pub running: Running,
}
