//! `planish generate`.

use super::{open, prepare_model, print_json};
use crate::args::{Choosing, Common, Generate};
use anyhow::Result;
use model::{
    Sampling,
    generate::{Ended, Limits, generate},
};
use serde_json::json;
use std::io::Write;

/// Continues a prompt.
pub fn run(args: &Generate, common: &Common) -> Result<u8> {
    let mut gpt = open(&args.model)?;
    prepare_model(&mut gpt.model, args.running.exact, args.running.kv.as_deref())?;
    let prompt = gpt.tokenizer.encode(&args.prompt, true)?;
    if !common.json {
        print!("{}", args.prompt);
    }
    let out = generate(&gpt, &prompt, &sampling(&args.choosing, common.seed), &limits(&args.choosing), &mut |piece| {
        if !common.json {
            print!("{piece}");
            let _ = std::io::stdout().flush();
        }
        optimize::progress::check().is_ok()
    })?;
    if common.json {
        print_json(&json!({
            "prompt_tokens": prompt.len(), "tokens": out.ids.len(), "ids": out.ids, "text": out.text, "ended": word(out.ended),
        }))?;
    } else {
        println!();
    }
    Ok(if out.ended == Ended::Listener { crate::exit::INTERRUPTED } else { 0 })
}

/// How tokens are chosen.
pub fn sampling(c: &Choosing, seed: u64) -> Sampling {
    Sampling {
        temperature: c.temperature,
        top_k: c.top_k,
        top_p: c.top_p,
        min_p: c.min_p,
        repetition_penalty: c.repetition_penalty,
        seed,
    }
}

/// When to stop.
pub fn limits(c: &Choosing) -> Limits {
    Limits { tokens: c.tokens, stops: c.stops.clone(), ignore_end: false }
}

fn word(ended: Ended) -> &'static str {
    match ended {
        Ended::End => "end",
        Ended::Stop => "stop",
        Ended::Tokens => "tokens",
        Ended::Context => "context",
        Ended::Listener => "interrupted",
    }
}
