//! Times candle's quantized Llama on a GGUF file and prints one JSON object:
//! `candle-bench FILE.gguf PREFILL DECODE`. Threads are candle's own affair: `RAYON_NUM_THREADS` and
//! `CANDLE_NUM_THREADS` set them.
//!
//! As llama-bench does it: each measurement starts from an empty cache, after one that does not count. The
//! prompt is read whole and in pieces, and the faster way counts: candle's attention makes the whole matrix
//! of scores, so that a long prompt is faster in pieces.

use candle_core::{Device, Error, Result, Tensor, quantized::gguf_file};
use candle_transformers::models::quantized_llama::ModelWeights;
use std::{env, fs::File, process::ExitCode, time::Instant};

/// Tokens of a piece of the prompt.
const PIECE: usize = 128;

/// Token ids that differ from each other; which they are does not matter to the time.
fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i * 31 % 1000).collect()
}

/// Tokens per second of one prompt, read `piece` tokens at a time.
fn prefill(model: &mut ModelWeights, tokens: usize, piece: usize) -> Result<f64> {
    model.clear_kv_cache();
    let prompt = ids(tokens);
    let begin = Instant::now();
    for (i, part) in prompt.chunks(piece).enumerate() {
        model.forward(&Tensor::new(part, &Device::Cpu)?.unsqueeze(0)?, i * piece)?;
    }
    Ok(tokens as f64 / begin.elapsed().as_secs_f64())
}

/// Tokens per second, one after another.
fn decode(model: &mut ModelWeights, tokens: usize) -> Result<f64> {
    model.clear_kv_cache();
    let begin = Instant::now();
    for (at, id) in ids(tokens).into_iter().enumerate() {
        model.forward(&Tensor::new(&[[id]], &Device::Cpu)?, at)?;
    }
    Ok(tokens as f64 / begin.elapsed().as_secs_f64())
}

fn bench(path: &str, prompt: usize, tokens: usize) -> Result<()> {
    let mut file = File::open(path)?;
    let content = gguf_file::Content::read(&mut file)?;
    let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
    prefill(&mut model, prompt, PIECE)?;
    let fill = prefill(&mut model, prompt, prompt)?.max(prefill(&mut model, prompt, PIECE)?);
    decode(&mut model, 4)?;
    let step = decode(&mut model, tokens)?;
    println!(r#"{{"prefill": {fill}, "decode": {step}}}"#);
    Ok(())
}

fn count(text: &str) -> Result<usize> {
    text.parse().map_err(|_| Error::Msg(format!("{text:?} is no number of tokens")))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [path, prompt, tokens] = arguments.as_slice() else {
        eprintln!("usage: candle-bench FILE.gguf PREFILL DECODE");
        return ExitCode::from(2);
    };
    let done = count(prompt).and_then(|p| count(tokens).and_then(|t| bench(path, p, t)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("candle-bench: {path}: {error}");
            ExitCode::FAILURE
        }
    }
}
