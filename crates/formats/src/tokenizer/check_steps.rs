//! Checks of the steps around a tokenizer's model: normalizer, pre-tokenizer, post-processor, decoder.

use super::{
    check_file::{Place, plain},
    error::{Error, Result},
};
use serde_json::{Map, Value};

/// The most by which the normalizers of one tokenizer may multiply a text; real ones stay under 36.
const MAX_GROWTH: u64 = 256;
/// The most bytes that a step may insert at one place.
const MAX_INSERT: usize = 256;
/// The most steps in one sequence, and special tokens in one template.
const MAX_STEPS: usize = 64;

const NORMALIZERS: &[&str] = &[
    "BertNormalizer",
    "ByteLevel",
    "Lowercase",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Precompiled",
    "Prepend",
    "Replace",
    "Sequence",
    "Strip",
    "StripAccents",
];
const PRE_TOKENIZERS: &[&str] = &[
    "BertPreTokenizer",
    "ByteLevel",
    "CharDelimiterSplit",
    "Digits",
    "FixedLength",
    "Metaspace",
    "Punctuation",
    "Sequence",
    "Split",
    "UnicodeScripts",
    "Whitespace",
    "WhitespaceSplit",
];
const POST_PROCESSORS: &[&str] =
    &["BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"];
const DECODERS: &[&str] = &[
    "BPEDecoder",
    "ByteFallback",
    "ByteLevel",
    "CTC",
    "Fuse",
    "Metaspace",
    "Replace",
    "Sequence",
    "Strip",
    "WordPiece",
];

/// A step's type, which must be one of a list.
fn step_type<'v>(
    value: &'v Value,
    at: &str,
    supported: &[&str],
    place: &Place,
) -> Result<(&'v str, &'v Map<String, Value>)> {
    let map = place.object(value, at)?;
    match map.get("type") {
        Some(Value::String(kind)) if supported.contains(&kind.as_str()) => Ok((kind, map)),
        Some(kind) => Err(Error::Unsupported {
            path: place.path.clone(),
            field: format!("{at}.type"),
            value: plain(kind),
            supported: supported.join(", "),
        }),
        None => Err(place.bad(format!("{at}.type"), "is missing", &format!("it is one of {}", supported.join(", ")))),
    }
}

/// The parts of a `Sequence`.
fn parts<'v>(
    map: &'v Map<String, Value>,
    at: &str,
    key: &str,
    place: &Place,
) -> Result<impl Iterator<Item = (String, &'v Value)> + use<'v>> {
    let list = place.list(map, at, key)?;
    if list.len() > MAX_STEPS {
        return Err(place.bad(
            format!("{at}.{key}"),
            format!("has {} steps", list.len()),
            &format!("at most {MAX_STEPS} are taken; join some"),
        ));
    }
    let prefix = format!("{at}.{key}");
    Ok(list.iter().enumerate().map(move |(i, part)| (format!("{prefix}[{i}]"), part)))
}

/// A normalizer; gives the most by which it multiplies a text's bytes.
pub(super) fn normalizer(value: &Value, at: &str, place: &Place) -> Result<u64> {
    let (kind, map) = step_type(value, at, NORMALIZERS, place)?;
    let growth = match kind {
        "Sequence" => {
            let mut product = 1u64;
            for (at, part) in parts(map, at, "normalizers", place)? {
                product = product.saturating_mul(normalizer(part, &at, place)?);
            }
            product
        }
        "Replace" => replace(map, at, place)?,
        "Prepend" => {
            let prefix = string(map, at, "prepend", place)?;
            insertion(prefix, &format!("{at}.prepend"), place)?;
            1
        }
        "Precompiled" => {
            charsmap(map, at, place)?;
            MAX_INSERT as u64 / 16
        }
        // The longest compatibility decomposition (U+FDFA) is 11 times its source, the longest canonical one 3.
        "NFKC" | "NFKD" | "Nmt" => 11,
        "NFC" | "NFD" => 3,
        "ByteLevel" => 2,
        _ => 2,
    };
    if growth > MAX_GROWTH {
        return Err(place.bad(
            at,
            format!("can make a text {growth} times longer"),
            "no real tokenizer does; remove the replacements that chain",
        ));
    }
    Ok(growth)
}

/// A `Replace`; gives the growth in bytes.
fn replace(map: &Map<String, Value>, at: &str, place: &Place) -> Result<u64> {
    let content = string(map, at, "content", place)?;
    insertion(content, &format!("{at}.content"), place)?;
    let pattern = map.get("pattern");
    match (pattern.and_then(|p| p.get("String")), pattern.and_then(|p| p.get("Regex"))) {
        (Some(Value::String(text)), None) => {
            if text.is_empty() {
                return Err(empty_pattern(at, place));
            }
            Ok(content.len().div_ceil(text.len()).max(1) as u64)
        }
        // An expression may match the empty text between any two characters.
        (None, Some(Value::String(regex))) => {
            regex_size(regex, at, place)?;
            Ok(1 + content.len() as u64)
        }
        _ => Err(place.wrong_type(format!("{at}.pattern"), "an object with `String` or `Regex`")),
    }
}

fn empty_pattern(at: &str, place: &Place) -> Error {
    place.bad(format!("{at}.pattern"), "is the empty text, which is everywhere", "name what is to be found")
}

fn regex_size(regex: &str, at: &str, place: &Place) -> Result<()> {
    if regex.len() > 1 << 16 {
        return Err(place.bad(
            format!("{at}.pattern.Regex"),
            format!("has {} bytes", regex.len()),
            "real expressions have less than a thousand",
        ));
    }
    Ok(())
}

fn string<'v>(map: &'v Map<String, Value>, at: &str, key: &str, place: &Place) -> Result<&'v str> {
    match map.get(key) {
        Some(Value::String(text)) => Ok(text),
        _ => Err(place.wrong_type(format!("{at}.{key}"), "a string")),
    }
}

