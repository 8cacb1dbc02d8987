//! `planish chat`.

use super::{
    converse_by,
    generate::{add_work, draft, generator, limits, sampling, say, stats},
    open_to_run, place, print_json,
};
use crate::args::{Chat, Common};
use anyhow::Result;
use formats::chat_template::Message;
use model::{Gpt, generate::Generator};
use serde_json::json;
use std::io::{BufRead, IsTerminal, Write};

/// Talks with a model: one message, or line by line until the input ends.
pub fn run(args: &Chat, common: &Common) -> Result<u8> {
    let mut gpt = open_to_run(&place(&args.model)?, &args.attached, args.running.exact, args.running.kv.as_deref())?;
    converse_by(&mut gpt, args.template.as_deref())?;
    let draft = draft(&args.speculating, &args.running)?;
    let generator = generator(&gpt, draft.as_ref(), &args.speculating)?;
    let system = args.system.clone().map(|content| Message { role: "system".into(), content });
    let mut talk = Talk { gpt: &gpt, generator, messages: system.into_iter().collect(), args, common };
    if let Some(message) = &args.message {
        talk.answer(message)?;
        return Ok(0);
    }
    let terminal = std::io::stdin().is_terminal();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if terminal {
            say!("> ");
            std::io::stdout().flush()?;
        }
        let Some(line) = lines.next().transpose()? else { return Ok(0) };
        talk.answer(&line)?;
    }
}

/// A conversation; its generator reads of each turn only what is new.
struct Talk<'a> {
    gpt: &'a Gpt,
    generator: Generator<'a>,
    messages: Vec<Message>,
    args: &'a Chat,
    common: &'a Common,
}

impl Talk<'_> {
    /// Answers a message and shows the answer.
    fn answer(&mut self, message: &str) -> Result<()> {
        let (args, common) = (self.args, self.common);
        self.messages.push(Message { role: "user".into(), content: message.into() });
        let prompt = self.gpt.chat_prompt(&self.messages)?;
        let seed = common.seed.wrapping_add(self.messages.len() as u64);
        let out = self.generator.generate(
            &prompt,
            &sampling(&args.choosing, seed),
            &limits(&args.choosing),
            &mut |piece| say(piece, common),
        )?;
        if common.json {
            let mut said = json!({"reply": out.text});
            add_work(&mut said, &out);
            print_json(&said)?;
        } else {
            sayln!("");
        }
        if args.speculating.stats {
            eprintln!("{}", stats(&out));
        }
        self.messages.push(Message { role: "assistant".into(), content: out.text });
        Ok(())
    }
}
