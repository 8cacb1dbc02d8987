//! Text out of ids as they come, one at a time.

use super::{Tokenizer, error::Result};

/// A character has at most four bytes; with more ids than this waiting, what waits is not going to become one.
const MAX_WAITING: usize = 16;

/// Decodes ids one at a time, holding back bytes until they make a whole character.
///
/// All pieces together are what [`Tokenizer::decode`] gives for all ids.
pub struct DecodeStream<'t> {
    tokenizer: &'t Tokenizer,
    skip_special: bool,
    /// The ids that the next piece's text depends on: those of the last piece, then those that wait.
    ids: Vec<u32>,
    /// How many of `ids` have been given out.
    given: usize,
    /// The text of the given ids.
    prefix: String,
}

impl<'t> DecodeStream<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, skip_special: bool) -> Self {
        DecodeStream { tokenizer, skip_special, ids: Vec::new(), given: 0, prefix: String::new() }
    }

    /// Takes the next id; gives the text that it completes, if any.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        let waiting = self.ids.len() - self.given;
        if text.ends_with('\u{fffd}') && waiting < MAX_WAITING {
            return Ok(None);
        }
        self.give(text)
    }

    /// Gives what still waits, incomplete characters as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<Option<String>> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        self.give(text)
    }

    /// Gives what `text` has beyond the prefix and forgets the ids before the ones just given.
    fn give(&mut self, text: String) -> Result<Option<String>> {
        let fresh = text.get(self.prefix.len()..).unwrap_or("").to_string();
        if fresh.is_empty() {
            return Ok(None);
        }
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        self.prefix = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(Some(fresh))
    }
}
