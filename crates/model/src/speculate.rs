//! Speculative decoding: cheap guesses at the next tokens, which the model checks together in one step.
//!
//! A guess counts as accepted where it is the very token that the model chooses at that place, and the random number
//! of a choice depends on seed and step alone. So the text is that of plain decoding, token for token, drawn tokens
//! included; this is not the rejection scheme of arXiv 2211.17192, which keeps only the distribution. Guesses come
//! from the text itself ([`Speculator::lookup`]) or from a smaller model ([`Speculator::draft`]).

use crate::{Cache, Error, Gpt, Result, Runner, Sampling, Wanted};
use std::ops::RangeInclusive;

/// Guesses the tokens that follow a text, as many as lately proved right.
pub struct Speculator<'g> {
    source: Source<'g>,
    pace: Pace,
}

enum Source<'g> {
    Lookup(Lookup),
    Draft(Box<Draft<'g>>),
}

impl<'g> Speculator<'g> {
    /// Proposes what followed the last tokens where they stood before; at most `most` tokens a step, at least one.
    pub fn lookup(most: usize) -> Speculator<'g> {
        Speculator { source: Source::Lookup(Lookup::default()), pace: Pace::new(most) }
    }

    /// Proposes what the model `draft` would say, at most `most` tokens a step, at least one.
    ///
    /// # Errors
    /// If its tokens are not those of `of`, the model that checks them.
    pub fn draft(draft: &'g Gpt, of: &Gpt, most: usize) -> Result<Speculator<'g>> {
        same_tokens(draft, of)?;
        let draft = Draft { gpt: draft, runner: Runner::new(&draft.model), cache: [Cache::new(&draft.model)] };
        Ok(Speculator { source: Source::Draft(Box::new(draft)), pace: Pace::new(most) })
    }

    /// Takes in a new prompt, which may continue the text before; `positions` is how long the text may become.
    pub(crate) fn begin(&mut self, prompt: &[u32], positions: usize) -> Result<()> {
        self.pace = Pace::new(self.pace.most);
        match &mut self.source {
            Source::Lookup(lookup) => {
                lookup.begin(prompt, positions);
                Ok(())
            }
            Source::Draft(draft) => draft.begin(prompt, positions),
        }
    }

    /// Appends to `out` up to `room` tokens that may follow `seen`; `step` numbers the choice of the first.
    pub(crate) fn propose(
        &mut self,
        seen: &[u32],
        room: usize,
        sampling: &Sampling,
        step: u64,
        out: &mut Vec<u32>,
    ) -> Result<()> {
        let most = self.pace.next().min(room);
        match &mut self.source {
            Source::Lookup(lookup) => {
                lookup.note(seen);
                lookup.propose(seen, most, out);
                Ok(())
            }
            Source::Draft(draft) => draft.propose(seen, most, sampling, step, out),
        }
    }

    /// Hears that of so many proposals the first `accepted` were right, so that `held` tokens of the text stand.
    pub(crate) fn learn(&mut self, proposed: usize, accepted: usize, held: usize) {
        self.pace.learn(proposed, accepted);
        if let Source::Draft(draft) = &mut self.source {
            draft.cache[0].truncate(held);
        }
    }
}

/// How many tokens to propose: twice as many after a step that accepted all, fewer after one that did not, and none
/// for a while, longer each time, where step after step accepts nothing.
#[derive(Clone, Debug)]
struct Pace {
    most: usize,
    length: usize,
    /// Steps in a row that accepted nothing.
    failures: u32,
    /// Steps that go by without a proposal.
    pause: usize,
}

impl Pace {
    fn new(most: usize) -> Pace {
        let most = most.max(1);
        Pace { most, length: most.min(4), failures: 0, pause: 0 }
    }

    fn next(&mut self) -> usize {
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        self.length
    }

    fn learn(&mut self, proposed: usize, accepted: usize) {
        if proposed == 0 {
            return;
        }
        self.length = if accepted == proposed {
            self.length.saturating_mul(2).min(self.most)
        } else {
            (accepted + 1).max(self.length / 2)
        };
        if accepted > 0 {
            self.failures = 0;
            return;
        }
        self.failures += 1;
        if self.failures > 2 {
            self.pause = 1 << self.failures.min(6);
        }
    }
}

