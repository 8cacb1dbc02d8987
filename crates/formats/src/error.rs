//! What can be wrong with a file, in words that name the file, the place, the field and the remedy.

use std::path::{Path, PathBuf};

/// The longest piece of a file that a message quotes, in characters.
const LONGEST_QUOTE: usize = 300;

/// Why a file cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system says no.
    #[error("{path}: cannot {doing}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The disk has no room; the old file is left as it was.
    #[error("{path}: the disk is full: {needed} bytes are needed and {free} are free; {} more would do. Nothing was changed", needed.saturating_sub(*free))]
    DiskFull {
        /// The file that was to be written.
        path: PathBuf,
        /// Its size in bytes.
        needed: u64,
        /// Bytes free on its volume.
        free: u64,
    },
    /// The file is of another kind than its name says.
    #[error("{path}: is {found}, not {wanted}; {remedy}")]
    WrongKind {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What it should be.
        wanted: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// The file ends before what it announces.
    #[error("{path}: is truncated: {field} reaches to byte {want} and the file has {got}; download or copy it again")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        field: String,
        /// Bytes that it takes.
        want: u64,
        /// Bytes that there are.
        got: u64,
    },
    /// A field breaks the format's rules.
    #[error("{path}: byte {at}: {field} {reason}; the file is damaged or was written by a faulty program")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where.
        at: u64,
        /// Which field or tensor.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// The file is sound, but of a kind that planish does not read.
    #[error("{path}: {field} {reason}; {remedy}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Which field or tensor.
        field: String,
        /// What it is.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A field that the reader needs is missing or of another type.
    #[error("{path}: `{field}` {reason}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The key.
        field: String,
        /// What is wrong and what would be right.
        reason: String,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps what the system said.
    pub fn io(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { path, doing, source }
    }

    /// A rule of the format is broken at a byte.
    pub fn malformed(path: &Path, at: u64, field: impl AsRef<str>, reason: impl AsRef<str>) -> Error {
        Error::Malformed { path: path.into(), at, field: printable(field.as_ref()), reason: printable(reason.as_ref()) }
    }

    /// The file ends before what it announces.
    pub fn truncated(path: &Path, field: impl AsRef<str>, want: u64, got: u64) -> Error {
        Error::Truncated { path: path.into(), field: printable(field.as_ref()), want, got }
    }

    /// A sound file that planish does not read.
    pub fn unsupported(path: &Path, field: impl AsRef<str>, reason: impl AsRef<str>, remedy: &'static str) -> Error {
        let (field, reason) = (printable(field.as_ref()), printable(reason.as_ref()));
        Error::Unsupported { path: path.into(), field, reason, remedy }
    }

    /// A key is missing or of another type.
    pub fn field(path: &Path, field: impl AsRef<str>, reason: impl AsRef<str>) -> Error {
        Error::Field { path: path.into(), field: printable(field.as_ref()), reason: printable(reason.as_ref()) }
    }

    /// Is it the system's refusal (as opposed to a fault of the file)?
    pub fn is_system(&self) -> bool {
        matches!(self, Error::Io { .. } | Error::DiskFull { .. })
    }
}

