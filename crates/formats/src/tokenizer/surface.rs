//! What bytes of a text single tokens stand for.

use super::Tokenizer;
use tokenizers::DecoderWrapper;

impl Tokenizer {
    /// The bytes that a token stands for within a text; none of one that stands for no text, as those that begin or end it.
    pub fn bytes_of(&self, id: u32) -> Option<Vec<u8>> {
        if self.bos == Some(id) || self.eos == Some(id) {
            return None;
        }
        let token = self.token_of(id)?;
        if self.library.get_added_vocabulary().is_special_token(&token) {
            return None;
        }
        if self.library.get_decoder().is_some_and(spells_bytes) {
            // A letter that stands for no byte is of an added token, which is spelled as it is.
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
            return Some(bytes.unwrap_or_else(|| token.into_bytes()));
        }
        let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).filter(|t| t.len() == 2);
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => Some(vec![byte]),
            None => Some(token.replace('▁', " ").into_bytes()),
        }
    }
}

/// Are its tokens spelled in letters that each stand for a byte?
fn spells_bytes(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteLevel(_) => true,
        DecoderWrapper::Sequence(steps) => steps.get_decoders().iter().any(spells_bytes),
        _ => false,
    }
}

/// The byte that a letter stands for, as in GPT-2's `bytes_to_unicode`: printable ones for themselves, the others in order
/// from 256 on.
fn byte_of(letter: char) -> Option<u8> {
    let code = u32::from(letter);
    let printable = |code: u32| matches!(code, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(code) {
        return u8::try_from(code).ok();
    }
    let place = code.checked_sub(256)? as usize;
    (0..256u32).filter(|byte| !printable(*byte)).nth(place).and_then(|byte| u8::try_from(byte).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn every_byte_has_a_letter() {
        let mut bytes: Vec<u8> = ByteLevel::alphabet().into_iter().map(|letter| byte_of(letter).unwrap()).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!([byte_of('Ġ'), byte_of('Ċ'), byte_of('a')], [Some(b' '), Some(b'\n'), Some(b'a')]);
        assert_eq!(byte_of('漢'), None);
    }
}
