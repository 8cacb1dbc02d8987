//! Prompt in, tokens out, one at a time.

use crate::{Cache, Error, Gpt, Result, Runner, Sampling, Wanted};

/// When to stop.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Most tokens to generate.
    pub tokens: usize,
    /// Texts that end the output; they are not part of it.
    pub stops: Vec<String>,
    /// Go on past tokens that end a text?
    pub ignore_end: bool,
}

/// Why the output ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The model ended the text.
    End,
    /// A stop text appeared.
    Stop,
    /// The number of tokens was reached.
    Tokens,
    /// The context is full.
    Context,
    /// The listener wanted no more.
    Listener,
}

/// What was generated.
#[derive(Clone, Debug)]
pub struct Output {
    /// The new tokens.
    pub ids: Vec<u32>,
    /// Their text, without the stop text.
    pub text: String,
    /// Why it ended.
    pub ended: Ended,
}

/// Continues a prompt; `listen` gets each piece of text as soon as it is certain and returns whether to go on.
///
/// # Errors
/// If the prompt is empty, longer than the context, or holds tokens that are not in the vocabulary.
pub fn generate(
    gpt: &Gpt,
    prompt: &[u32],
    sampling: &Sampling,
    limits: &Limits,
    listen: &mut dyn FnMut(&str) -> bool,
) -> Result<Output> {
    let context = gpt.model.spec.context;
    if prompt.is_empty() {
        return Err(Error::Asked("the prompt is empty and the tokenizer adds no BOS; give at least one token".into()));
    }
    if prompt.len() >= context {
        return Err(Error::Asked(format!("the prompt has {} tokens; the model's context is {context}", prompt.len())));
    }
    let mut cache = [Cache::with_room(&gpt.model, context.min(prompt.len() + limits.tokens))];
    let mut runner = Runner::new(&gpt.model);
    let mut seen = prompt.to_vec();
    let mut text = Text::new(&limits.stops);
    let mut stream = gpt.tokenizer.decode_stream(true);
    let mut logits = runner.read(prompt, &mut cache[0])?;
    let mut ended = Ended::Tokens;
    for step in 0..limits.tokens {
        let next = sampling.choose(logits.row(0), &seen, step as u64);
        if gpt.ends.contains(&next) && !limits.ignore_end {
            ended = Ended::End;
            break;
        }
        seen.push(next);
        if let Some(piece) = stream.push(next)? {
            let (show, stopped) = text.push(&piece);
            if !show.is_empty() && !listen(&show) {
                ended = Ended::Listener;
                break;
            }
            if stopped {
                ended = Ended::Stop;
                break;
            }
        }
        if seen.len() >= context {
            ended = Ended::Context;
            break;
        }
        if step + 1 < limits.tokens {
            logits = runner.step(&[[next]], &mut cache, Wanted::Last)?;
        }
    }
    if let Some(piece) = stream.finish()?.filter(|_| ended != Ended::Stop) {
        let (show, stopped) = text.push(&piece);
        if !show.is_empty() {
            listen(&show);
        }
        ended = if stopped { Ended::Stop } else { ended };
    }
    let rest = text.finish(ended == Ended::Stop);
    if !rest.is_empty() {
        listen(&rest);
    }
    Ok(Output { ids: seen.split_off(prompt.len()), text: text.shown, ended })
}

/// Text that holds back what may be the beginning of a stop text.
struct Text<'a> {
    stops: &'a [String],
    shown: String,
    held: String,
}

impl<'a> Text<'a> {
    fn new(stops: &'a [String]) -> Text<'a> {
        Text { stops, shown: String::new(), held: String::new() }
    }

    /// Adds a piece; returns what may be shown and whether a stop text appeared.
    fn push(&mut self, piece: &str) -> (String, bool) {
        self.held += piece;
        let first = self.stops.iter().filter(|s| !s.is_empty()).filter_map(|s| self.held.find(s.as_str())).min();
        let (until, stopped) = match first {
            Some(at) => (at, true),
            None => (self.held.len() - self.may_begin_stop(), false),
        };
        let show: String = self.held.drain(..until).collect();
        self.shown += &show;
        (show, stopped)
    }

    /// Length of the longest end of the held text with which a stop text begins.
    fn may_begin_stop(&self) -> usize {
        let ends = self.held.char_indices().map(|(at, _)| &self.held[at..]);
        ends.filter(|end| self.stops.iter().any(|s| s.starts_with(end))).map(str::len).max().unwrap_or(0)
    }

    fn finish(&mut self, stopped: bool) -> String {
        let rest = if stopped { String::new() } else { std::mem::take(&mut self.held) };
        self.shown += &rest;
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_text_is_found_across_pieces_and_never_shown() {
        let stops = vec!["END".to_string()];
        let mut t = Text::new(&stops);
        assert_eq!(t.push("one E"), ("one ".into(), false));
        assert_eq!(t.push("Nx"), ("ENx".into(), false));
        assert_eq!(t.push(" EN"), (" ".into(), false));
        assert_eq!(t.push("D more"), (String::new(), true));
        assert_eq!(t.finish(true), "");
        assert_eq!(t.shown, "one ENx ");
    }
}
