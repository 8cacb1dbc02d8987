//! GGUF's names (`tokenizer.ggml.pre`) for the ways to cut a text before byte-level merges, as expressions.
//!
//! The expressions are those of llama.cpp's `llama-vocab.cpp`; several are applied one after the other.

use serde_json::{Value, json};

/// One way to cut.
pub(super) struct PreSplit {
    /// The names that a GGUF may give it; the first is the one written.
    pub names: &'static [&'static str],
    /// The expressions, each of which cuts the pieces of the one before.
    pub regexes: &'static [&'static str],
    /// Whether a piece that is a token is taken whole, whatever the merges say.
    pub ignore_merges: bool,
    /// Whether BOS is added where the file does not say.
    pub add_bos: bool,
}

/// GPT-2's own expression, which the library's `ByteLevel` has built in.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Every way that is known.
pub(super) const PRE_SPLITS: &[PreSplit] = &[
    PreSplit {
        names: &["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gpt-neox"],
        regexes: &[GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    PreSplit {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3"],
        regexes: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
    },
    PreSplit { names: &["dbrx", "smaug-bpe"], regexes: &[LLAMA3], ignore_merges: false, add_bos: false },
    PreSplit {
        names: &["qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"],
        regexes: &[QWEN2],
        ignore_merges: false,
        add_bos: false,
    },
    PreSplit {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"],
        regexes: &[r"\p{N}", GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    PreSplit { names: &["tekken"], regexes: &[TEKKEN], ignore_merges: true, add_bos: true },
    PreSplit { names: &["gpt-4o"], regexes: &[GPT4O], ignore_merges: false, add_bos: false },
    PreSplit {
        names: &["default"],
        regexes: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
    },
];

/// The way that a GGUF names.
///
/// A file without a name is older than names; byte-level vocabularies of that time use GPT-2's expression.
pub(super) fn by_name(name: Option<&str>) -> Option<&'static PreSplit> {
    let name = name.unwrap_or("gpt-2");
    PRE_SPLITS.iter().find(|split| split.names.contains(&name))
}

/// Every name that is known, for messages.
pub(super) fn names() -> String {
    let all: Vec<&str> = PRE_SPLITS.iter().flat_map(|s| s.names).copied().collect();
    all.join(", ")
}

/// A way as the `pre_tokenizer` of a tokenizer.json.
pub(super) fn to_json(split: &PreSplit) -> Value {
    let mut steps: Vec<Value> = split
        .regexes
        .iter()
        .map(|regex| {
            json!({
                "type": "Split",
                "pattern": {"Regex": regex},
                "behavior": "Isolated",
                "invert": false,
            })
        })
        .collect();
    if split.regexes == [GPT2] {
        return byte_level(true);
    }
    steps.push(byte_level(false));
    json!({"type": "Sequence", "pretokenizers": steps})
}

/// The library's step from bytes to the characters that stand for them.
pub(super) fn byte_level(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": true,
        "use_regex": use_regex,
    })
}

/// The way that a list of expressions is, if it is a known one.
///
/// Files spell the same expression in several ways; those that are known to be equal are told apart by nothing.
pub(super) fn by_regexes(regexes: &[String], ignore_merges: bool) -> Option<&'static str> {
    let canonical: Vec<String> = regexes.iter().map(|r| canonical(r)).collect();
    let split = PRE_SPLITS.iter().find(|split| {
        let own = split.regexes.iter().map(|r| self::canonical(r));
        split.ignore_merges == ignore_merges && own.eq(canonical.iter().cloned())
    })?;
    Some(split.names[0])
}

fn canonical(regex: &str) -> String {
    const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
    const SPELLED: [&str; 3] = [
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
        "(?i:'(?:s|t|re|ve|m|ll|d))",
        "(?i:'(?:[sdmt]|ll|ve|re))",
    ];
    let spelled = |text: String, form: &&str| text.replace(form, CONTRACTIONS);
    SPELLED.iter().fold(regex.to_string(), spelled)
}
