//! Words of the commands that teach a model.

use super::Model;
use clap::Args;
use std::path::PathBuf;

#[derive(Args)]
pub struct Finetune {
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub lesson: Lesson,
    #[command(flatten)]
    pub place: Place,
}

#[derive(Args)]
pub struct Distill {
    /// The student, with the teacher's vocabulary; none where --student-layers or --student-widths make one of the teacher
    pub student: Option<PathBuf>,
    /// The model to learn from, as large as memory allows, quantized or not; none where --teacher-cache holds what it said
    #[arg(long, value_name = "MODEL", required_unless_present = "teacher_cache")]
    pub teacher: Option<PathBuf>,
    /// Keep what the teacher says in this file, and learn from it: later lessons on the same parts of the text need no
    /// teacher any more
    #[arg(long, value_name = "FILE")]
    pub teacher_cache: Option<PathBuf>,
    /// Likeliest tokens of each prediction that --teacher-cache keeps; all others count as one
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub top_k: usize,
    /// Draw what the student's blocks return towards the teacher's as well, with this weight; where widths differ a
    /// projection learns along
    #[arg(long, value_name = "X")]
    pub hidden: Option<f32>,
    /// Draw how tokens relate in the student's last block (by queries, keys and values) towards the teacher's, with this
    /// weight; widths and heads may differ (MiniLM)
    #[arg(long, value_name = "X")]
    pub relations: Option<f32>,
    /// Share of the batches whose texts the student goes on with itself, to learn from what the teacher says of that
    #[arg(long, value_name = "X")]
    pub on_policy: Option<f64>,
    /// Blocks of the teacher to begin the student with: 0,2,4
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        conflicts_with = "student",
        required_unless_present_any = ["student", "student_widths"]
    )]
    pub student_layers: Option<Vec<u16>>,
    /// How wide the student begins, with the teacher's largest channels: dim=192,hidden=512,kv-heads=2, or some of these
    #[arg(long, value_name = "WORDS", conflicts_with = "student")]
    pub student_widths: Option<String>,
    /// Divergence from the teacher that is made small: forward, reverse or jensen-shannon
    #[arg(long, value_name = "NAME", default_value = "forward")]
    pub divergence: String,
    /// Flattens both distributions
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub temperature: f32,
    /// Share of the divergence in the loss, 0 to 1; the rest is the likelihood of the text
    #[arg(long, value_name = "X", default_value_t = 0.9)]
    pub share: f32,
    #[command(flatten)]
    pub lesson: Lesson,
    #[command(flatten)]
    pub place: Place,
}

