//! `planish finetune`: a model learns a text.

use super::{open, print_json};
use crate::{
    args::{Common, Finetune},
    show::{self, Bar},
};
use anyhow::{Context, Result, bail};
use optimize::teach::{self, Lesson, Place, Taught};
use serde_json::json;
use train::{
    Curve, Precision, Rule, Schedule,
    course::{Plan, Record},
};

/// Predictions that are in memory together unless a sequence is longer.
const PART: usize = 2048;

/// Teaches a model.
pub fn run(args: &Finetune, common: &Common) -> Result<u8> {
    let gpt = open(&args.model)?;
    let lesson = lesson(args, gpt.model.spec.context, common.seed)?;
    let place = Place { out: args.out.clone(), overwrite: args.overwrite, restart: args.restart };
    let bar = Bar::new();
    let taught = teach::run(&gpt, &lesson, &place, &bar)?;
    drop(bar);
    if common.json {
        print_json(&said(&taught, args))?;
    } else {
        print(&taught, args);
    }
    Ok(0)
}

fn lesson(args: &Finetune, longest: usize, seed: u64) -> Result<Lesson> {
    if args.steps == 0 || args.batch == 0 {
        bail!("--steps and --batch take numbers from 1 on");
    }
    if !(args.lr > 0.0 && args.lr.is_finite()) {
        bail!("--lr takes a number above 0, not {}", args.lr);
    }
    let context = args.context.unwrap_or_else(|| longest.min(1024));
    let predictions = args.batch * context;
    let warm_up = args.warm_up.unwrap_or(args.steps / 20);
    Ok(Lesson {
        data: args.data.clone(),
        validation: args.validation.clone(),
        separator: args.separator.clone(),
        context,
        plan: Plan {
            schedule: Schedule {
                rate: args.lr,
                warm_up,
                steps: args.steps,
                curve: named(&Curve::ALL, &args.schedule, "--schedule")?,
                least: args.least,
            },
            predictions,
            part: predictions.min(PART.max(context)),
            validate_every: args.validate_every.unwrap_or_else(|| (args.steps / 10).max(1)).max(1),
            patience: args.patience,
            checkpoint_every: args.checkpoint_every.max(1),
        },
        rule: Rule { decay: args.weight_decay, clip: args.clip, beta: [args.beta1, args.beta2], ..Rule::default() },
        precision: named(&Precision::ALL, &args.precision, "--precision")?,
        seed,
    })
}

/// The value that a word stands for.
fn named<T: Copy>(all: &[(&str, T)], word: &str, option: &str) -> Result<T> {
    let known = || all.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let found = all.iter().find(|(name, _)| *name == word);
    found.map(|(_, value)| *value).with_context(|| format!("{option} takes {}, not {word:?}", known()))
}

fn said(taught: &Taught, args: &Finetune) -> serde_json::Value {
    let record = &taught.record;
    json!({
        "out": args.out, "already_done": taught.already,
        "steps": record.points.len(), "tokens": record.predictions, "tokens_per_second": taught.tokens_per_second,
        "loss": record.points.last().map(|p| p.loss), "validation_loss": record.best.map(|(_, loss)| loss),
        "validation_loss_before": record.before, "best_step": record.best.map(|(step, _)| step),
        "ended_early": record.ended_early, "peak_rss_bytes": taught.peak_rss_bytes,
        "share_of_peak": taught.share_of_peak,
    })
}

fn print(taught: &Taught, args: &Finetune) {
    let record = &taught.record;
    let before = record.before.map_or(String::new(), |loss| format!("{loss:.4}"));
    let first = record.points.first().map_or(String::new(), |p| format!("{:.4}", p.loss));
    let last = record.points.last().map_or(String::new(), |p| format!("{:.4}", p.loss));
    let best = record.best.map_or(String::new(), |(_, loss)| format!("{loss:.4}"));
    let at = record.best.map_or(String::new(), |(step, _)| format!("at step {step}"));
    let mut rows = vec![
        vec![String::new(), "before".into(), "after".into()],
        vec!["training loss, nats".into(), first, last, format!("{} steps", record.points.len())],
        vec!["validation loss, nats".into(), before, best, at],
    ];
    if !taught.already {
        let speed = format!("{:.0}", taught.tokens_per_second);
        let share = format!("{:.1} % of peak arithmetic", 100.0 * taught.share_of_peak);
        rows.push(vec!["tokens/s".into(), String::new(), speed, share]);
        rows.push(vec!["peak memory".into(), String::new(), show::size(taught.peak_rss_bytes)]);
    }
    show::table(&rows);
    curve(record);
    if record.ended_early {
        println!("ended early: {} validations in a row were no better", record.worse);
    }
    let done = if taught.already { "was done already" } else { "written" };
    println!("{}: {done}; training.json and manifest.json lie with it", args.out.display());
}

/// The loss over the steps, in one line.
fn curve(record: &Record) {
    const HEIGHTS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    const WIDTH: usize = 60;
    let losses: Vec<f64> = record.points.iter().map(|p| p.loss).collect();
    let columns = losses.len().min(WIDTH);
    if columns < 2 {
        return;
    }
    let means: Vec<f64> = (0..columns)
        .map(|c| {
            let part = &losses[c * losses.len() / columns..(c + 1) * losses.len() / columns];
            part.iter().sum::<f64>() / part.len() as f64
        })
        .collect();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let height = |v: &f64| HEIGHTS[((v - low) / (high - low).max(1e-12) * 7.0).round() as usize];
    println!("loss {high:.3} to {low:.3}  {}", means.iter().map(height).collect::<String>());
}
