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

    /// The first `context` tokens, all of which count.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn cut(mut self, context: usize, tokenizer: &Tokenizer) -> Result<Document> {
        self.ids.truncate(context);
        self.learned = None;
        self.bytes = tokenizer.decode(self.ids.get(1..).unwrap_or_default(), true)?.len();
        Ok(self)
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

/// Tokens of a document where the stream has no marks between them.
const UNMARKED: usize = 4096;

/// Reads a file of tokens, whole numbers of two bytes, lowest first: documents, each with the mark that it begins with
/// (BOS, where the tokenizer adds one) or ends with (EOS). A stream without marks is cut into pieces of 4,096 tokens.
///
/// # Errors
/// If it cannot be read, is cut off, or holds a token that is not the tokenizer's.
pub fn read_tokens(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<Document>> {
    let bytes = std::fs::read(path).map_err(formats::Error::io(path, "read it"))?;
    let bad = |reason: String| Error::Data { path: path.into(), reason };
    if bytes.len() < 4 || !bytes.len().is_multiple_of(2) {
        return Err(bad(format!("has {} bytes, not two for every token; it may be cut off", bytes.len())));
    }
    let ids: Vec<u32> = bytes.as_chunks::<2>().0.iter().map(|b| u32::from(u16::from_le_bytes(*b))).collect();
    let vocab = tokenizer.vocab_size();
    if let Some(at) = ids.iter().position(|id| *id as usize >= vocab) {
        return Err(bad(format!(
            "token {at} is {}, and the vocabulary has {vocab}; it is of another tokenizer",
            ids[at]
        )));
    }
    let begins = tokenizer.bos().filter(|bos| tokenizer.adds_bos() && ids.contains(bos));
    let ends = tokenizer.eos().filter(|eos| begins.is_none() && ids.contains(eos));
    let parts: Vec<&[u32]> = match (begins, ends) {
        (Some(bos), _) => ids.chunk_by(|_, next| *next != bos).collect(),
        (None, Some(eos)) => ids.chunk_by(|last, _| *last != eos).collect(),
        // What a piece ends with the next one begins with.
        (None, None) => {
            (0..ids.len() - 1).step_by(UNMARKED).map(|i| &ids[i..ids.len().min(i + UNMARKED + 1)]).collect()
        }
    };
    let document = |ids: &&[u32]| {
        let key: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        Document { percentile: percentile(&key), ids: ids.to_vec(), ..Document::default() }
    };
    Ok(parts.iter().filter(|ids| ids.len() > 1).map(document).collect())
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

/// One stream of documents, in an order that depends on the seed.
pub fn joined(documents: &[Document], seed: u64) -> Document {
    let mut order: Vec<&Document> = documents.iter().collect();
    order.sort_by_key(|d| blake3::hash(&[&seed.to_le_bytes()[..], bytemuck::cast_slice(&d.ids)].concat()).to_hex());
    let ids: Vec<u32> = order.iter().flat_map(|d| d.ids.iter().copied()).collect();
    let marked = documents.iter().any(|d| d.learned.is_some());
    let marks = |d: &&Document| d.learned.clone().unwrap_or_else(|| vec![true; d.ids.len()]);
    let learned = marked.then(|| order.iter().flat_map(marks).collect());
    Document { ids, learned, ..Document::default() }
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
