//! How a job tells how far it is, and learns that it should stop.

use crate::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};

/// Watches a job. The command line draws a bar; tests watch nothing.
pub trait Progress: Sync {
    /// A part of the job begins that takes `total` units.
    fn begin(&self, what: &str, total: u64);
    /// So many more units are done.
    fn advance(&self, units: u64);
    /// So many units were done by an earlier run: they do not tell how long the others take.
    fn done_before(&self, units: u64);
    /// Something to know that is no fault: a fallback, a warning.
    fn note(&self, text: &str);
}

/// Watches nothing.
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn done_before(&self, _: u64) {}
    fn note(&self, _: &str) {}
}

static STOP: AtomicBool = AtomicBool::new(false);

/// Asks every running job to stop at its next safe place.
pub fn interrupt() {
    STOP.store(true, Ordering::SeqCst);
}

/// Was the job asked to stop?
///
/// # Errors
/// [`Error::Interrupted`] if so.
pub fn check() -> Result<()> {
    if stopped() { Err(Error::Interrupted) } else { Ok(()) }
}

/// Was the job asked to stop?
pub fn stopped() -> bool {
    STOP.load(Ordering::SeqCst)
}