/// What is learned, and how.
#[derive(Args)]
pub struct Lesson {
    /// What to learn: a text (UTF-8), JSONL or Parquet with "text", "prompt" and "completion" or "messages" (only answers
    /// are learned), or tokens of two bytes (.u16)
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// A text to measure on (default: a twentieth of the documents by their hash, 65,536 tokens at most)
    #[arg(long, value_name = "FILE")]
    pub validation: Option<PathBuf>,
    /// What separates documents in the texts
    #[arg(long, value_name = "TEXT", default_value = optimize::data::SEPARATOR)]
    pub separator: String,
    /// A chat template (Jinja) for "messages", where the model has none or another is wanted; the result has it too
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
    /// Teach adapters of the model, which stays as it is and may be quantized: rank=16, and if wanted alpha=32 (default:
    /// twice the rank), sites=q+v (default: all linear maps of the blocks), dora, rslora
    #[arg(long, value_name = "WORDS")]
    pub lora: Option<String>,
    /// Go on teaching an adapter that there is: a PEFT directory or a GGUF file
    #[arg(long, value_name = "PATH", conflicts_with = "lora")]
    pub adapter: Option<PathBuf>,
    /// Steps of the optimizer
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub steps: u64,
    /// Sequences of a step
    #[arg(long, value_name = "B", default_value_t = 8)]
    pub batch: usize,
    /// Sequences that are in memory together; several ranks (`mpirun`) share out the parts of a step (default: as many as
    /// have 2,048 tokens). Gradients are summed part by part, so another number changes last digits
    #[arg(long, value_name = "N")]
    pub part: Option<usize>,
    /// Longest sequence in tokens (default: the model's context, 1024 at most)
    #[arg(long, value_name = "T")]
    pub context: Option<usize>,
    /// Join documents into one stream, in a seeded order, and cut it: all sequences are full, and may see the end of one
    /// document before the next (by default each document is read by itself)
    #[arg(long)]
    pub join_documents: bool,
    /// Highest learning rate
    #[arg(long, value_name = "X", default_value_t = 1e-4)]
    pub lr: f64,
    /// How the rate falls after the warm-up: cosine, linear, wsd or constant
    #[arg(long, value_name = "NAME", default_value = "cosine")]
    pub schedule: String,
    /// What it falls to, as a part of the highest
    #[arg(long, value_name = "X", default_value_t = 0.1)]
    pub least: f64,
    /// Part of the steps over which the rate of `wsd` falls
    #[arg(long, value_name = "X", default_value_t = 0.2)]
    pub decay_part: f64,
    /// Steps in which the rate rises (default: a twentieth)
    #[arg(long, value_name = "N")]
    pub warm_up: Option<u64>,
    /// How gradients become steps: adamw, lion (half of its memory; a third to a tenth of its rate), adafactor (hardly any
    /// memory; its rate is relative to the values, try 1e-2) or muon (adamw's rate)
    #[arg(long, value_name = "NAME", default_value = "adamw")]
    pub optimizer: String,
    /// Bits of each of the optimizer's moments: 32 or 8
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub optimizer_bits: u8,
    /// Decay of matrices
    #[arg(long, value_name = "X", default_value_t = 0.01)]
    pub weight_decay: f32,
    /// Decay of the first moment (default: the optimizer's own, 0.9; lion 0.9, muon 0.95)
    #[arg(long, value_name = "X")]
    pub beta1: Option<f32>,
    /// Decay of the second moment (default: the optimizer's own, 0.999; lion 0.99, muon 0.95)
    #[arg(long, value_name = "X")]
    pub beta2: Option<f32>,
    /// Largest norm of the gradient, which is shortened to it; 0 is none
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub clip: f32,
    /// Numbers in which products run: f32, bf16, or fp16 with a dynamic scale of the loss (never faster than f32 on a
    /// processor); values and sums are 32-bit floats in any case
    #[arg(long, value_name = "NAME", default_value = "bf16")]
    pub precision: String,
    /// Teach the matrices to be codes of this storage (quantization-aware training): q4_k, q3_k, q4_0, int3g64 ...; the
    /// result is quantized
    #[arg(long, value_name = "STORAGE")]
    pub quantize: Option<String>,
    /// Another storage for some sites, of --quantize: 'head=q6_k', 'down=q8_0', 'layers 0,1=keep'; may be repeated
    #[arg(long = "override", value_name = "SITES=STORAGE")]
    pub overrides: Vec<String>,
    /// Steps between validations (default: a tenth of all)
    #[arg(long, value_name = "N")]
    pub validate_every: Option<u64>,
    /// End after so many validations without a better loss; 0 never
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub patience: u64,
    /// Steps between checkpoints
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub checkpoint_every: u64,
    /// Keep of each block only its input, and run it again on the way back: less memory, a third more time, the same
    /// result
    #[arg(long)]
    pub checkpoint_activations: bool,
}

/// Where what is taught goes.
#[derive(Args)]
pub struct Place {
    /// Where the result goes: a directory
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Replace what lies there
    #[arg(long)]
    pub overwrite: bool,
    /// Discard unfinished work of another job
    #[arg(long)]
    pub restart: bool,
}

impl Place {
    /// The same, as jobs take it.
    pub fn place(&self) -> optimize::teach::Place {
        optimize::teach::Place { out: self.out.clone(), overwrite: self.overwrite, restart: self.restart }
    }
}

#[derive(Args)]
pub struct Train {
    /// A file with the tables [model], [tokenizer], [data] and [training]
    #[arg(value_name = "CONFIG.toml")]
    pub config: PathBuf,
    /// Another text to learn than the file names
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Another text to measure on
    #[arg(long, value_name = "FILE")]
    pub validation: Option<PathBuf>,
    /// A directory that has the tokenizer
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    #[command(flatten)]
    pub place: Place,
}
