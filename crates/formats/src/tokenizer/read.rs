//! From a tokenizer's file to its text and its JSON, within a size limit.

use super::error::{Error, Result};
use serde_json::Value;
use std::{
    fs::File,
    io::{ErrorKind, Read},
    path::Path,
};

/// The largest tokenizer file that is read; the largest public one has about 35 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// A file's text, or `None` where there is no such file.
pub(super) fn text(path: &Path) -> Result<Option<String>> {
    let io = |e| Error::from(crate::Error::io(path, "read it")(e));
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io(e)),
    };
    let meta = file.metadata().map_err(io)?;
    if !meta.is_file() {
        return Err(crate::Error::malformed(path, 0, "the path", "is not a regular file").into());
    }
    if meta.len() > MAX_FILE_BYTES {
        return Err(Error::TooLarge { path: path.into(), size: meta.len(), limit: MAX_FILE_BYTES });
    }
    // A file that grows while it is read must not grow the buffer without end.
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(io)?;
    String::from_utf8(bytes).map(Some).map_err(|e| {
        let at = e.utf8_error().valid_up_to() as u64;
        crate::Error::malformed(path, at, "the text", "is not UTF-8").into()
    })
}

/// A file's text and JSON, or `None` where there is no such file.
pub(super) fn json(path: &Path) -> Result<Option<(String, Value)>> {
    let Some(text) = text(path)? else {
        return Ok(None);
    };
    let value = crate::json::parse(path, text.as_bytes())?;
    Ok(Some((text, value)))
}
