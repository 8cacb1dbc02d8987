//! Speed: prefill and decode of a model beside this machine's limits, and the memory that the process took.

mod compare;
mod limits;
mod memory;
mod profile;

pub use compare::decode_ratios;
pub use limits::{Limits, Work};
pub use memory::{forget_peak, free_memory_bytes, peak_rss_bytes};
pub use profile::Row;

use crate::{Error, Result, progress};
use model::{Cache, Model, Runner, Wanted, uniform};
use serde::{Deserialize, Serialize};
use std::time::Instant;
use tensor::{limits::Reading, ops};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Tokens that are read at once.
    pub prefill: usize,
    /// Tokens that are then generated one by one.
    pub decode: usize,
    /// Decode after so many earlier positions, beside the plain one.
    pub contexts: Vec<usize>,
    /// Decode of so many texts at once, beside that of one.
    pub sequences: Vec<usize>,
    /// Runs; the median counts.
    pub runs: usize,
    /// Time every operation as well?
    pub profile: bool,
}

impl Ask {
    /// Prefill and decode alone.
    pub fn plain(prefill: usize, decode: usize) -> Ask {
        Ask { prefill, decode, contexts: Vec::new(), sequences: Vec::new(), runs: 5, profile: false }
    }
}

/// What `bench` prints.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Speed {
    /// Many tokens at once.
    pub prefill: Prefill,
    /// One token after another.
    pub decode: Decode,
    /// Decode after longer texts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub contexts: Vec<Other>,
    /// Decode of several texts at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sequences: Vec<Other>,
    /// Where the time goes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub operations: Vec<Row>,
    /// Most memory that this process held while it ran.
    pub peak_rss_bytes: u64,
    /// What a token asks of the machine.
    pub work: Work,
    /// What this machine can do at most.
    pub limits: Limits,
}

/// Speed of many tokens at once.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Prefill {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Median.
    pub tokens_per_second: f64,
    /// Slowest and fastest run.
    pub range: [f64; 2],
    /// 2 x weights of the blocks x tokens per second, over the peak of the arithmetic that their storage asks for.
    pub share_of_peak: f64,
}

/// Speed of one token after another.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Decode {
    /// Tokens generated.
    pub tokens: usize,
    /// Median.
    pub tokens_per_second: f64,
    /// Slowest and fastest run.
    pub range: [f64; 2],
    /// Stored bytes of the weights that a token reads, times tokens per second.
    pub gigabytes_per_second: f64,
    /// That over the bandwidth of reading memory.
    pub share_of_bandwidth: f64,
    /// Median over the rounds of the share of what memory gave right before and after: the one that tells where the
    /// machine's memory changes its speed from second to second.
    pub share_beside: f64,
}

/// Decode under other circumstances, in the same rounds as the plain one.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Other {
    /// Earlier positions, or texts at once.
    pub count: usize,
    /// Median over all texts.
    pub tokens_per_second: f64,
    /// Median of that over the plain decode of the same round.
    pub ratio: f64,
}

/// Measures a model as it is; [`Model::pack`] makes it fast first.
///
/// # Errors
/// If the model's context is too short, or the job was interrupted.
pub fn measure(model: &Model, ask: &Ask) -> Result<Speed> {
    let mut bench = Bench::new(model, ask)?;
    let work = Work::of(model);
    // A round that does not count: it finds cold caches, and needs all the memory that the others will.
    bench.round(None)?;
    let operations = if ask.profile { profile::measure(model, ask.prefill, ask.decode)? } else { Vec::new() };
    let peak = peak_rss_bytes();
    let mut reads = Reads { memory: Reading::new(limits::bytes_to_read()).ok(), best: f64::NAN, shares: Vec::new() };
    let runs = ask.runs.max(1);
    for _ in 0..runs {
        progress::check()?;
        bench.round(Some((&mut reads, work.bytes_per_token)))?;
    }
    (2 * runs..5).for_each(|_| _ = reads.read());
    let limits = Limits::with_bandwidth(reads.best);
    let (fill, step) = (Spread::of(&mut bench.fill), Spread::of(&mut bench.step));
    let read = work.bytes_per_token as f64 * step.median / 1e9;
    Ok(Speed {
        prefill: Prefill {
            tokens: ask.prefill,
            tokens_per_second: fill.median,
            range: fill.range,
            share_of_peak: limits::least_nanoseconds(model, &limits) * fill.median / 1e9,
        },
        decode: Decode {
            tokens: ask.decode,
            tokens_per_second: step.median,
            range: step.range,
            gigabytes_per_second: read,
            share_of_bandwidth: read / limits.read_gigabytes_per_second,
            share_beside: Spread::of(&mut reads.shares).median,
        },
        contexts: bench.contexts.iter_mut().map(|c| c.result()).collect(),
        sequences: bench.sequences.iter_mut().map(|c| c.result()).collect(),
        operations: operations.into_iter().map(|o| o.against(&limits)).collect(),
        peak_rss_bytes: peak,
        work,
        limits,
    })
}

