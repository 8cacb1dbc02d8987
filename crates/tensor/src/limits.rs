//! What this machine can do at most, measured: reading memory, and the arithmetic of each kind of product.

use crate::{
    Bytes, Pages,
    kernels::{Arithmetic, kernels},
    threads,
};
use std::{hint::black_box, io, time::Instant};

/// Bytes that [`read_bandwidth`] reads where there is memory for them: far more than any cache holds.
pub const READ: usize = 2 << 30;

/// Memory to be read as fast as it can be.
pub struct Reading {
    pages: Bytes,
    pieces: usize,
}

const PIECE: usize = 8 << 20;

impl Reading {
    /// Prepares `bytes` (see [`READ`]) in huge pages.
    ///
    /// # Errors
    /// If there is not so much memory.
    pub fn new(bytes: usize) -> io::Result<Reading> {
        let mut pages = Pages::new(bytes)?;
        let pieces = bytes / PIECE;
        let shared = threads::Shared::new(pages.as_mut_slice());
        // Memory that was never written is one page of zeros.
        // SAFETY: each task writes a piece of its own.
        threads::each(pieces, &|i| unsafe { shared.slice(i * PIECE, PIECE) }.fill(1));
        Ok(Reading { pages: pages.freeze(), pieces })
    }

    /// Reads it once on all workers; bytes per second.
    pub fn bandwidth(&self) -> f64 {
        let begin = Instant::now();
        // Each worker reads a run of its own, as it does weights.
        let runs = threads::count() * 4;
        threads::each(runs, &|i| {
            let (from, to) = (self.pieces * i / runs, self.pieces * (i + 1) / runs);
            black_box((kernels().codes.read)(&self.pages[from * PIECE..to * PIECE]));
        });
        (self.pieces * PIECE) as f64 / begin.elapsed().as_secs_f64()
    }
}

/// Bytes per second of reading memory, the best of five reads of `bytes` (see [`READ`]) in huge pages, on all workers.
///
/// # Errors
/// If there is not so much memory.
pub fn read_bandwidth(bytes: usize) -> io::Result<f64> {
    let reading = Reading::new(bytes)?;
    Ok((0..5).fold(0.0, |best, _| reading.bandwidth().max(best)))
}

/// Operations per second (a multiplication and an addition are two) in registers, the best of five, on all workers.
pub fn peak(what: Arithmetic) -> f64 {
    const TURNS: usize = 1_000_000;
    let tasks = threads::count();
    let best = best_of_five(|| {
        threads::each(tasks, &|_| {
            black_box((kernels().floats.spin)(what, black_box(TURNS)));
        });
    });
    (tasks * TURNS * what.operations()) as f64 / best
}

fn best_of_five(mut f: impl FnMut()) -> f64 {
    (0..5).fold(f64::INFINITY, |best, _| {
        let begin = Instant::now();
        f();
        best.min(begin.elapsed().as_secs_f64())
    })
}
