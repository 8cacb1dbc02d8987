//! Keys and values of a text in every block, so that its next token costs one token.

use crate::{Model, Spec};
use tensor::ops::Memory;

/// Keys and values of one sequence in every block.
#[derive(Clone, Debug)]
pub struct Cache {
    pub(crate) blocks: Vec<Memory>,
    /// The tokens held.
    pub(crate) tokens: Vec<u32>,
    /// The length of the sequence when its keys were last turned.
    turned_for: usize,
    /// Positions for which there is room.
    room: usize,
}

impl Cache {
    /// An empty cache for `model`, in the format that it asks for.
    pub fn new(model: &Model) -> Cache {
        let memory = |b: &crate::BlockSpec| Memory::new(model.key_value, b.kv_heads, b.head_dim);
        Cache { blocks: model.spec.blocks.iter().map(memory).collect(), tokens: Vec::new(), turned_for: 0, room: 0 }
    }

    /// The same with room for so many positions, so that none is made while they come.
    pub fn with_room(model: &Model, positions: usize) -> Cache {
        let mut cache = Cache::new(model);
        cache.reserve(positions);
        cache
    }

    /// Makes room for so many positions in all.
    pub fn reserve(&mut self, positions: usize) {
        Memory::reserve(&mut self.blocks, positions);
        self.room = self.room.max(positions);
        self.tokens.reserve(positions.saturating_sub(self.tokens.len()));
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Does it hold nothing?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tokens held.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Forgets every position from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.blocks.iter_mut().for_each(|m| m.truncate(len));
        self.tokens.truncate(len);
    }

    /// Keeps what it shares with the beginning of `prompt` and forgets the rest; returns how many tokens of the
    /// prompt need not be fed again, which is never all of them: the last one's logits are wanted.
    pub fn keep_prefix(&mut self, prompt: &[u32]) -> usize {
        let shared = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let keep = shared.min(prompt.len().saturating_sub(1));
        self.truncate(keep);
        keep
    }

    /// Takes in `new` tokens; returns how many of its last tokens have to run, which is all of them where longer
    /// sequences turn their keys otherwise (dynamic scaling, LongRoPE).
    pub(crate) fn feed(&mut self, spec: &Spec, new: &[u32]) -> usize {
        let length = self.len() + new.len();
        let anew = !self.is_empty() && spec.ropes.iter().any(|r| r.changes(self.turned_for, length));
        if anew {
            self.blocks.iter_mut().for_each(|m| m.truncate(0));
        }
        self.turned_for = length;
        if length > self.room {
            // All blocks grow at once, and so much that growing stays rare.
            self.reserve(length.max(self.room * 3 / 2));
        }
        self.tokens.extend_from_slice(new);
        if anew { length } else { new.len() }
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        self.blocks.iter().map(Memory::size_bytes).sum()
    }
}
