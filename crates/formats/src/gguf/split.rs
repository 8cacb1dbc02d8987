//! A model over several files: which there are, and that they belong together.

use super::{File, Value};
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// The most parts that a split file's name can count.
const MOST_PARTS: u32 = 99_999;

/// The parts of a file: itself, or all of a split one.
pub fn parts(path: &Path) -> Result<Vec<PathBuf>> {
    let Some((stem, of)) = path.file_name().and_then(|n| n.to_str()).and_then(split_name) else {
        return Ok(vec![path.into()]);
    };
    let mut all = Vec::new();
    for i in 1..=of {
        let part = path.with_file_name(format!("{stem}-{i:05}-of-{of:05}.gguf"));
        if !part.is_file() {
            let reason = format!("says that there are {of} parts; {} is missing: fetch it too", part.display());
            return Err(Error::field(path, "file name", reason));
        }
        all.push(part);
    }
    Ok(all)
}

/// `stem-00001-of-00003.gguf`.
fn split_name(name: &str) -> Option<(&str, u32)> {
    let rest = name.strip_suffix(".gguf")?;
    let (rest, of) = rest.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let parse = |s: &str| {
        if s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit()) { s.parse().ok() } else { None }
    };
    let (of, number): (u32, u32) = (parse(of)?, parse(number)?);
    ((1..=of).contains(&number) && of <= MOST_PARTS).then_some((stem, of))
}

/// Checks that a file is the part that its name says.
pub fn check(path: &Path, metadata: &[(String, Value)], part: usize, of: usize) -> Result<()> {
    let number = |key: &str| -> Result<Option<u64>> {
        let Some((_, value)) = metadata.iter().find(|(k, _)| k == key) else {
            return Ok(None);
        };
        value.as_u64().map(Some).ok_or_else(|| Error::field(path, key, "must be a whole number from 0 on"))
    };
    if let Some(count) = number("split.count")?
        && count.max(1) != of as u64
    {
        let reason = format!("is {count}; its name must end in -00001-of-{count:05}.gguf, with all parts beside it");
        return Err(Error::field(path, "split.count", if of == 1 { reason } else { format!("is {count}, not {of}") }));
    }
    if let Some(no) = number("split.no")?
        && no != part as u64
    {
        return Err(Error::field(path, "split.no", format!("is {no}, not {part}: the file has another part's name")));
    }
    Ok(())
}

/// Checks that the parts hold as many tensors as the first announces.
pub fn check_total(file: &File) -> Result<()> {
    match file.count("split.tensors.count")? {
        Some(total) if total != file.tensors().len() as u64 => {
            let reason = format!("is {total}; the parts hold {}: fetch them again", file.tensors().len());
            Err(Error::field(file.path(), "split.tensors.count", reason))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_parts_are_split() {
        assert_eq!(split_name("a-b-00002-of-00003.gguf"), Some(("a-b", 3)));
        for name in
            ["a.gguf", "a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-1-of-3.gguf", "a-+0001-of-+0003.gguf"]
        {
            assert_eq!(split_name(name), None, "{name}");
        }
    }
}
