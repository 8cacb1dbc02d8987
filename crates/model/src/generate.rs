//! Prompt in, tokens out, one at a time or, where guesses at them are checked together, several.

use crate::{Cache, Error, Gpt, Result, Runner, Sampling, Wanted, speculate::Speculator};
use formats::tokenizer::DecodeStream;
use std::time::Instant;

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
    /// What it took.
    pub work: Work,
}

/// What a text took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Work {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that an earlier prompt or answer had left in the cache.
    pub reused_tokens: usize,
    /// Seconds until the prompt was read, by a draft too.
    pub prefill_seconds: f64,
    /// Seconds from there to the end, choosing and spelling tokens included.
    pub decode_seconds: f64,
    /// Tokens that were guessed ahead.
    pub proposed: usize,
    /// Those of them that the model chose as well.
    pub accepted: usize,
    /// Steps of the model after the prompt, each over one token and the guesses that follow it.
    pub steps: usize,
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
    Generator::new(gpt).generate(prompt, sampling, limits, listen)
}

/// Continues prompt after prompt, and reads of each only what it does not share with the text before.
pub struct Generator<'g> {
    gpt: &'g Gpt,
    runner: Runner<'g>,
    cache: [Cache; 1],
    speculator: Option<Speculator<'g>>,
    /// Prompt and output of the text at hand.
    seen: Vec<u32>,
    /// The last token and the guesses that follow it.
    fed: Vec<u32>,
}

/// Tokens of an output for which room is made before it begins; a longer one makes room as it comes.
const ROOM: usize = 4096;

