//! The merging rule of SentencePiece BPE as llama.cpp runs it: the oracle that conversions are held to.
//!
//! Every adjacent pair whose join is a token may merge; of all such pairs the one with the highest score goes first,
//! and of equals the leftmost. Characters that no token has become bytes. A linear scan finds the pair, so this is for
//! checking and not for encoding.

use std::collections::HashMap;

/// A vocabulary with scores.
pub(super) struct Merger<'v> {
    /// Id and score by token.
    pub tokens: HashMap<&'v str, (u32, f32)>,
    /// The id of each byte's token.
    pub bytes: Vec<Option<u32>>,
}

impl Merger<'_> {
    /// The ids of a text whose spaces are already `▁`; `None` where a character has neither token nor bytes.
    pub fn encode(&self, text: &str) -> Option<Vec<u32>> {
        let mut bounds: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        bounds.push(text.len());
        while let Some(pair) = self.best(text, &bounds) {
            bounds.remove(pair + 1);
        }
        let mut ids = Vec::new();
        for piece in bounds.windows(2) {
            let piece = &text[piece[0]..piece[1]];
            match self.tokens.get(piece) {
                Some((id, _)) => ids.push(*id),
                None => {
                    for byte in piece.bytes() {
                        ids.push((*self.bytes.get(usize::from(byte))?)?);
                    }
                }
            }
        }
        Some(ids)
    }

    /// The first piece of the pair to merge next.
    fn best(&self, text: &str, bounds: &[usize]) -> Option<usize> {
        let mut best: Option<(usize, f32)> = None;
        for (at, span) in bounds.windows(3).enumerate() {
            if let Some((_, score)) = self.tokens.get(&text[span[0]..span[2]])
                && best.is_none_or(|(_, high)| *score > high)
            {
                best = Some((at, *score));
            }
        }
        best.map(|(at, _)| at)
    }
}
