//! Gradients of the parts of a batch are summed in a binary tree that depends on the number of parts alone; ranks own
//! subtrees of it, so their number changes no byte.

use crate::{
    Result,
    ranks::{Ranks, owner},
    wire::{Message, Wire},
};
use model::{Bucket, Parameters};
use tensor::ops;

/// What a rank does next. Sums lie on a stack, the newest on top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Do {
    /// Puts the gradient of a part on top.
    Learn(usize),
    /// Adds the top to what lies below it.
    Add,
    /// Adds another rank's sum to the top.
    Receive { from: usize, tag: usize },
    /// Gives the top to another rank.
    Send { to: usize, tag: usize },
}

impl Do {
    /// Is it done for the whole model before anything else, but for what follows up to the next such?
    pub fn begins(self) -> bool {
        matches!(self, Do::Learn(_) | Do::Receive { .. })
    }
}

/// What a rank has to do for `parts` parts; the sum of all lies on rank 0's stack then.
///
/// A sum belongs to the rank whose the first of its parts is. The left half of a sum holds the largest power of two of
/// parts that leaves something to the right one.
pub fn plan(parts: usize, rank: usize, size: usize) -> Vec<Do> {
    let mut out = Vec::new();
    if parts > 0 {
        visit(0..parts, &mut out, &|part| owner(part, parts, size), rank);
    }
    out
}

fn visit(node: std::ops::Range<usize>, out: &mut Vec<Do>, owner: &dyn Fn(usize) -> usize, rank: usize) {
    if node.len() == 1 {
        if owner(node.start) == rank {
            out.push(Do::Learn(node.start));
        }
        return;
    }
    let middle = node.start + (1 << (node.len() - 1).ilog2());
    visit(node.start..middle, out, owner, rank);
    visit(middle..node.end, out, owner, rank);
    let (left, right) = (owner(node.start), owner(middle));
    // No two right halves begin at the same part.
    let tag = middle;
    match (left == rank, right == rank) {
        (true, true) => out.push(Do::Add),
        (true, false) => out.push(Do::Receive { from: right, tag }),
        (false, true) => out.push(Do::Send { to: left, tag }),
        (false, false) => {}
    }
}

/// Sums that lie on a rank.
pub struct Sums {
    wire: Wire,
    stack: Vec<Parameters>,
    spare: Vec<Parameters>,
}

impl Sums {
    /// None as yet; numbers of them travel as `wire` says.
    pub fn new(wire: Wire) -> Sums {
        Sums { wire, stack: Vec::new(), spare: Vec::new() }
    }

    /// Memory for a sum; what is in it is of no matter.
    pub fn take(&mut self, like: &Parameters) -> Parameters {
        self.spare.pop().unwrap_or_else(|| like.zeros())
    }

    /// Gives it back.
    pub fn give(&mut self, sum: Parameters) {
        self.spare.push(sum);
    }

    /// Does to the numbers of one bucket what follows a gradient that lies on top, though not yet on the stack.
    ///
    /// # Errors
    /// If the engine is gone.
    pub fn follow(&mut self, top: &mut Parameters, then: &[Do], bucket: Bucket, ranks: &dyn Ranks) -> Result<()> {
        let (mut top, mut below) = (top, &mut self.stack[..]);
        for next in then {
            match *next {
                Do::Learn(_) => {}
                Do::Receive { from, tag } => self.wire.receive(top, bucket, (from, tag), ranks)?,
                Do::Add => {
                    let Some((sum, rest)) = std::mem::take(&mut below).split_last_mut() else { break };
                    self.wire.add(sum, top, bucket);
                    (top, below) = (sum, rest);
                }
                Do::Send { to, tag } => {
                    self.wire.send(top, bucket, (to, tag), ranks)?;
                    let Some((sum, rest)) = std::mem::take(&mut below).split_last_mut() else { break };
                    (top, below) = (sum, rest);
                }
            }
        }
        Ok(())
    }

    /// Puts a gradient on the stack and takes off what was added or sent.
    pub fn settle(&mut self, top: Parameters, then: &[Do]) {
        self.stack.push(top);
        for _ in then.iter().filter(|next| matches!(next, Do::Add | Do::Send { .. })) {
            self.spare.extend(self.stack.pop());
        }
    }

    /// The newest sum.
    pub fn pop(&mut self) -> Option<Parameters> {
        self.stack.pop()
    }

    /// Forgets the sums of a step that failed.
    pub fn clear(&mut self) {
        self.spare.append(&mut self.stack);
    }
}

impl Wire {
    /// The sum of all parts, from rank 0 to every rank.
    ///
    /// # Errors
    /// If the engine is gone.
    pub fn spread(self, sum: &mut Parameters, buckets: impl Iterator<Item = Bucket>, ranks: &dyn Ranks) -> Result<()> {
        if ranks.size() == 1 {
            sum.slices_mut().for_each(|slice| self.round(slice));
            return Ok(());
        }
        for bucket in buckets {
            let mut message = Message::new(self);
            let mut places: Vec<&mut [f32]> = Vec::new();
            for chunk in sum.bucket_mut(bucket).flat_map(|slice| slice.chunks_mut(Message::LONGEST)) {
                if !message.has_room(chunk.len()) {
                    self.give_back(&mut message, &mut places, ranks)?;
                }
                message.put(chunk);
                places.push(chunk);
            }
            self.give_back(&mut message, &mut places, ranks)?;
        }
        Ok(())
    }

    fn give_back(self, message: &mut Message, places: &mut Vec<&mut [f32]>, ranks: &dyn Ranks) -> Result<()> {
        let mut came = Message::of(self, ranks.broadcast(0, message.take())?);
        for place in places.drain(..) {
            place.copy_from_slice(came.next(place.len())?);
        }
        Ok(())
    }