impl<'g> Generator<'g> {
    /// A generator that has read nothing yet.
    pub fn new(gpt: &'g Gpt) -> Generator<'g> {
        Generator {
            gpt,
            runner: Runner::new(&gpt.model),
            cache: [Cache::new(&gpt.model)],
            speculator: None,
            seen: Vec::new(),
            fed: Vec::new(),
        }
    }

    /// The same with guesses at the tokens to come, which change the speed and nothing else.
    pub fn with(mut self, speculator: Speculator<'g>) -> Generator<'g> {
        self.speculator = Some(speculator);
        self
    }

    /// Continues a prompt; `listen` gets each piece of text as soon as it is certain and returns whether to go on.
    ///
    /// # Errors
    /// If the prompt is empty, longer than the context, or holds tokens that are not in the vocabulary.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        sampling: &Sampling,
        limits: &Limits,
        listen: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Output> {
        let context = self.gpt.model.spec.context;
        if prompt.is_empty() {
            return Err(Error::Asked(
                "the prompt is empty and the tokenizer adds no BOS; give at least one token".into(),
            ));
        }
        if prompt.len() >= context {
            return Err(Error::Asked(format!(
                "the prompt has {} tokens; the model's context is {context}",
                prompt.len()
            )));
        }
        let written = self.write(prompt, sampling, limits, listen);
        if written.is_err() {
            // What a step that failed left behind is not continued.
            self.cache[0].truncate(0);
        }
        written
    }

    fn write(
        &mut self,
        prompt: &[u32],
        sampling: &Sampling,
        limits: &Limits,
        listen: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Output> {
        let begin = Instant::now();
        let mut work = Work { prompt_tokens: prompt.len(), ..Work::default() };
        let positions = self.gpt.model.spec.context.min(prompt.len() + limits.tokens.min(ROOM));
        work.reused_tokens = self.cache[0].keep_prefix(prompt);
        self.cache[0].reserve(positions);
        if let Some(speculator) = &mut self.speculator {
            speculator.begin(prompt, positions)?;
        }
        self.seen.clear();
        self.seen.extend_from_slice(prompt);
        let logits = self.runner.read(&prompt[work.reused_tokens..], &mut self.cache[0])?;
        work.prefill_seconds = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let mut text = Writing {
            gpt: self.gpt,
            sampling,
            limits,
            prompt: prompt.len(),
            text: Text::new(&limits.stops),
            stream: self.gpt.tokenizer.decode_stream(true),
            listen,
        };
        let mut ended = if limits.tokens == 0 {
            Some(Ended::Tokens)
        } else {
            let first = text.choose(logits.row(0), &self.seen);
            text.take(first, &mut self.seen)?
        };
        while ended.is_none() {
            ended = self.step(&mut text, &mut work)?;
        }
        let (text, ended) = text.finish(ended.unwrap_or(Ended::Tokens))?;
        work.decode_seconds = begin.elapsed().as_secs_f64();
        Ok(Output { ids: self.seen[prompt.len()..].to_vec(), text, ended, work })
    }

    /// Feeds the last token and guesses at what follows, and takes tokens as long as the guesses are what is chosen:
    /// at least one.
    fn step(&mut self, text: &mut Writing<'_>, work: &mut Work) -> Result<Option<Ended>> {
        let held = self.seen.len();
        self.fed.clear();
        self.fed.extend(self.seen.last());
        self.guess(text)?;
        let proposed = self.fed.len() - 1;
        let logits = self.runner.step(&[&self.fed], &mut self.cache, Wanted::All)?;
        let (mut accepted, mut ended) = (0, None);
        for row in 0..self.fed.len() {
            let next = text.choose(logits.row(row), &self.seen);
            ended = text.take(next, &mut self.seen)?;
            let guessed = self.fed.get(row + 1) == Some(&next);
            accepted += usize::from(guessed);
            if ended.is_some() || !guessed {
                break;
            }
        }
        self.cache[0].truncate(held + accepted);
        if let Some(speculator) = &mut self.speculator {
            speculator.learn(proposed, accepted, held + accepted);
        }
        work.steps += 1;
        work.proposed += proposed;
        work.accepted += accepted;
        Ok(ended)
    }

    /// Appends guesses to the token that is fed, no more than could be of use.
    fn guess(&mut self, text: &Writing<'_>) -> Result<()> {
        let Some(speculator) = &mut self.speculator else { return Ok(()) };
        let (spec, length) = (&self.gpt.model.spec, self.seen.len());
        // The step itself gives one token more than there are guesses.
        let left = text.left(&self.seen).min(spec.context - length).saturating_sub(1);
        // One step turns all its keys alike; where each length turns them in its own way, tokens go one by one.
        let alike = |guesses: &usize| !spec.ropes.iter().any(|r| r.changes(length, length + guesses));
        if left == 0 || !alike(&1) {
            return Ok(());
        }
        speculator.propose(&self.seen, left, text.sampling, text.made(&self.seen) as u64, &mut self.fed)?;
        let known = self.fed.iter().take_while(|id| (**id as usize) < spec.vocab).count();
        let guesses = (0..known).rev().find(alike).unwrap_or(0);
        self.fed.truncate(1 + guesses);
        Ok(())
    }
}

/// An output as it is written.
struct Writing<'a> {
    gpt: &'a Gpt,
    sampling: &'a Sampling,
    limits: &'a Limits,
    /// Tokens of the prompt.
    prompt: usize,
    text: Text<'a>,
    stream: DecodeStream<'a>,
    listen: &'a mut dyn FnMut(&str) -> bool,
}

impl Writing<'_> {
    /// Tokens of the output so far.
    fn made(&self, seen: &[u32]) -> usize {
        seen.len() - self.prompt
    }

    /// Tokens that may still come.
    fn left(&self, seen: &[u32]) -> usize {
        self.limits.tokens - self.made(seen)
    }

    fn choose(&self, logits: &[f32], seen: &[u32]) -> u32 {
        self.sampling.choose(logits, seen, self.made(seen) as u64)
    }

    /// Takes the next token; returns why the output ends with it or before it, if it does.
    fn take(&mut self, token: u32, seen: &mut Vec<u32>) -> Result<Option<Ended>> {
        if self.gpt.ends.contains(&token) && !self.limits.ignore_end {
            return Ok(Some(Ended::End));
        }
        seen.push(token);
        if let Some(piece) = self.stream.push(token)? {
            let (show, stopped) = self.text.push(&piece);
            if !show.is_empty() && !(self.listen)(show) {
                return Ok(Some(Ended::Listener));
            }
            if stopped {
                return Ok(Some(Ended::Stop));
            }
        }
        if seen.len() >= self.gpt.model.spec.context {
            return Ok(Some(Ended::Context));
        }
        Ok((self.left(seen) == 0).then_some(Ended::Tokens))
    }

    /// Shows what was held back; returns the whole text and why it ended.
    fn finish(mut self, mut ended: Ended) -> Result<(String, Ended)> {
        if let Some(piece) = self.stream.finish()?.filter(|_| ended != Ended::Stop) {
            let (show, stopped) = self.text.push(&piece);
            if !show.is_empty() {
                (self.listen)(show);
            }
            ended = if stopped { Ended::Stop } else { ended };
        }
        let rest = self.text.finish(ended == Ended::Stop);
        if !rest.is_empty() {
            (self.listen)(rest);
        }
        Ok((self.text.shown, ended))
    }
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
    fn push(&mut self, piece: &str) -> (&str, bool) {
        self.held += piece;
        let first = self.stops.iter().filter(|s| !s.is_empty()).filter_map(|s| self.held.find(s.as_str())).min();
        let (until, stopped) = match first {
            Some(at) => (at, true),
            None => (self.held.len() - self.may_begin_stop(), false),
        };
        (self.show(until), stopped)
    }

    /// Moves so many bytes of what is held to what is shown.
    fn show(&mut self, until: usize) -> &str {
        let from = self.shown.len();
        self.shown.push_str(&self.held[..until]);
        self.held.drain(..until);
        &self.shown[from..]
    }

    /// Length of the longest end of the held text with which a stop text begins.
    fn may_begin_stop(&self) -> usize {
        let ends = self.held.char_indices().map(|(at, _)| &self.held[at..]);
        ends.filter(|end| self.stops.iter().any(|s| s.starts_with(end))).map(str::len).max().unwrap_or(0)
    }

    fn finish(&mut self, stopped: bool) -> &str {
        let until = if stopped { 0 } else { self.held.len() };
        self.show(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_text_is_found_across_pieces_and_never_shown() {
        let stops = vec!["END".to_string()];
        let mut t = Text::new(&stops);
        assert_eq!(t.push("one E"), ("one ", false));
        assert_eq!(t.push("Nx"), ("ENx", false));
        assert_eq!(t.push(" EN"), (" ", false));
        assert_eq!(t.push("D more"), ("", true));
        assert_eq!(t.finish(true), "");
        assert_eq!(t.shown, "one ENx ");
    }
}
