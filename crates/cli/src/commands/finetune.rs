//! `planish finetune`: a model learns a text.

use super::{converse_by, open, overrides, print_json};
use crate::{
    args::{Common, Finetune, Lesson as LessonArgs},
    show::{self as screen, Bar},
};
use anyhow::{Context, Result};
use optimize::{
    lesson::{Codes, Lesson, Settings, Texts},
    teach::{self, Place, Taught},
};
use serde_json::json;
use std::path::Path;
use train::{Curve, OptimizerKind, Precision, course::Record};

/// Teaches a model.
pub fn run(args: &Finetune, common: &Common) -> Result<u8> {
    let mut gpt = open(&args.model)?;
    converse_by(&mut gpt, args.lesson.template.as_deref())?;
    let lesson = lesson(&args.lesson, gpt.model.spec.context, common.seed)?;
    let place = args.place.place();
    let bar = Bar::new();
    let taught = teach::run(&gpt, None, &lesson, &place, &bar)?;
    drop(bar);
    show(&taught, &place, common)?;
    Ok(0)
}

/// The lesson that options ask for.
pub(super) fn lesson(args: &LessonArgs, longest: usize, seed: u64) -> Result<Lesson> {
    let texts =
        Texts { data: args.data.clone(), validation: args.validation.clone(), separator: args.separator.clone() };
    let mut lesson = settings(args)?.lesson(texts, longest, seed)?;
    let sites = overrides(&args.overrides)?;
    if args.quantize.is_some() || !sites.is_empty() {
        let storage = args.quantize.clone().context("--override takes --quantize NAME beside it")?;
        lesson.codes = Some(Codes { storage, sites });
    }
    lesson.lora = args.lora.as_deref().map(str::parse).transpose()?;
    lesson.adapter = args.adapter.clone();
    Ok(lesson)
}

/// Says how it went.
pub(super) fn show(taught: &Taught, place: &Place, common: &Common) -> Result<()> {
    if common.json {
        return print_json(&said(taught, &place.out));
    }
    print(taught, &place.out);
    Ok(())
}

fn settings(args: &LessonArgs) -> Result<Settings> {
    Ok(Settings {
        steps: args.steps,
        batch: args.batch,
        part: args.part,
        context: args.context,
        join_documents: args.join_documents,
        lr: args.lr,
        schedule: named(&Curve::ALL, &args.schedule, "--schedule")?,
        least: args.least,
        decay_part: args.decay_part,
        warm_up: args.warm_up,
        optimizer: named(&OptimizerKind::ALL, &args.optimizer, "--optimizer")?,
        optimizer_bits: args.optimizer_bits,
        weight_decay: args.weight_decay,
        beta1: args.beta1,
        beta2: args.beta2,
        clip: args.clip,
        precision: named(&Precision::ALL, &args.precision, "--precision")?,
        validate_every: args.validate_every,
        patience: args.patience,
        checkpoint_every: args.checkpoint_every,
        checkpoint_activations: args.checkpoint_activations,
    })
}

/// The value that a word stands for.
pub(super) fn named<T: Copy>(all: &[(&str, T)], word: &str, option: &str) -> Result<T> {
    let known = || all.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let found = all.iter().find(|(name, _)| *name == word);
    found.map(|(_, value)| *value).with_context(|| format!("{option} takes {}, not {word:?}", known()))
}

fn said(taught: &Taught, out: &Path) -> serde_json::Value {
    let record = &taught.record;
    json!({
        "out": out, "already_done": taught.already,
        "steps": record.points.len(), "tokens": record.predictions, "tokens_per_second": taught.tokens_per_second,
        "loss": record.points.last().map(|p| p.loss), "validation_loss": record.best.map(|(_, loss)| loss),
        "validation_loss_before": record.before, "best_step": record.best.map(|(step, _)| step),
        "ended_early": record.ended_early, "peak_rss_bytes": taught.peak_rss_bytes,
        "share_of_peak": taught.share_of_peak, "skipped_steps": record.skipped, "loss_scale": taught.loss_scale,
        "optimizer_bytes": taught.optimizer_bytes,
    })
}

fn print(taught: &Taught, out: &Path) {
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
        rows.push(vec!["peak memory".into(), String::new(), screen::size(taught.peak_rss_bytes)]);
    }
    if let Some(scale) = taught.loss_scale {
        let skipped = format!("{} steps skipped", record.skipped);
        rows.push(vec!["scale of the loss".into(), String::new(), format!("{scale}"), skipped]);
    }
    screen::table(&rows);
    curve(record);
    if record.ended_early {
        sayln!("ended early: {} validations in a row were no better", record.worse);
    }
    if let (Some(before), Some((_, best))) = (record.before, record.best)
        && best > before
    {
        sayln!("the model was better before it learned: lower --lr, or give it more text");
    }
    let done = if taught.already { "was done already" } else { "written" };
    sayln!("{}: {done}; training.json and manifest.json lie with it", out.display());
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
    sayln!("loss {high:.3} to {low:.3}  {}", means.iter().map(height).collect::<String>());
}
