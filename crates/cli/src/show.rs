//! What the user sees: a bar with the time that is left, tables, errors.

use crate::ranks;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use optimize::progress::Progress;
use std::{
    fmt,
    io::{self, IsTerminal, Write},
    sync::Mutex,
    time::{Duration, Instant},
};

/// Writes to standard output; where nobody reads it any more (`planish inspect | head`), the program ends: it has done
/// its work by then. Of several ranks the first one speaks.
pub fn write(words: fmt::Arguments<'_>) {
    if !ranks::speaks() {
        return;
    }
    if let Err(e) = io::stdout().write_fmt(words) {
        std::process::exit(if e.kind() == io::ErrorKind::BrokenPipe { 0 } else { crate::exit::FAULT.into() });
    }
}

/// [`write()`] in the manner of `print!`.
macro_rules! say {
    ($($words:tt)*) => { $crate::show::write(format_args!($($words)*)) };
}

/// The same with the end of a line.
macro_rules! sayln {
    ($($words:tt)*) => { $crate::show::write(format_args!("{}\n", format_args!($($words)*))) };
}

/// Draws a bar on a terminal and plain lines elsewhere, all on standard error.
pub struct Bar {
    state: Mutex<State>,
    terminal: bool,
    speaks: bool,
}

struct State {
    bar: ProgressBar,
    what: String,
    total: u64,
    done: u64,
    /// Of these so many were done when the time began that the rest is told from.
    before: u64,
    began: Instant,
    told: Instant,
}

impl Bar {
    /// A bar that appears with the first part of a job.
    pub fn new() -> Bar {
        let now = Instant::now();
        let (bar, what) = (ProgressBar::hidden(), String::new());
        let state = State { bar, what, total: 0, done: 0, before: 0, began: now, told: now };
        Bar { state: Mutex::new(state), terminal: io::stderr().is_terminal(), speaks: ranks::speaks() }
    }

    fn with(&self, f: impl FnOnce(&mut State)) {
        if !self.speaks {
            return;
        }
        // A poisoned lock only means that another thread failed while drawing.
        f(&mut self.state.lock().unwrap_or_else(|e| e.into_inner()));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.with(|s| s.bar.finish_and_clear());
    }
}

impl Progress for Bar {
    fn begin(&self, what: &str, total: u64) {
        self.with(|s| {
            s.bar.finish_and_clear();
            (s.what, s.total, s.done, s.before) = (what.into(), total, 0, 0);
            (s.began, s.told) = (Instant::now(), Instant::now());
            if self.terminal {
                let style = ProgressStyle::with_template("{msg:26} [{bar:30}] {percent:>3} %  {eta} left");
                s.bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
                if let Ok(style) = style {
                    s.bar.set_style(style.progress_chars("=> "));
                }
                s.bar.set_message(what.to_string());
            }
        });
    }

    fn advance(&self, units: u64) {
        self.with(|s| {
            s.done += units;
            s.bar.set_position(s.done.min(s.total));
            // Longer jobs tell less often: some ten lines each time that their length doubles, but one a minute.
            let pause = (s.began.elapsed() / 10).clamp(Duration::from_secs(5), Duration::from_secs(60));
            if !self.terminal && s.told.elapsed() > pause {
                s.told = Instant::now();
                let each = s.began.elapsed().as_secs_f64() / (s.done - s.before).max(1) as f64;
                let left = each * s.total.saturating_sub(s.done) as f64;
                eprintln!("{}: {} of {}, about {left:.0} s left", s.what, s.done.min(s.total), s.total);
            }
        });
    }

    fn done_before(&self, units: u64) {
        self.with(|s| {
            s.done += units;
            (s.before, s.began) = (s.done, Instant::now());
            s.bar.set_position(s.done.min(s.total));
            s.bar.reset_eta();
        });
    }

    fn note(&self, text: &str) {
        self.with(|s| s.bar.suspend(|| eprintln!("note: {text}")));
    }
}

/// Prints an error and what it was about; of several ranks the first one does.
pub fn error(e: &anyhow::Error, code: u8, json: bool) {
    if !ranks::speaks() {
        return;
    }
    if json {
        sayln!("{}", serde_json::json!({"error": words(e), "exit_code": code}));
    }
    eprintln!("planish: {}", words(e));
}

/// An error and its causes, each told once: what the system said many errors say themselves.
pub fn words(e: &anyhow::Error) -> String {
    e.chain().map(ToString::to_string).fold(String::new(), |said, cause| match said.is_empty() {
        true => cause,
        false if said.ends_with(&cause) => said,
        false => format!("{said}: {cause}"),
    })
}

/// What a rank has to say that cannot reach the first one, which speaks for all.
pub fn last_word(said: &str) {
    eprintln!("planish: {said}");
}

/// Prints rows with aligned columns; the first is on the left, the others on the right.
pub fn table(rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|t| t.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let cell = |(c, text): (usize, &String)| {
            let w = widths[c];
            if c == 0 { format!("{text:<w$}") } else { format!("{text:>w$}") }
        };
        let line: Vec<String> = row.iter().enumerate().map(cell).collect();
        sayln!("{}", line.join("  ").trim_end());
    }
}

/// A small number with three digits that count.
pub fn small(x: f64) -> String {
    if x >= 1e-3 || x == 0.0 { format!("{x:.5}") } else { format!("{x:.2e}") }
}

/// A size in bytes for people.
pub fn size(bytes: u64) -> String {
    let b = bytes as f64;
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..10_000_000 => format!("{:.1} kB", b / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", b / 1e6),
        _ => format!("{:.2} GB", b / 1e9),
    }
}