    fn add(self, to: &mut Parameters, from: &mut Parameters, bucket: Bucket) {
        for (to, from) in to.bucket_mut(bucket).zip(from.bucket_mut(bucket)) {
            self.round(from);
            ops::add_slices(to, from);
        }
    }

    fn send(self, sum: &Parameters, bucket: Bucket, (to, tag): (usize, usize), ranks: &dyn Ranks) -> Result<()> {
        let mut message = Message::new(self);
        for chunk in sum.bucket(bucket).flat_map(|slice| slice.chunks(Message::LONGEST)) {
            if !message.has_room(chunk.len()) {
                ranks.send(to, tag, message.take())?;
            }
            message.put(chunk);
        }
        ranks.send(to, tag, message.take())
    }

    fn receive(
        self,
        sum: &mut Parameters,
        bucket: Bucket,
        (from, tag): (usize, usize),
        ranks: &dyn Ranks,
    ) -> Result<()> {
        let mut message = Message::of(self, ranks.receive(from, tag)?);
        for chunk in sum.bucket_mut(bucket).flat_map(|slice| slice.chunks_mut(Message::LONGEST)) {
            if message.is_read() {
                message = Message::of(self, ranks.receive(from, tag)?);
            }
            ops::add_slices(chunk, message.next(chunk.len())?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, Learner, Precision, Result, Rule, Stepped, ranks};
    use model::{Likelihood, Model, Tokens, load};
    use std::path::Path;

    /// The sum of all parts as a formula, from what ranks do.
    fn formula(parts: usize, size: usize) -> String {
        let sums = ranks::threads::run(size, |ranks| {
            let mut stack: Vec<String> = Vec::new();
            for next in plan(parts, ranks.rank(), size) {
                match next {
                    Do::Learn(part) => stack.push(part.to_string()),
                    Do::Add => {
                        let (right, left) = (stack.pop().unwrap(), stack.pop().unwrap());
                        stack.push(format!("({left}+{right})"));
                    }
                    Do::Receive { from, tag } => {
                        let text = String::from_utf8(ranks.receive(from, tag).unwrap()).unwrap();
                        let left = stack.pop().unwrap();
                        stack.push(format!("({left}+{text})"));
                    }
                    Do::Send { to, tag } => {
                        ranks.send(to, tag, stack.pop().unwrap().into_bytes()).unwrap();
                    }
                }
            }
            assert_eq!(stack.len(), usize::from(ranks.rank() == 0));
            stack.pop()
        });
        sums.into_iter().flatten().next().unwrap()
    }

    #[test]
    fn the_tree_depends_on_the_number_of_parts_alone() {
        assert_eq!(formula(1, 1), "0");
        assert_eq!(formula(5, 1), "(((0+1)+(2+3))+4)");
        assert_eq!(formula(7, 1), "(((0+1)+(2+3))+((4+5)+6))");
        for parts in 1..12 {
            let alone = formula(parts, 1);
            (2..8).for_each(|size| assert_eq!(formula(parts, size), alone, "{parts} parts, {size} ranks"));
        }
    }

    fn golden(name: &str) -> Model {
        load::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)).unwrap().model
    }

    fn part(seed: u64) -> Tokens {
        let ids: Vec<u32> = (0..13).map(|i| (model::uniform(seed, i) * 64.0) as u32).collect();
        Tokens {
            sequences: vec![ids[..12].to_vec()],
            targets: ids[1..].iter().map(|id| Some(*id)).collect(),
            ..Tokens::default()
        }
    }

    /// Two steps and a validation on each of the ranks.
    fn learn(
        model: &Model,
        parts: &[Tokens],
        size: usize,
        precision: Precision,
    ) -> Vec<Result<(f64, f64, f64, Parameters)>> {
        ranks::threads::run(size, |ranks| {
            let mut learner = Learner::new(model, precision, Rule::default())?.among(ranks.clone());
            let mut step = || {
                learner.step(parts, &mut Likelihood, 1e-2)?;
                let Stepped { loss, norm, .. } = learner.step(parts, &mut Likelihood, 1e-2)?;
                Ok((loss, norm, learner.loss(parts)?, learner.values().clone()))
            };
            let done = step();
            if done.as_ref().is_err_and(|e| !matches!(e, Error::Elsewhere)) {
                ranks::fail(&*ranks)?;
            }
            done
        })
    }

    #[test]
    fn any_number_of_ranks_learns_the_same() {
        // A tied and an untied head, learned positions, biases.
        let cases = [
            ("llama-gqa-tied", &[1, 3, 6][..], Precision::F32),
            ("gpt2", &[5], Precision::F32),
            ("llama-mha", &[2], Precision::F32),
            ("llama-mha", &[1, 5], Precision::Fp16),
        ];
        for (name, counts, precision) in cases {
            let model = golden(name);
            for count in counts {
                let parts: Vec<Tokens> = (0..*count).map(part).collect();
                let alone = learn(&model, &parts, 1, precision).pop().unwrap().unwrap();
                for size in [2, 3, 4] {
                    for (rank, done) in learn(&model, &parts, size, precision).into_iter().enumerate() {
                        assert!(done.unwrap() == alone, "{name}: {count} parts, rank {rank} of {size}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_part_that_fails_ends_every_rank() {
        let model = golden("llama-mha");
        for bad in 0..4 {
            let mut parts: Vec<Tokens> = (0..4).map(part).collect();
            parts[bad].sequences[0][3] = u32::MAX;
            let said = learn(&model, &parts, 3, Precision::F32);
            for (rank, said) in said.into_iter().enumerate() {
                let error = said.unwrap_err();
                assert_eq!(matches!(error, Error::Elsewhere), rank != owner(bad, 4, 3), "{error}");
            }
        }
    }
}
