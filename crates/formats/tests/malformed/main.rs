//! Hostile files: each is refused by a typed error that names the file and the field (or accepted for a stated
//! reason), within a second and within memory that the file's size justifies. All are built here, byte by byte.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

mod cases;
mod gguf_cases;
mod gguf_draft;
mod gguf_tensor_cases;
mod index_cases;
mod mutations;
mod safetensors_cases;

use peak_alloc::PeakAlloc;
use std::{
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// The longest that a file may keep a reader busy.
const LONGEST: Duration = Duration::from_secs(1);
/// What a reader may take beyond twice the file, in bytes.
const ALLOWANCE: usize = 16 << 20;

/// One test at a time: the allocator counts for the whole program.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

/// Runs a reader over files of `size` bytes and holds it to time and memory.
fn within_bounds<T>(what: &str, size: usize, read: impl FnOnce() -> T) -> T {
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    let start = Instant::now();
    let result = read();
    let (took, peak) = (start.elapsed(), MEMORY.peak_usage().saturating_sub(before));
    assert!(took < LONGEST, "{what}: took {took:?}");
    assert!(peak <= 2 * size + ALLOWANCE, "{what}: took {peak} bytes for a file of {size}");
    result
}
