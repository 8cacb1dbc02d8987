//! `planish chat`.

use super::{
    generate::{limits, sampling},
    open, prepare_model, print_json,
};
use crate::args::{Chat, Common};
use anyhow::{Context, Result};
use formats::chat_template::Message;
use model::{Gpt, generate::generate};
use serde_json::json;
use std::io::{BufRead, IsTerminal, Write};

/// Talks with a model: one message, or line by line until the input ends.
pub fn run(args: &Chat, common: &Common) -> Result<u8> {
    let mut gpt = open(&args.model)?;
    prepare_model(&mut gpt.model, args.running.exact, args.running.kv.as_deref())?;
    if let Some(path) = &args.template {
        gpt.template = Some(std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?);
    }
    let mut talk: Vec<Message> = Vec::new();
    talk.extend(args.system.clone().map(|content| Message { role: "system".into(), content }));
    if let Some(message) = &args.message {
        let reply = answer(&gpt, &mut talk, message, args, common)?;
        if common.json {
            print_json(&json!({"reply": reply}))?;
        }
        return Ok(0);
    }
    let terminal = std::io::stdin().is_terminal();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if terminal {
            print!("> ");
            std::io::stdout().flush()?;
        }
        let Some(line) = lines.next().transpose()? else { return Ok(0) };
        let reply = answer(&gpt, &mut talk, &line, args, common)?;
        if common.json {
            print_json(&json!({"reply": reply}))?;
        }
    }
}

fn answer(gpt: &Gpt, talk: &mut Vec<Message>, message: &str, args: &Chat, common: &Common) -> Result<String> {
    talk.push(Message { role: "user".into(), content: message.into() });
    let prompt = gpt.chat_prompt(talk)?;
    let seed = common.seed.wrapping_add(talk.len() as u64);
    let out = generate(gpt, &prompt, &sampling(&args.choosing, seed), &limits(&args.choosing), &mut |piece| {
        if !common.json {
            print!("{piece}");
            let _ = std::io::stdout().flush();
        }
        optimize::progress::check().is_ok()
    })?;
    if !common.json {
        println!();
    }
    talk.push(Message { role: "assistant".into(), content: out.text.clone() });
    Ok(out.text)
}