/// How many last tokens have to stand elsewhere in the text; more are tried first.
const GRAMS: RangeInclusive<usize> = 2..=4;

/// Where each run of tokens in a text was last followed by another token.
///
/// A table of fixed size that forgets: runs that meet in a slot replace each other, and what a slot says is held
/// against the text before it is believed. So a token costs a few writes, whatever the length of the text.
#[derive(Default)]
struct Lookup {
    /// Positions that follow a run; 0, which follows none, is empty.
    slots: Vec<u32>,
    /// Tokens of the text that are entered.
    noted: usize,
}

impl Lookup {
    fn begin(&mut self, prompt: &[u32], positions: usize) {
        // Three runs end at each position; the table stays at most half full up to a third of a million tokens.
        let slots = positions.saturating_mul(2 * GRAMS.count()).clamp(1 << 10, 1 << 21).next_power_of_two();
        self.slots.clear();
        self.slots.resize(slots, 0);
        self.noted = 0;
        self.note(prompt);
    }

    /// Enters the tokens that came since.
    fn note(&mut self, seen: &[u32]) {
        for at in self.noted..seen.len() {
            let Ok(position) = u32::try_from(at) else { return };
            for n in GRAMS.take_while(|n| *n <= at) {
                let slot = self.slot(&seen[at - n..at]);
                self.slots[slot] = position;
            }
        }
        self.noted = seen.len();
    }

    fn slot(&self, run: &[u32]) -> usize {
        let mix = |h: u64, token: &u32| (h.rotate_left(23) ^ u64::from(*token)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let hash = run.iter().fold(run.len() as u64, mix);
        (hash >> (64 - self.slots.len().ilog2())) as usize
    }

    /// The position after the last earlier occurrence of as many last tokens as there is one for.
    fn follower(&self, seen: &[u32]) -> Option<usize> {
        GRAMS.rev().filter(|n| *n < seen.len()).find_map(|n| {
            let run = &seen[seen.len() - n..];
            let at = self.slots[self.slot(run)] as usize;
            (n <= at && at < seen.len() && &seen[at - n..at] == run).then_some(at)
        })
    }

    fn propose(&self, seen: &[u32], most: usize, out: &mut Vec<u32>) {
        if most == 0 {
            return;
        }
        let Some(from) = self.follower(seen) else { return };
        // Past the end of the text the loop that the match implies goes on.
        out.extend((0..most).map(|i| seen[from + i % (seen.len() - from)]));
    }
}

/// A smaller model that goes along with the text.
struct Draft<'g> {
    gpt: &'g Gpt,
    runner: Runner<'g>,
    cache: [Cache; 1],
}

impl Draft<'_> {
    fn begin(&mut self, prompt: &[u32], positions: usize) -> Result<()> {
        let kept = self.cache[0].keep_prefix(prompt);
        if !self.can_read(prompt) {
            return Ok(());
        }
        self.cache[0].reserve(positions.min(self.gpt.model.spec.context));
        self.runner.read(&prompt[kept..], &mut self.cache[0])?;
        Ok(())
    }

    /// Is a text short enough for this model, and spelled in its vocabulary? What the cache holds is.
    fn can_read(&self, text: &[u32]) -> bool {
        let spec = &self.gpt.model.spec;
        text.len() < spec.context && text.iter().skip(self.cache[0].len()).all(|id| (*id as usize) < spec.vocab)
    }

    /// The draft draws with the random numbers of the model that checks it: two models that agree on a distribution
    /// then agree on the token.
    fn propose(&mut self, seen: &[u32], most: usize, sampling: &Sampling, step: u64, out: &mut Vec<u32>) -> Result<()> {
        self.cache[0].truncate(seen.len().saturating_sub(1));
        if most == 0 || !self.can_read(seen) {
            return Ok(());
        }
        let most = most.min(self.gpt.model.spec.context - seen.len());
        let held = self.cache[0].len();
        let mut logits = self.runner.read(&seen[held..], &mut self.cache[0])?;
        for i in 0..most {
            let next = sampling.choose(logits.row(0), self.cache[0].tokens(), step + i as u64);
            out.push(next);
            if i + 1 < most {
                logits = self.runner.step(&[[next]], &mut self.cache, Wanted::Last)?;
            }
        }
        Ok(())
    }
}

