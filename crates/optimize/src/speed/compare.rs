//! Decode speed of two models in one interleaved run.

use crate::{Result, progress};
use model::{Cache, Model, Runner, Wanted, uniform};
use std::time::{Duration, Instant};
use tensor::ops;

/// Rounds of a comparison of speeds.
const ROUNDS: usize = 7;
/// How long a comparison that nobody asked for may take: two rounds are made in any case.
const PATIENCE: Duration = Duration::from_secs(20);

/// Decode speed of two models in turn, so that a machine that slows down slows both: the ratio new / old of
/// each round, rising. Where a floor depends on it (`asked`) it is 64 tokens after 128, however long that takes.
///
/// # Errors
/// As [`measure`].
pub fn decode_ratios(model: &Model, base: &Model, asked: bool) -> Result<Vec<f64>> {
    let room = model.spec.context.saturating_sub(2);
    let (prompt, tokens) = (128.min(room / 2).max(1), 64.min(room / 2).max(1));
    let one = |m: &Model, tokens: usize| -> Result<f64> {
        let ids: Vec<u32> = (0..prompt).map(|i| (uniform(1, i as u64) * m.spec.vocab as f64) as u32).collect();
        let mut cache = [Cache::with_room(m, prompt + tokens)];
        let mut runner = Runner::new(m);
        let mut next = ops::argmax(runner.read(&ids, &mut cache[0])?.row(0)) as u32;
        let begin = Instant::now();
        for _ in 0..tokens {
            progress::check()?;
            next = ops::argmax(runner.step(&[[next]], &mut cache, Wanted::Last)?.row(0)) as u32;
        }
        Ok(tokens as f64 / begin.elapsed().as_secs_f64())
    };
    let begin = Instant::now();
    let slower = one(model, 1)?.min(one(base, 1)?);
    // Two rounds of both models within the patience, warm-up included.
    let affordable = (slower * PATIENCE.as_secs_f64() / 8.0) as usize;
    let tokens = if asked { tokens } else { tokens.min(affordable.max(2)) };
    let mut ratios = Vec::new();
    while ratios.len() < ROUNDS && (asked || ratios.len() < 2 || begin.elapsed() < PATIENCE) {
        ratios.push(one(model, tokens)? / one(base, tokens)?);
    }
    ratios.sort_by(f64::total_cmp);
    Ok(ratios)
}