fn insertion(text: &str, field: &str, place: &Place) -> Result<()> {
    if text.len() > MAX_INSERT {
        return Err(place.bad(
            field,
            format!("inserts {} bytes at each place", text.len()),
            &format!("at most {MAX_INSERT} are taken"),
        ));
    }
    Ok(())
}

/// A SentencePiece character map: base64 of a trie's byte count, the trie and the replacements.
///
/// The library allocates by the announced size, so that size must be there.
fn charsmap(map: &Map<String, Value>, at: &str, place: &Place) -> Result<()> {
    let field = format!("{at}.precompiled_charsmap");
    let text = string(map, at, "precompiled_charsmap", place)?;
    let remedy = "it is damaged; take the map from the SentencePiece model again";
    let bytes = base64(text).ok_or_else(|| place.bad(&field, "is not base64", remedy))?;
    let Some((head, rest)) = bytes.split_first_chunk::<4>() else {
        return Err(place.bad(&field, format!("has only {} bytes", bytes.len()), remedy));
    };
    let trie = u32::from_le_bytes(*head) as usize;
    if trie == 0 || !trie.is_multiple_of(4) || trie > rest.len() {
        return Err(place.bad(&field, format!("announces a trie of {trie} bytes and has {}", rest.len()), remedy));
    }
    let (units, replacements) = rest.split_at(trie);
    if std::str::from_utf8(replacements).is_err() {
        return Err(place.bad(&field, "has replacements that are not UTF-8", remedy));
    }
    check_trie(units, replacements).ok_or_else(|| place.bad(&field, "has a trie that points outside of it", remedy))
}

/// Whether no walk through a double array of 32-bit units leaves it, and no leaf its replacements.
fn check_trie(units: &[u8], replacements: &[u8]) -> Option<()> {
    let units: Vec<usize> =
        units.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]) as usize).collect();
    let offset = |unit: usize| (unit >> 10) << ((unit & (1 << 9)) >> 6);
    let mut seen = vec![false; units.len()];
    let mut open = vec![0usize];
    while let Some(at) = open.pop() {
        if std::mem::replace(seen.get_mut(at)?, true) {
            continue;
        }
        let base = at ^ offset(units[at]);
        // A step reads the unit of whatever byte the text has next, also where the label then differs.
        for byte in 1..256usize {
            let unit = *units.get(base ^ byte)?;
            if unit & ((1 << 31) | 0xff) == byte {
                open.push(base ^ byte);
                if (unit >> 8) & 1 == 1 {
                    let value = units.get((base ^ byte) ^ offset(unit))? & ((1 << 31) - 1);
                    if value >= replacements.len() && !replacements.is_empty() {
                        return None;
                    }
                    std::str::from_utf8(replacements.get(value..)?).ok()?;
                }
            }
        }
    }
    Some(())
}

/// Standard base64 with padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.as_bytes();
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    for (index, quad) in text.chunks_exact(4).enumerate() {
        let last = (index + 1) * 4 == text.len();
        let padding = quad.iter().rev().take_while(|b| **b == b'=').count();
        if padding > 2 || (padding > 0 && !last) {
            return None;
        }
        let mut word = 0u32;
        for byte in &quad[..4 - padding] {
            word = (word << 6) | base64_digit(*byte)?;
        }
        word <<= 6 * padding;
        out.extend_from_slice(&word.to_be_bytes()[1..4 - padding]);
    }
    Some(out)
}

fn base64_digit(byte: u8) -> Option<u32> {
    Some(u32::from(match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    }))
}

