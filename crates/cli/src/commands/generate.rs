//! `planish generate`.

use super::{open_to_run, place, print_json};
use crate::args::{Attached, Choosing, Common, Generate, Running, Speculating};
use anyhow::{Context, Result};
use model::{
    Gpt, Sampling,
    generate::{Ended, Generator, Limits, Output},
    speculate::Speculator,
};
use serde_json::{Value, json};
use std::{borrow::Cow, io::Write};

/// Tokens to guess in one step where nothing is said.
const GUESSES: u8 = 8;

/// Continues a prompt.
pub fn run(args: &Generate, common: &Common) -> Result<u8> {
    let text = prompt(args)?;
    let gpt = open_to_run(&place(&args.model)?, &args.attached, args.running.exact, args.running.kv.as_deref())?;
    let draft = draft(&args.speculating, &args.running)?;
    let mut generator = generator(&gpt, draft.as_ref(), &args.speculating)?;
    let prompt = gpt.tokenizer.encode(&text, true)?;
    if !common.json {
        say!("{text}");
    }
    let out =
        generator.generate(&prompt, &sampling(&args.choosing, common.seed), &limits(&args.choosing), &mut |piece| {
            say(piece, common)
        })?;
    if common.json {
        let mut said = json!({"ids": out.ids, "text": out.text, "ended": word(out.ended)});
        add_work(&mut said, &out);
        print_json(&said)?;
    } else {
        sayln!("");
    }
    if args.speculating.stats {
        eprintln!("{}", stats(&out));
    }
    Ok(if out.ended == Ended::Listener { crate::exit::INTERRUPTED } else { 0 })
}

/// The text to continue.
fn prompt(args: &Generate) -> Result<Cow<'_, str>> {
    let Some(path) = &args.prompt_file else { return Ok(args.prompt.as_str().into()) };
    let bytes = std::fs::read(path).map_err(formats::Error::io(path, "read it"))?;
    let text = String::from_utf8(bytes).with_context(|| format!("{} is no text in UTF-8", path.display()))?;
    Ok(text.into())
}

/// Opens the model that guesses and makes it run as the one that checks it.
pub fn draft(speculating: &Speculating, running: &Running) -> Result<Option<Gpt>> {
    let Some(path) = &speculating.draft else { return Ok(None) };
    Ok(Some(open_to_run(path, &Attached::default(), running.exact, running.kv.as_deref())?))
}

/// A generator that guesses as asked.
pub fn generator<'g>(gpt: &'g Gpt, draft: Option<&'g Gpt>, speculating: &Speculating) -> Result<Generator<'g>> {
    let most = usize::from(speculating.speculate.unwrap_or(GUESSES));
    let generator = Generator::new(gpt);
    Ok(match draft {
        Some(draft) => generator.with(Speculator::draft(draft, gpt, most)?),
        None if speculating.lookup => generator.with(Speculator::lookup(most)),
        None => generator,
    })
}

/// Shows a piece of text as soon as it is there; returns whether to go on.
pub fn say(piece: &str, common: &Common) -> bool {
    if !common.json {
        say!("{piece}");
        let _ = std::io::stdout().flush();
    }
    optimize::progress::check().is_ok()
}

/// Adds what a text took to what is printed of it.
pub fn add_work(said: &mut Value, out: &Output) {
    let work = &out.work;
    let numbers = json!({
        "prompt_tokens": work.prompt_tokens,
        "reused_tokens": work.reused_tokens,
        "tokens": out.ids.len(),
        "prefill_seconds": work.prefill_seconds,
        "decode_seconds": work.decode_seconds,
        "tokens_per_second": speed(out),
        "proposed": work.proposed,
        "accepted": work.accepted,
        "steps": work.steps,
    });
    if let (Value::Object(said), Value::Object(numbers)) = (said, numbers) {
        said.extend(numbers);
    }
}

/// What a text took, in one line.
pub fn stats(out: &Output) -> String {
    let work = &out.work;
    format!(
        "prompt: {} tokens, {} of them reused, in {:.3} s; output: {} tokens in {:.3} s ({:.1} tokens/s), {} steps, {} of {} guesses right",
        work.prompt_tokens,
        work.reused_tokens,
        work.prefill_seconds,
        out.ids.len(),
        work.decode_seconds,
        speed(out),
        work.steps,
        work.accepted,
        work.proposed,
    )
}

/// Tokens a second after the prompt; 0 where there was no time to measure.
fn speed(out: &Output) -> f64 {
    let seconds = out.work.decode_seconds;
    if seconds > 0.0 { out.ids.len() as f64 / seconds } else { 0.0 }
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
