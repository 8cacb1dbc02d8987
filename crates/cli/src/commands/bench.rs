//! `planish bench`.

use super::{attach, fraction, key_value, open, prepare_model, print_json};
use crate::{
    args::{Bench, Common},
    show,
};
use anyhow::Result;
use model::{Drawn, Model};
use optimize::speed::{self, Ask, Check, Speed};
use serde_json::{Value, json};
use std::path::PathBuf;
use tensor::{Storage, Weight};

/// Measures speed.
pub fn run(args: &Bench, common: &Common) -> Result<u8> {
    let kv = key_value(args.running.kv.as_deref())?;
    let (mut model, path) = subject(args, common.seed)?;
    attach(&mut model, &args.attached)?;
    let (exact, mut check) = (args.running.exact, None);
    let logits = if exact { None } else { Some(speed::exact_logits(&model)?) };
    speed::forget_peak();
    let slow = prepare_model(&mut model, exact, kv)?;
    if let Some(logits) = logits {
        check = Some(speed::check(&model, &logits)?);
    }
    let ask = Ask {
        prefill: args.prefill,
        decode: args.decode,
        contexts: args.contexts.clone(),
        sequences: args.sequences.clone(),
        runs: args.runs,
        profile: args.profile,
    };
    let s = speed::measure(&model, &ask)?;
    if common.json {
        let mut value = serde_json::to_value(&s)?;
        if let Value::Object(fields) = &mut value {
            fields.insert("model".into(), about(&model, path.as_deref(), &slow));
            fields.insert("check".into(), serde_json::to_value(check)?);
        }
        print_json(&value)?;
    } else {
        print(&s, check);
        for site in &slow {
            sayln!("{site}: no kernel multiplies its codes, which lie in memory as 16-bit floats");
        }
    }
    Ok(0)
}

/// The model that is timed, its weights as they were read or rounded to `--storage`.
fn subject(args: &Bench, seed: u64) -> Result<(Model, Option<PathBuf>)> {
    let storage = args.storage.as_deref().map(Storage::parse).transpose()?;
    if let Some(shape) = &args.shape {
        let how = Drawn {
            storage: storage.unwrap_or(Storage::Bf16),
            edges: args.edges.as_deref().map(Storage::parse).transpose()?,
            parameters: args.parameters.as_deref().map(|part| fraction(part, "--parameters")).transpose()?,
        };
        return Ok((Model::of_shape(shape, how, seed)?, Some(shape.clone())));
    }
    let mut gpt = open(&args.model)?;
    if let Some(storage) = storage {
        let head = gpt.model.spec.resolve(model::Site::HEAD);
        for (site, linear) in &mut gpt.model.linears {
            // Tables that are only looked up stay as they are.
            if site.layer.is_some() || *site == head {
                linear.weight = Weight::encode(&linear.weight.to_tensor(), storage, None)?;
            }
        }
    }
    Ok((gpt.model, args.model.model.clone()))
}

fn about(model: &Model, path: Option<&std::path::Path>, slow: &[model::Site]) -> Value {
    let slow: Vec<String> = slow.iter().map(ToString::to_string).collect();
    json!({
        "path": path, "parameters": model.parameters(), "size_bytes": model.size_bytes(),
        "bits_per_weight": model.bits_per_weight(), "key_value": model.key_value.name(), "without_fast_form": slow,
    })
}

fn print(s: &Speed, check: Option<Check>) {
    let (p, d, l, w) = (&s.prefill, &s.decode, &s.limits, &s.work);
    let speed = |rate: f64, range: [f64; 2]| format!("{rate:.1} tok/s ({:.1} to {:.1})", range[0], range[1]);
    let mut rows = vec![
        vec![
            format!("prefill, {} tokens", p.tokens),
            speed(p.tokens_per_second, p.range),
            format!("{:.1} % of peak arithmetic", 100.0 * p.share_of_peak),
        ],
        vec![
            format!("decode, {} tokens", d.tokens),
            speed(d.tokens_per_second, d.range),
            format!(
                "{:.1} GB/s, {:.1} % of {:.1} ({:.1} % of reads beside it)",
                d.gigabytes_per_second,
                100.0 * d.share_of_bandwidth,
                l.read_gigabytes_per_second,
                100.0 * d.share_beside,
            ),
        ],
    ];
    for (what, cases) in [("earlier tokens", &s.contexts), ("texts at once", &s.sequences)] {
        rows.extend(cases.iter().map(|c| {
            vec![
                format!("decode, {} {what}", c.count),
                format!("{:.1} tok/s", c.tokens_per_second),
                format!("{:.2} x the plain decode", c.ratio),
            ]
        }));
    }
    rows.push(vec![
        "a token takes".into(),
        format!("{} of weights, {:.2} Gop", show::size(w.bytes_per_token as u64), w.operations_per_token as f64 / 1e9),
        format!("{} of keys and values", show::size(w.cache_bytes_per_token as u64)),
    ]);
    rows.push(vec!["peak memory".into(), show::size(s.peak_rss_bytes), String::new()]);
    rows.push(vec![
        format!("limits, {} threads", l.threads),
        format!("{:.1} GB/s", l.read_gigabytes_per_second),
        format!("int8 {:.0}, bf16 {:.0}, f32 {:.0} Gop/s", l.int8_gigaops, l.bf16_gigaflops, l.f32_gigaflops),
    ]);
    if let Some(check) = check {
        let error = format!("{:.4} of the logits' size", check.relative_error);
        rows.push(vec!["against the exact path".into(), error, String::new()]);
    }
    show::table(&rows);
    if !s.operations.is_empty() {
        sayln!("");
        profile(&s.operations);
    }
}

fn profile(rows: &[speed::Row]) {
    let number = |v: Option<f64>, unit: &str| v.map_or(String::new(), |v| format!("{v:.1} {unit}"));
    let table: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                r.phase.clone(),
                r.operation.clone(),
                format!("{:.2} us/token", r.microseconds_per_token),
                format!("{:.1} %", 100.0 * r.share_of_time),
                number(r.gigabytes_per_second, "GB/s"),
                number(r.gigaops, "Gop/s"),
                r.share_of_limit.map_or(String::new(), |v| format!("{:.0} % of the limit", 100.0 * v)),
            ]
        })
        .collect();
    show::table(&table);
}
