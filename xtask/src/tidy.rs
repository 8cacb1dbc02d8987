//! The house rules that a machine can check; DESIGN and CONTRIBUTING say why they hold.

use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Longest source file.
const LONGEST: usize = 600;

/// Crates from the bottom up: each uses only those before it.
const ORDER: &[(&str, &[&str])] = &[
    ("tensor", &[]),
    ("formats", &["tensor"]),
    ("model", &["tensor", "formats"]),
    ("sample", &[]),
    ("optimize", &["tensor", "formats", "model", "sample"]),
    ("cli", &["tensor", "formats", "model", "sample", "optimize"]),
];

/// Tensor names of Hugging Face and GGUF files, which only `families/` may hold.
const TENSOR_NAMES: &[&str] = &["self_attn", "\"blk.", "model.layers", "token_embd", "c_attn", "query_key_value"];
/// Words that name no thing.
const EMPTY_WORDS: &[&str] = &["utils", "helpers", "common", "misc", "manager"];

/// Checks every rule and lists every fault.
pub fn run() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the project")?;
    let mut faults = Vec::new();
    let mut files = Vec::new();
    for folder in ["crates", "xtask"] {
        sources(&root.join(folder), &mut files)?;
    }
    for file in &files {
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.strip_prefix(root).unwrap_or(file).display().to_string();
        check_file(&name, &text, &mut faults);
    }
    for (name, uses) in ORDER {
        let manifest = fs::read_to_string(root.join(format!("crates/{name}/Cargo.toml")))?;
        for (other, _) in ORDER {
            let used = manifest.lines().any(|l| l.starts_with(&format!("{other} = ")));
            if used && !uses.contains(other) {
                faults.push(format!("crates/{name} uses {other}, which does not stand below it"));
            }
        }
    }
    if !faults.is_empty() {
        bail!("{} faults:\n{}", faults.len(), faults.join("\n"));
    }
    println!("tidy: {} files keep the house rules", files.len());
    Ok(())
}

fn sources(folder: &Path, out: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)?.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
    entries.sort();
    for path in entries {
        if path.is_dir() {
            sources(&path, out)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
    Ok(())
}

/// The lines before the `unsafe trait` or `unsafe impl` that line `i` stands in; none outside of one.
fn implemented<'a>(lines: &'a [&'a str], i: usize) -> &'a [&'a str] {
    let indented = lines[i].starts_with(' ');
    let outer = lines[..i].iter().rposition(|l| !l.is_empty() && !l.starts_with(' ') && !l.starts_with("//"));
    match outer.filter(|o| indented && (lines[*o].contains("unsafe impl") || lines[*o].contains("unsafe trait"))) {
        Some(o) => &lines[o.saturating_sub(8)..o],
        None => &[],
    }
}

fn check_file(name: &str, text: &str, faults: &mut Vec<String>) {
    let lines: Vec<&str> = text.lines().collect();
    let mut fault = |line: usize, what: &str| faults.push(format!("{name}:{}: {what}", line + 1));
    let test = name.contains("/tests/") || name.contains("/examples/");
    if lines.len() > LONGEST {
        fault(0, "is longer than 600 lines; cut it where it has a joint");
    }
    let stem = name.rsplit('/').next().unwrap_or(name).trim_end_matches(".rs");
    if EMPTY_WORDS.contains(&stem) {
        fault(0, "has a name that says nothing; name what it holds");
    }
    if !lines.first().is_some_and(|l| l.starts_with("//!")) {
        fault(0, "does not begin with a sentence on what it is");
    }
    let root = name.ends_with("src/lib.rs") || name.ends_with("src/main.rs");
    let fenced = name.starts_with("crates/tensor/") || name.starts_with("xtask/");
    if root && !fenced && !text.contains("#![forbid(unsafe_code)]") {
        fault(0, "lacks #![forbid(unsafe_code)]");
    }
    for (i, line) in lines.iter().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        let unsafe_code =
            ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|w| code.contains(w)) && !name.starts_with("xtask/");
        if unsafe_code && !name.starts_with("crates/tensor/") {
            fault(i, "is unsafe outside crates/tensor");
        }
        let near = &lines[i.saturating_sub(8)..i];
        // The words of an instruction set (`unsafe impl Lanes`) are told of together, before the first of them.
        let told = near.iter().chain(implemented(&lines, i)).any(|l| l.contains("SAFETY") || l.contains("# Safety"));
        if unsafe_code && !told {
            fault(i, "is unsafe without a SAFETY sentence");
        }
        if code.contains(concat!("#[", "ignore")) {
            fault(i, "ignores a test");
        }
        if code.contains("std::net") && !name.starts_with("crates/serve/") && !name.starts_with("xtask/") {
            fault(i, "opens sockets outside crates/serve");
        }
        let knows = name.starts_with("crates/model/src/families/") || name.starts_with("xtask/") || test;
        if !knows && TENSOR_NAMES.iter().any(|n| code.contains(n)) {
            fault(i, "holds a tensor name of a file format outside families/");
        }
        if line.ends_with(' ') || line.contains('\t') {
            fault(i, "has white space at its end or a tab");
        }
    }
}
