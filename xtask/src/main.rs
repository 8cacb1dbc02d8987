//! House rules and generators: `cargo xtask tidy`, `cargo xtask stories`.

mod tidy;

use anyhow::{Context, Result, bail};
use std::io::Write;

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("stories") => stories(&args[1..]),
        Some("tidy") => tidy::run(),
        _ => bail!("usage: cargo xtask tidy, or cargo xtask stories --seed N --documents M"),
    }
}

/// Prints stories of the sample's grammar, one a line.
fn stories(args: &[String]) -> Result<()> {
    let number = |name: &str| -> Result<u64> {
        let at = args.iter().position(|a| a == name).with_context(|| format!("{name} is missing"))?;
        args.get(at + 1).and_then(|v| v.parse().ok()).with_context(|| format!("{name} takes a number"))
    };
    let (seed, documents) = (number("--seed")?, number("--documents")?);
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for n in 0..documents {
        writeln!(out, "{}", sample::story(seed, n).text)?;
    }
    Ok(())
}