/// A pre-tokenizer.
pub(super) fn pre_tokenizer(value: &Value, at: &str, place: &Place) -> Result<()> {
    let (kind, map) = step_type(value, at, PRE_TOKENIZERS, place)?;
    match kind {
        "Sequence" => {
            for (at, part) in parts(map, at, "pretokenizers", place)? {
                pre_tokenizer(part, &at, place)?;
            }
        }
        "Split" => match map.get("pattern").and_then(Value::as_object) {
            Some(p) if p.get("String").is_some_and(|s| s == "") => {
                return Err(empty_pattern(at, place));
            }
            Some(p) => {
                if let Some(Value::String(regex)) = p.get("Regex") {
                    regex_size(regex, at, place)?;
                }
            }
            None => {
                return Err(place.wrong_type(format!("{at}.pattern"), "an object with `String` or `Regex`"));
            }
        },
        // The library cuts a text into pieces of this length and panics at 0.
        "FixedLength" if map.get("length").is_some_and(|n| n.as_u64().is_none_or(|n| n == 0)) => {
            return Err(place.bad(
                format!("{at}.length"),
                "is not a length of 1 or more",
                "give the number of characters in a piece",
            ));
        }
        _ => {}
    }
    Ok(())
}

/// A post-processor: the special tokens that it adds are tokens of this vocabulary.
pub(super) fn post_processor(value: &Value, at: &str, place: &Place) -> Result<()> {
    let (kind, map) = step_type(value, at, POST_PROCESSORS, place)?;
    match kind {
        "Sequence" => {
            for (at, part) in parts(map, at, "processors", place)? {
                post_processor(part, &at, place)?;
            }
            Ok(())
        }
        "BertProcessing" | "RobertaProcessing" => {
            for key in ["sep", "cls"] {
                let pair = place.list(map, at, key)?;
                let field = format!("{at}.{key}[1]");
                place.known_id(pair.get(1).unwrap_or(&Value::Null), &field)?;
            }
            Ok(())
        }
        "TemplateProcessing" => template(map, at, place),
        _ => Ok(()),
    }
}

fn template(map: &Map<String, Value>, at: &str, place: &Place) -> Result<()> {
    let specials = match map.get("special_tokens") {
        Some(Value::Object(specials)) => specials,
        _ => {
            return Err(place.wrong_type(format!("{at}.special_tokens"), "an object"));
        }
    };
    if specials.len() > MAX_STEPS {
        return Err(place.bad(
            format!("{at}.special_tokens"),
            format!("has {} tokens", specials.len()),
            &format!("at most {MAX_STEPS} are taken"),
        ));
    }
    for (name, special) in specials {
        let at = format!("{at}.special_tokens[\"{}\"]", name.escape_debug());
        let special = place.object(special, &at)?;
        let ids = place.list(special, &at, "ids")?;
        let tokens = place.list(special, &at, "tokens")?;
        if ids.len() != tokens.len() || ids.len() > MAX_STEPS {
            return Err(place.bad(
                format!("{at}.ids"),
                format!("has {} ids for {} tokens", ids.len(), tokens.len()),
                &format!("give each token its id, at most {MAX_STEPS}"),
            ));
        }
        for (index, id) in ids.iter().enumerate() {
            place.known_id(id, &format!("{at}.ids[{index}]"))?;
        }
    }
    for key in ["single", "pair"] {
        let texts = template_pieces(map, at, key, specials, place)?;
        if key == "single" && texts != 1 {
            return Err(place.bad(
                format!("{at}.single"),
                format!("has the text {texts} times"),
                "it has the text `A` once, with special tokens around it",
            ));
        }
    }
    Ok(())
}

/// Checks that the pieces of a template exist; gives how often the text `A` is among them.
fn template_pieces(
    map: &Map<String, Value>,
    at: &str,
    key: &str,
    specials: &Map<String, Value>,
    place: &Place,
) -> Result<usize> {
    let mut texts = 0;
    for (at, piece) in parts(map, at, key, place)? {
        let id = |kind: &str| piece.get(kind).and_then(|p| p.get("id")).and_then(Value::as_str);
        match (id("SpecialToken"), id("Sequence")) {
            (Some(name), None) if specials.contains_key(name) => {}
            (Some(name), None) => {
                return Err(place.bad(
                    format!("{at}.SpecialToken.id"),
                    format!("is \"{}\", which special_tokens lacks", name.escape_debug()),
                    "list the token there with its ids",
                ));
            }
            (None, Some("A")) => texts += 1,
            (None, Some("B")) if key == "pair" => {}
            _ => {
                return Err(place.wrong_type(at, "a SpecialToken or the Sequence A (or B in a pair)"));
            }
        }
    }
    Ok(texts)
}

/// A decoder.
pub(super) fn decoder(value: &Value, at: &str, place: &Place) -> Result<()> {
    let (kind, map) = step_type(value, at, DECODERS, place)?;
    match kind {
        "Sequence" => {
            for (at, part) in parts(map, at, "decoders", place)? {
                decoder(part, &at, place)?;
            }
        }
        "Replace" => {
            replace(map, at, place)?;
        }
        // The library counts back from the end of a token without looking and panics on a short one.
        "Strip" if map.get("stop").is_some_and(|n| n.as_u64() != Some(0)) => {
            return Err(place.bad(
                format!("{at}.stop"),
                "is not 0",
                "cutting ends of tokens is not supported; real decoders cut at the start",
            ));
        }
        _ => {}
    }
    Ok(())
}
