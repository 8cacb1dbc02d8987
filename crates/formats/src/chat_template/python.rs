//! The pieces of Python that templates lean on: methods of texts and dictionaries, `json.dumps`, `strftime`.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, ValueKind},
};
use std::time::{SystemTime, UNIX_EPOCH};

/// A method that a template calls on a value.
pub(super) fn method(_: &State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Map => dictionary_method(value, method, args),
        ValueKind::String => text_method(value.as_str().unwrap_or(""), method, args),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn dictionary_method(value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let pair = |key: Value| -> Result<Value, Error> {
        let item = value.get_item(&key)?;
        Ok(Value::from(vec![key, item]))
    };
    match (method, args) {
        ("items", []) => Ok(value.try_iter()?.map(pair).collect::<Result<Vec<_>, _>>()?.into()),
        ("keys", []) => Ok(value.try_iter()?.collect::<Vec<_>>().into()),
        ("values", []) => {
            let items = value.try_iter()?.map(|key| value.get_item(&key));
            Ok(items.collect::<Result<Vec<_>, _>>()?.into())
        }
        ("get", [key, default @ ..]) => {
            let found = value.get_item(key)?;
            let default = default.first().cloned().unwrap_or(Value::from(()));
            Ok(if found.is_undefined() { default } else { found })
        }
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn text_method(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let unknown = || Error::from(ErrorKind::UnknownMethod);
    let arg = |at: usize| args.get(at).and_then(Value::as_str);
    let needed = |at: usize| {
        let message = format!("{method} needs a text as argument {}", at + 1);
        arg(at).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, message))
    };
    let stripped = |c: char| arg(0).map_or(c.is_whitespace(), |set| set.contains(c));
    let any = |test: &dyn Fn(&str) -> bool| match args.first() {
        Some(list) if list.as_str().is_none() => {
            let mut list = list.try_iter()?;
            Ok(list.any(|one| one.as_str().is_some_and(test)))
        }
        _ => needed(0).map(test),
    };
    Ok(match method {
        "strip" => text.trim_matches(stripped).into(),
        "lstrip" => text.trim_start_matches(stripped).into(),
        "rstrip" => text.trim_end_matches(stripped).into(),
        "upper" => text.to_uppercase().into(),
        "lower" => text.to_lowercase().into(),
        "capitalize" => capitalized(text).into(),
        "title" => titled(text).into(),
        "startswith" => any(&|start| text.starts_with(start))?.into(),
        "endswith" => any(&|end| text.ends_with(end))?.into(),
        "find" => text.find(needed(0)?).map_or(-1, |at| text[..at].chars().count() as i64).into(),
        "count" => text.matches(needed(0)?).count().into(),
        "isdigit" => (!text.is_empty() && text.chars().all(char::is_numeric)).into(),
        "split" => split(text, args)?,
        "splitlines" => text.lines().map(Value::from).collect::<Vec<_>>().into(),
        "replace" => {
            let (from, to) = (needed(0)?, needed(1)?);
            // The filter of the same name counts towards the total; a method only sees its own texts.
            if text.matches(from).count().saturating_mul(to.len()) > 1 << 22 {
                return Err(Error::new(ErrorKind::InvalidOperation, super::guard::TOO_MUCH));
            }
            text.replace(from, to).into()
        }
        _ => return Err(unknown()),
    })
}

/// `str.split(sep=None, maxsplit=-1)`.
fn split(text: &str, args: &[Value]) -> Result<Value, Error> {
    let most = args.get(1).and_then(Value::as_i64).and_then(|n| usize::try_from(n).ok());
    let pieces: Vec<Value> = match (args.first().and_then(Value::as_str), most) {
        (Some(""), _) => {
            return Err(Error::new(ErrorKind::InvalidOperation, "split by an empty text"));
        }
        (Some(by), None) => text.split(by).map(Value::from).collect(),
        (Some(by), Some(n)) => text.splitn(n.saturating_add(1), by).map(Value::from).collect(),
        (None, _) => text.split_whitespace().map(Value::from).collect(),
    };
    Ok(pieces.into())
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().into_iter().flat_map(char::to_uppercase);
    first.chain(chars.as_str().to_lowercase().chars()).collect()
}

fn titled(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_alphabetic();
    }
    out
}

/// `json.dumps(value, ensure_ascii=False, indent=...)`: a space behind `:` and `,`, nothing escaped for HTML.
pub(super) fn to_json(value: &Value, kwargs: &Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    for ignored in ["ensure_ascii", "sort_keys", "separators"] {
        let _: Option<Value> = kwargs.get(ignored)?;
    }
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let mut out = String::new();
    dump(&json, indent.map(|n| n.min(16)), 0, &mut out);
    Ok(Value::from_safe_string(out))
}

fn dump(value: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    use serde_json::Value as Json;
    let line = |out: &mut String, depth: usize| {
        if let Some(width) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value {
        Json::Array(list) if !list.is_empty() => {
            out.push('[');
            for (index, item) in list.iter().enumerate() {
                out.push_str(if index > 0 { comma } else { "" });
                line(out, depth + 1);
                dump(item, indent, depth + 1, out);
            }
            line(out, depth);
            out.push(']');
        }
        Json::Object(map) if !map.is_empty() => {
            out.push('{');
            for (index, (key, item)) in map.iter().enumerate() {
                out.push_str(if index > 0 { comma } else { "" });
                line(out, depth + 1);
                out.push_str(&Json::from(key.as_str()).to_string());
                out.push_str(": ");
                dump(item, indent, depth + 1, out);
            }
            line(out, depth);
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
}

/// The time of day in UTC, by `strftime`'s letters.
pub(super) fn now(format: &str) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    strftime(format, since.as_secs())
}

fn strftime(format: &str, seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let days = seconds / 86_400;
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (weekday, month_name) = (DAYS[(days % 7) as usize], MONTHS[month as usize - 1]);
    let mut out = String::new();
    let mut chars = format.chars().take(256);
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('H') => out.push_str(&format!("{hour:02}")),
            Some('M') => out.push_str(&format!("{minute:02}")),
            Some('S') => out.push_str(&format!("{second:02}")),
            Some(other) => out.push(other),
            None => {}
        }
    }
    out
}

/// Year, month and day of a number of days since 1970 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(strftime("%d %b %Y", 1_721_952_000), "26 Jul 2024");
        assert_eq!(strftime("%A %Y-%m-%d %H:%M:%S %B %y", 951_827_696), "Tuesday 2000-02-29 12:34:56 February 00");
        assert_eq!(strftime("%a %d %%", 0), "Thu 01 %");
    }

    #[test]
    fn texts_split_and_change_as_in_python() {
        let split = |args: &[Value]| text_method("a,b,c", "split", args).unwrap().to_string();
        assert_eq!(split(&[",".into()]), r#"["a", "b", "c"]"#);
        assert_eq!(split(&[",".into(), 1.into()]), r#"["a", "b,c"]"#);
        assert_eq!(titled("it's a DOG"), "It'S A Dog");
        assert_eq!(capitalized("hELLO"), "Hello");
    }
}