/// Text from a file made fit for a terminal: control characters are escaped (they could rewrite the screen) and
/// long text is cut.
fn printable(text: &str) -> String {
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == LONGEST_QUOTE {
            out.push('\u{2026}');
            break;
        }
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Recognises by its first bytes a file that is not what it should be.
///
/// # Errors
/// [`Error::WrongKind`] for a Git-LFS pointer, a web page, a pickle, an archive, a blank download, or one of the
/// kinds that planish reads in another's place; nothing otherwise.
pub fn check_kind(path: &Path, head: &[u8], wanted: &'static str) -> Result<()> {
    match kind_of(head, wanted) {
        Some((found, remedy)) => Err(Error::WrongKind { path: path.into(), found, wanted, remedy }),
        None => Ok(()),
    }
}

/// What the first bytes are, if not what is wanted, and what to do about it.
fn kind_of(head: &[u8], wanted: &str) -> Option<(&'static str, &'static str)> {
    let is_text = !matches!(wanted, "a GGUF file" | "a safetensors file");
    // Its length comes first, and some lengths spell the magic of another kind.
    let is_safetensors = head.len() > 8 && head[4..8] == [0; 4] && head[8] == b'{';
    if is_safetensors && wanted == "a safetensors file" {
        return None;
    }
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    let lower: Vec<u8> = text.iter().take(16).map(u8::to_ascii_lowercase).collect();
    let page = ["<!doctype", "<html", "<head", "<body", "<?xml", "<!--"];
    if text.starts_with(b"version https://git-lfs") {
        return Some(("a Git-LFS pointer", "the content was not fetched: run `git lfs pull` in its folder"));
    }
    if page.iter().any(|tag| lower.starts_with(tag.as_bytes())) {
        return Some(("a web page", "the download saved an error page: download the file itself"));
    }
    if head.starts_with(b"PK\x03\x04") {
        return Some((
            "a zip archive (a PyTorch checkpoint?)",
            "convert it to safetensors with the program that made it",
        ));
    }
    if matches!(head, [0x80, 2..=5, b'}' | b']' | b'(' | b'c' | b'K' | b'M' | b'J' | b'\x8a' | b'\x95', ..]) {
        return Some(("a Python pickle", "planish never executes pickles: convert it to safetensors"));
    }
    if head.starts_with(b"\x89HDF\r\n") {
        return Some(("an HDF5 file", "convert it to safetensors with the program that made it"));
    }
    if head.starts_with(b"\x1f\x8b") {
        return Some(("a gzip archive", "unpack it first"));
    }
    if head.starts_with(b"\x28\xb5\x2f\xfd") {
        return Some(("a Zstandard archive", "unpack it first"));
    }
    if head.len() >= 16 && head.iter().all(|b| *b == 0) {
        return Some(("blank: it begins with zeros only", "the download did not finish: download it again"));
    }
    if head.starts_with(b"GGUF") && wanted != "a GGUF file" {
        return Some(("a GGUF file", "name it as the model itself"));
    }
    if is_text && (head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff")) {
        return Some(("UTF-16 text", "save it as UTF-8"));
    }
    if !is_text && text.first() == Some(&b'{') {
        return Some(("a JSON text", "the download saved an error message or another file: download the file itself"));
    }
    if is_safetensors {
        return Some(("a safetensors file", "name its folder as the model, or give it the ending .safetensors"));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_never_reach_the_terminal() {
        let e = Error::field(Path::new("m.gguf"), "a\x1b[2Jb\n", "x".repeat(9_999)).to_string();
        assert!(e.contains("a\\u{1b}[2Jb\\n") && !e.chars().any(char::is_control) && e.len() < 400, "{e}");
    }

    #[test]
    fn wrong_kinds_are_told_by_name_and_right_ones_pass() {
        let cases: &[(&[u8], &str)] = &[
            (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
            (b"\xef\xbb\xbf\n <HTML><head>", "web page"),
            (b"PK\x03\x04rest", "zip archive"),
            (b"\x80\x02}q\x00.", "pickle"),
            (b"\x89HDF\r\n\x1a\n", "HDF5"),
            (b"\x1f\x8b\x08rest", "gzip"),
            (b"\x28\xb5\x2f\xfdrest", "Zstandard"),
            (&[0; 64], "zeros"),
        ];
        for wanted in ["a JSON file", "a GGUF file", "a safetensors file"] {
            for (head, want) in cases {
                let e = check_kind(Path::new("f"), head, wanted).unwrap_err().to_string();
                assert!(e.contains(want), "{e}");
            }
        }
        let safetensors = b"\x40\0\0\0\0\0\0\0{\"w\":{\"dtype\"";
        assert!(check_kind(Path::new("f"), safetensors, "a safetensors file").is_ok());
        assert!(check_kind(Path::new("f"), safetensors, "a GGUF file").is_err());
        assert!(check_kind(Path::new("f"), b"{\"error\":\"not found\"}", "a GGUF file").is_err());
        assert!(check_kind(Path::new("f"), b"{\"a\":1}", "a JSON file").is_ok());
        assert!(check_kind(Path::new("f"), b"{\"a\":1}\n{\"a\":2}", "a text file").is_ok());
        // Headers of 640, 123 and 67,324,752 bytes begin like a pickle, a JSON text and a zip archive.
        for length in [[0x80, 2, 0, 0], *b"{\0\0\0", *b"PK\x03\x04"] {
            let head = [&length[..], b"\0\0\0\0{\"w\":{}"].concat();
            assert!(check_kind(Path::new("f"), &head, "a safetensors file").is_ok());
        }
    }
}
