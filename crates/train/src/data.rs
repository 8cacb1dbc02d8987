//! Text becomes documents of tokens.

use crate::{Error, Result};
use formats::tokenizer::Tokenizer;
use std::path::Path;

/// What separates documents unless the user says otherwise.
pub const SEPARATOR: &str = "<|endoftext|>";

/// One document as the model reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Document {
    /// Its tokens, BOS first where the tokenizer adds one, cut to the context.
    pub ids: Vec<u32>,
    /// Bytes of text that the tokens after the first stand for.
    pub bytes: usize,
    /// Which part of a split it belongs to, from 0 to 99, by the hash of its text.
    pub percentile: u8,
    /// Which of its tokens are to be said by the model, where that is not all of them: the answers of a conversation.
    pub learned: Option<Vec<bool>>,
}

impl Document {
    /// Tokens that are predicted: all but the first.
    pub fn predicted(&self) -> usize {
        self.ids.len().saturating_sub(1)
    }
}

/// How text is cut.
#[derive(Clone, Debug)]
pub struct Cutting {
    /// What separates documents.
    pub separator: String,
    /// Longest document in tokens.
    pub context: usize,
    /// One stream cut into full blocks, as the papers measure.
    pub blocks: bool,
}

/// Reads a text file.
///
/// # Errors
/// If it cannot be read, is not UTF-8, or is empty.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(formats::Error::io(path, "read it"))?;
    formats::check_kind(path, &bytes[..bytes.len().min(64)], "a text file")?;
    let bad = |reason: String| Error::Data { path: path.into(), reason };
    let text = String::from_utf8(bytes)
        .map_err(|e| bad(format!("byte {} is not UTF-8; convert it to UTF-8", e.utf8_error().valid_up_to())))?;
    if text.trim().is_empty() { Err(bad("is empty; give a text of some thousand words".into())) } else { Ok(text) }
}

/// Reads a file of tokens, whole numbers of two bytes, lowest first: one stream, cut into pieces of `context`
/// predictions, each of which begins with what the last one ended with.
///
/// # Errors
/// If it cannot be read, is cut off, or holds a token that is not below `vocab`.
pub fn read_tokens(path: &Path, vocab: usize, context: usize) -> Result<Vec<Document>> {
    let bytes = std::fs::read(path).map_err(formats::Error::io(path, "read it"))?;
    let bad = |reason: String| Error::Data { path: path.into(), reason };
    if bytes.len() < 4 || !bytes.len().is_multiple_of(2) {
        return Err(bad(format!("has {} bytes, not two for every token; it may be cut off", bytes.len())));
    }
    let ids: Vec<u32> = bytes.as_chunks::<2>().0.iter().map(|b| u32::from(u16::from_le_bytes(*b))).collect();
    if let Some(at) = ids.iter().position(|id| *id as usize >= vocab) {
        return Err(bad(format!(
            "token {at} is {}, and the vocabulary has {vocab}; it is of another tokenizer",
            ids[at]
        )));
    }
    let starts = (0..ids.len() - 1).step_by(context.max(1));
    let pieces = starts.map(|start| ids[start..ids.len().min(start + context.max(1) + 1)].to_vec());
    Ok(pieces
        .map(|ids| {
            let key: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            Document { percentile: percentile(&key), ids, ..Document::default() }
        })
        .collect())
}

/// Cuts a text into documents: between separators, stripped, each cut to the context; a text without
/// separators into consecutive pieces of the context.
///
/// # Errors
/// If the tokenizer fails.
pub fn documents(text: &str, tokenizer: &Tokenizer, cutting: &Cutting) -> Result<Vec<Document>> {
    let parts: Vec<&str> = text.split(cutting.separator.as_str()).map(str::trim).filter(|t| !t.is_empty()).collect();
    if cutting.blocks || parts.len() < 2 {
        return pieces(&parts, tokenizer, cutting);
    }
    let document = |text: &&str| -> Result<Option<Document>> {
        let mut ids = tokenizer.encode(text, true)?;
        ids.truncate(cutting.context);
        finish(ids, text.as_bytes(), tokenizer)
    };
    parts.iter().filter_map(|t| document(t).transpose()).collect()
}

/// One stream of tokens in pieces of the context; the papers' protocol drops the last, short one.
fn pieces(parts: &[&str], tokenizer: &Tokenizer, cutting: &Cutting) -> Result<Vec<Document>> {
    let mut stream = Vec::new();
    for part in parts {
        // Long texts are encoded line by line: the tokenizer's memory grows with the text that it gets.
        let mut rest = *part;
        while !rest.is_empty() {
            let cut = rest.char_indices().map(|(i, _)| i).find(|i| *i >= 1 << 16);
            let cut = cut.and_then(|c| rest[c..].find('\n').map(|n| c + n)).unwrap_or(rest.len());
            let (now, later) = rest.split_at(cut);
            stream.extend(tokenizer.encode(now, false)?);
            rest = later;
        }
    }
    let bos: Vec<u32> = tokenizer.bos().filter(|_| tokenizer.adds_bos() && !cutting.blocks).into_iter().collect();
    let size = cutting.context.saturating_sub(bos.len()).max(1);
    let mut out = Vec::new();
    for piece in stream.chunks(size) {
        if cutting.blocks && piece.len() < size {
            break;
        }
        let ids = [&bos[..], piece].concat();
        let key: Vec<u8> = piece.iter().flat_map(|id| id.to_le_bytes()).collect();
        out.extend(finish(ids, &key, tokenizer)?);
    }
    Ok(out)
}

fn finish(ids: Vec<u32>, key: &[u8], tokenizer: &Tokenizer) -> Result<Option<Document>> {
    if ids.len() < 2 {
        return Ok(None);
    }
    let bytes = tokenizer.decode(&ids[1..], true)?.len();
    Ok(Some(Document { ids, bytes, percentile: percentile(key), learned: None }))
}

/// Which hundredth of all documents one belongs to, by its hash.
pub(crate) fn percentile(key: &[u8]) -> u8 {
    let hash = blake3::hash(key);
    let [a, b, c, d, ..] = *hash.as_bytes();
    (u32::from_le_bytes([a, b, c, d]) % 100) as u8
}

impl AsRef<[u32]> for Document {
    fn as_ref(&self) -> &[u32] {
        &self.ids
    }
}