/// What reading memory gave during a measurement.
struct Reads {
    memory: Option<Reading>,
    best: f64,
    /// Of each decode, the share of the better of the reads beside it.
    shares: Vec<f64>,
}

impl Reads {
    fn read(&mut self) -> f64 {
        let rate = self.memory.as_ref().map_or(f64::NAN, Reading::bandwidth);
        self.best = self.best.max(rate);
        rate
    }
}

/// The rounds of a measurement.
struct Bench<'m> {
    model: &'m Model,
    runner: Runner<'m>,
    prompt: Vec<u32>,
    decode: usize,
    fill: Vec<f64>,
    step: Vec<f64>,
    contexts: Vec<Case>,
    sequences: Vec<Case>,
}

/// Decode of some caches that are read before the first round.
struct Case {
    count: usize,
    caches: Vec<Cache>,
    rates: Vec<f64>,
    ratios: Vec<f64>,
}

impl Case {
    fn result(&mut self) -> Other {
        let rate = Spread::of(&mut self.rates).median;
        Other { count: self.count, tokens_per_second: rate, ratio: Spread::of(&mut self.ratios).median }
    }
}

impl<'m> Bench<'m> {
    fn new(model: &'m Model, ask: &Ask) -> Result<Bench<'m>> {
        let longest = ask.contexts.iter().copied().max().unwrap_or(0).max(ask.prefill) + ask.decode;
        if ask.prefill == 0 || ask.decode == 0 || longest > model.spec.context {
            return Err(Error::Asked(format!(
                "prefill and decode take numbers from 1 on that, with the longest --context, fit the model's context of {}",
                model.spec.context
            )));
        }
        let mut runner = Runner::new(model);
        let text = |n: usize, seed: u64| -> Vec<u32> {
            (0..n).map(|i| (uniform(seed, i as u64) * model.spec.vocab as f64) as u32).collect()
        };
        let mut case = |count: usize, texts: usize, length: usize| -> Result<Case> {
            let mut caches = Vec::with_capacity(texts);
            for seed in 0..texts {
                let mut cache = Cache::with_room(model, length + ask.decode);
                runner.read(&text(length, 1 + seed as u64), &mut cache)?;
                caches.push(cache);
            }
            Ok(Case { count, caches, rates: Vec::new(), ratios: Vec::new() })
        };
        let contexts = ask.contexts.iter().map(|n| case(*n, 1, (*n).max(1))).collect::<Result<_>>()?;
        let sequences = ask.sequences.iter().map(|n| case(*n, (*n).max(1), ask.prefill)).collect::<Result<_>>()?;
        let prompt = text(ask.prefill, 1);
        Ok(Bench { model, runner, prompt, decode: ask.decode, fill: vec![], step: vec![], contexts, sequences })
    }

    /// One round, which counts if there are reads to compare it with, and the bytes that a token reads.
    fn round(&mut self, mut reads: Option<(&mut Reads, usize)>) -> Result<()> {
        let counts = reads.is_some();
        let mut cache = [Cache::with_room(self.model, self.prompt.len() + self.decode)];
        let begin = Instant::now();
        self.runner.read(&self.prompt, &mut cache[0])?;
        let fill = self.prompt.len() as f64 / begin.elapsed().as_secs_f64();
        let before = reads.as_mut().map_or(f64::NAN, |(reads, _)| reads.read());
        let step = decode(&mut self.runner, &mut cache, self.decode)?;
        if let Some((reads, bytes)) = &mut reads {
            let beside = before.max(reads.read());
            reads.shares.push(step * *bytes as f64 / beside);
        }
        if counts {
            self.fill.push(fill);
            self.step.push(step);
        }
        for case in self.contexts.iter_mut().chain(&mut self.sequences) {
            let length = case.caches[0].len();
            let rate = decode(&mut self.runner, &mut case.caches, self.decode)?;
            case.caches.iter_mut().for_each(|c| c.truncate(length));
            if counts {
                case.rates.push(rate);
                case.ratios.push(rate / step);
            }
        }
        Ok(())
    }
}

/// Generates `tokens` tokens for every cache; tokens per second over all of them.
fn decode(runner: &mut Runner<'_>, caches: &mut [Cache], tokens: usize) -> Result<f64> {
    let mut next = vec![[0u32]; caches.len()];
    let begin = Instant::now();
    for _ in 0..tokens {
        let logits = runner.step(&next, caches, Wanted::Last)?;
        next.iter_mut().enumerate().for_each(|(i, n)| n[0] = ops::argmax(logits.row(i)) as u32);
    }
    Ok((tokens * caches.len()) as f64 / begin.elapsed().as_secs_f64())
}

/// How close the logits of a packed model are to the exact ones.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
pub struct Check {
    /// Root mean square of the difference over that of the exact logits (less their mean).
    pub relative_error: f64,
    /// What it may be: the rounding of inputs explains so much, a wrong kernel gives more.
    pub bound: f64,
}

/// Tokens that [`exact_logits`] runs.
const CHECKED: usize = 4;

/// Logits of a few tokens on the exact path: weights decoded row by row, inputs and cache in `f32`.
///
/// # Errors
/// If the model cannot run.
pub fn exact_logits(model: &Model) -> Result<Vec<f32>> {
    let tokens: Vec<u32> = (0..CHECKED).map(|i| (uniform(9, i as u64) * model.spec.vocab as f64) as u32).collect();
    let logits = model.forward(&[&tokens], &mut ())?;
    // What it read from mapped files counts as nobody's memory from here on.
    model.release();
    Ok(logits.into_vec())
}

/// Runs the same tokens through the path that is timed, in a prompt of all but one and a step of the last.
///
/// # Errors
/// If the model cannot run, or its logits are further from the exact ones than rounded inputs explain.
pub fn check(model: &Model, exact: &[f32]) -> Result<Check> {
    let tokens: Vec<u32> = (0..CHECKED).map(|i| (uniform(9, i as u64) * model.spec.vocab as f64) as u32).collect();
    let mut runner = Runner::new(model);
    let mut cache = [Cache::new(model)];
    let mut got = runner.step(&[&tokens[..CHECKED - 1]], &mut cache, Wanted::All)?.as_slice().to_vec();
    got.extend_from_slice(runner.step(&[&tokens[CHECKED - 1..]], &mut cache, Wanted::All)?.as_slice());
    let mean = exact.iter().map(|v| f64::from(*v)).sum::<f64>() / exact.len().max(1) as f64;
    let power: f64 = exact.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum();
    let error: f64 = exact.iter().zip(&got).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    let relative_error = (error / power).sqrt();
    let bound = 0.15;
    if relative_error.is_nan() || relative_error > bound {
        return Err(Error::Asked(format!(
            "the fast path's logits differ from the exact ones by {relative_error:.3} of their size, more than {bound}; nothing was timed. Run `planish doctor`, and use --exact meanwhile"
        )));
    }
    Ok(Check { relative_error, bound })
}

/// Median and extremes of some measurements.
struct Spread {
    median: f64,
    range: [f64; 2],
}

impl Spread {
    fn of(values: &mut [f64]) -> Spread {
        values.sort_by(f64::total_cmp);
        let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
        Spread { median: at(values.len() / 2), range: [at(0), at(values.len().saturating_sub(1))] }
    }
}