/// A draft's proposals mean something to another model only where a number means the same token to both. Models may
/// have more rows than tokens (padding), and not equally many.
fn same_tokens(draft: &Gpt, of: &Gpt) -> Result<()> {
    let sizes = [draft.tokenizer.vocab_size(), of.tokenizer.vocab_size()];
    let differs = if sizes[0] != sizes[1] {
        format!("{} tokens and {}", sizes[0], sizes[1])
    } else if draft.tokenizer.json() == of.tokenizer.json() {
        return Ok(());
    } else {
        let spelled = |gpt: &Gpt, id: u32| gpt.tokenizer.token_of(id).unwrap_or_default();
        let ids = 0..u32::try_from(sizes[0]).unwrap_or(u32::MAX);
        let Some(id) = ids.into_iter().find(|id| draft.tokenizer.token_of(*id) != of.tokenizer.token_of(*id)) else {
            return Ok(());
        };
        format!("token {id} is {:?} in one and {:?} in the other", spelled(draft, id), spelled(of, id))
    };
    Err(Error::Asked(format!(
        "{} cannot draft for {}: their vocabularies differ ({differs}). Give a draft with the same tokenizer, or use lookup",
        draft.path.display(),
        of.path.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn followers(text: &[u32], most: usize) -> Vec<u32> {
        let mut lookup = Lookup::default();
        lookup.begin(&text[..text.len() / 2], text.len());
        lookup.note(text);
        let mut out = Vec::new();
        lookup.propose(text, most, &mut out);
        out
    }

    #[test]
    fn the_latest_and_longest_earlier_occurrence_is_followed() {
        // The pair 7, 8 stands three times; what followed the latest is proposed.
        assert_eq!(followers(&[7, 8, 1, 7, 8, 2, 9, 7, 8], 3), [2, 9, 7]);
        // Three tokens that match go before two that match later.
        assert_eq!(followers(&[5, 7, 8, 1, 6, 7, 8, 2, 5, 7, 8], 1), [1]);
        assert_eq!(followers(&[1, 2, 3, 4], 4), Vec::<u32>::new());
    }

    #[test]
    fn a_loop_is_continued_beyond_the_end_of_the_text() {
        assert_eq!(followers(&[9, 1, 2, 1, 2, 1, 2], 5), [1, 2, 1, 2, 1]);
        assert_eq!(followers(&[3, 3, 3], 4), [3; 4]);
    }

    #[test]
    fn every_position_of_a_long_text_is_found_or_forgotten_but_never_wrong() {
        let text: Vec<u32> = (0..50_000u32).map(|i| i.wrapping_mul(i) % 97).collect();
        let mut lookup = Lookup::default();
        lookup.begin(&text[..4], 16);
        let mut found = 0;
        for end in 5..text.len() {
            lookup.note(&text[..end]);
            if let Some(at) = lookup.follower(&text[..end]) {
                assert!(at < end && text[at - 2..at] == text[end - 2..end]);
                found += 1;
            }
        }
        assert!(found > 40_000, "{found}");
    }

    #[test]
    fn failures_make_it_wait_and_success_makes_it_bold() {
        let mut pace = Pace::new(8);
        assert_eq!(pace.next(), 4);
        pace.learn(4, 4);
        assert_eq!(pace.next(), 8);
        pace.learn(8, 2);
        assert_eq!(pace.next(), 4);
        let (mut steps, mut proposed) = (0, 0);
        while steps < 1000 {
            let n = pace.next();
            pace.learn(n, 0);
            proposed += n;
            steps += 1;
        }
        assert!(proposed < 40, "{proposed} useless proposals in {steps} steps");
        assert_eq!(Pace::new(0).next(), 1);
    }
}
