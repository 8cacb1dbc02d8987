//! The student goes on with texts itself, and learns from what the teacher says of that (arXiv 2306.13649): it then learns
//! on what it will meet when it writes.

use crate::{Learner, Result, progress};
use model::{Cache, Runner, Sampling, Tokens, Wanted, uniform};

/// How often, and from where.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Share of the parts of steps.
    pub share: f64,
    /// Start of all random numbers.
    pub seed: u64,
    /// Tokens that end a text.
    pub ends: Vec<u32>,
}

impl Policy {
    /// Of some parts of a step, what the student makes of the beginnings of their sequences.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or the job was interrupted.
    pub fn write(&self, learner: &Learner, parts: &mut [Tokens]) -> Result<()> {
        let step = learner.steps();
        for (i, part) in parts.iter_mut().enumerate() {
            let seed = self.seed ^ step.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(i as u64);
            if uniform(seed ^ 0x006f_776e, 0) < self.share {
                *part = self.go_on(learner, part, seed)?;
            }
        }
        Ok(())
    }

    /// Cuts each sequence somewhere in its second and third quarter and goes on to its length, or to the text's end. Only
    /// what was written counts.
    fn go_on(&self, learner: &Learner, part: &Tokens, seed: u64) -> Result<Tokens> {
        let model = learner.working();
        let mut texts: Vec<Vec<u32>> = Vec::new();
        let mut written = Vec::new();
        for (i, sequence) in part.sequences.iter().enumerate() {
            let cut = (sequence.len() as f64 * (0.25 + 0.5 * uniform(seed, i as u64))) as usize;
            texts.push(sequence[..cut.max(1)].to_vec());
            written.push(cut.max(1));
        }
        let choose = |i: usize| Sampling { temperature: 1.0, seed: seed.wrapping_add(i as u64), ..Sampling::default() };
        let mut runner = Runner::new(model);
        let mut open: Vec<usize> = (0..texts.len()).collect();
        let mut caches: Vec<Cache> = part.sequences.iter().map(|s| Cache::with_room(model, s.len())).collect();
        let mut fed = vec![0; texts.len()];
        let mut step = 1;
        while !open.is_empty() {
            progress::check()?;
            let next: Vec<&[u32]> = open.iter().map(|i| &texts[*i][fed[*i]..]).collect();
            let logits = runner.step(&next, &mut caches, Wanted::Last)?;
            let mut kept = Vec::new();
            let mut still = Vec::new();
            for ((row, i), cache) in open.iter().enumerate().zip(caches) {
                fed[*i] = texts[*i].len();
                let id = choose(*i).choose(logits.row(row), &[], step);
                texts[*i].push(id);
                // The last token is predicted and not read.
                if texts[*i].len() <= part.sequences[*i].len() && !self.ends.contains(&id) {
                    still.push(*i);
                    kept.push(cache);
                }
            }
            (open, caches) = (still, kept);
            step += 1;
        }
        let mut out = Tokens::default();
        for (text, from) in texts.iter().zip(written) {
            out.targets.extend((1..text.len()).map(|at| (at >= from).then_some(text[at])));
            out.sequences.push(text[..text.len() - 1].to_vec());
        }
        Ok(out)
    }
}
