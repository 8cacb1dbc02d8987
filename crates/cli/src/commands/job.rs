//! Running a recipe and showing what came of it: shared by `quantize`, `optimize` and `run`.

use super::{bytes, open, print_json};
use crate::{
    args::{Common, Data, Model, Run, Texts, Writing},
    show::{self, Bar},
};
use anyhow::{Result, bail};
use model::Gpt;
use optimize::{
    builtin,
    gate::Proof,
    recipe::Recipe,
    report::Report,
    run::{self, Outcome, Settings},
};
use serde_json::json;
use std::path::PathBuf;

/// Runs a recipe that the command line wrote.
pub fn run(model: &Model, data: &Data, mut recipe: Recipe, writing: &Writing, common: &Common) -> Result<u8> {
    let gpt = open(model)?;
    fill(&mut recipe, &gpt, data);
    recipe.format = writing.format.clone();
    let bar = Bar::new();
    let loaded = load_data(&gpt, model, &recipe, &bar)?;
    let settings = settings(writing, model, common)?;
    let outcome = run::run(&gpt, &recipe, &loaded, &settings, Report::default(), &bar)?;
    drop(bar);
    show_outcome(&outcome, common)
}

/// Puts model and data into a recipe.
pub fn fill(recipe: &mut Recipe, gpt: &Gpt, data: &Data) {
    recipe.model = Some(gpt.path.clone());
    recipe.stats = data.stats.clone();
    fill_text(recipe, &data.text);
}

/// Puts the text and how methods see it into a recipe.
pub fn fill_text(recipe: &mut Recipe, text: &Texts) {
    recipe.data = text.data.clone();
    if text.separator != optimize::data::SEPARATOR {
        recipe.separator = Some(text.separator.clone());
    }
    recipe.calibration_tokens = text.calibration_tokens;
    recipe.packed = text.packed;
}

/// The text of a job: the user's, the sample's own stories, or what the model writes.
pub fn load_data(gpt: &Gpt, model: &Model, recipe: &Recipe, bar: &Bar) -> Result<run::Data> {
    if recipe.data.is_none() && model.model.is_none() {
        return Ok(builtin::data(gpt, recipe.seed)?);
    }
    Ok(run::load_data(gpt, recipe, bar)?)
}

/// How the result is written.
pub fn settings(writing: &Writing, model: &Model, common: &Common) -> Result<Settings> {
    let out = match (&writing.out, &model.model) {
        (Some(out), _) => out.clone(),
        (None, None) => PathBuf::from("planish-sample-optimized"),
        (None, Some(_)) => bail!("give --out PATH: a directory, or a file that ends in .gguf"),
    };
    Ok(Settings {
        out,
        overwrite: writing.overwrite,
        restart: writing.restart,
        force: writing.force,
        strict: writing.strict,
        requantize: writing.requantize,
        min_speed: None,
        max_ram: common.max_ram.as_deref().map(|t| bytes(t, "--max-ram")).transpose()?,
    })
}

/// Replays a recipe from a file.
pub fn replay(args: &Run, common: &Common) -> Result<u8> {
    let text = std::fs::read_to_string(&args.recipe).map_err(formats::Error::io(&args.recipe, "read it"))?;
    let mut recipe = Recipe::parse(&text)?;
    // The sample's recipe names the folder that it was unpacked to, which may be gone.
    let named = args.model.clone().or(recipe.model.clone()).filter(|p| !builtin::is_sample(p));
    let model = Model { model: named };
    let gpt = open(&model)?;
    recipe.model = Some(gpt.path.clone());
    recipe.data = args.data.clone().or(recipe.data);
    recipe.stats = args.stats.clone().or(recipe.stats);
    recipe.format = args.writing.format.clone().or(recipe.format);
    let bar = Bar::new();
    let loaded = load_data(&gpt, &model, &recipe, &bar)?;
    let settings = settings(&args.writing, &model, common)?;
    let outcome = run::run(&gpt, &recipe, &loaded, &settings, Report::default(), &bar)?;
    drop(bar);
    show_outcome(&outcome, common)
}

/// Shows before and after.
pub fn show_outcome(outcome: &Outcome, common: &Common) -> Result<u8> {
    let p = &outcome.proof;
    if common.json {
        print_json(
            &json!({"out": outcome.out, "already_done": outcome.already, "decode_speed_ratio": outcome.speed, "proof": p}),
        )?;
    } else {
        table(p, outcome.speed);
        for c in &p.gate.checks {
            sayln!("gate: {}: {}", if c.passed { "passed" } else { "failed" }, c.words);
        }
        p.warnings.iter().for_each(|w| sayln!("note: {w}"));
        let done = if outcome.already { "was done already" } else { "written" };
        sayln!(
            "{}: {done}; report.html, proof.json, manifest.json and planish.toml lie with it",
            outcome.out.display()
        );
    }
    Ok(if p.gate.is_good() { 0 } else { crate::exit::GATE })
}

fn table(p: &Proof, speed: Option<[f64; 3]>) {
    let (b, a) = (&p.before, &p.after);
    let ci = |c: Option<[f64; 2]>, digits: usize| {
        c.map_or(String::new(), |c| format!("95 %: {:.digits$} to {:.digits$}", c[0], c[1]))
    };
    let share = 100.0 * a.size_bytes as f64 / (2.0 * a.parameters as f64);
    let mut rows = vec![
        vec![String::new(), "before".into(), "after".into()],
        vec![
            "size".into(),
            show::size(b.size_bytes as u64),
            show::size(a.size_bytes as u64),
            format!("{share:.1} % of 16-bit"),
        ],
        vec!["bits per weight".into(), format!("{:.2}", b.bits_per_weight), format!("{:.2}", a.bits_per_weight)],
        vec![
            "perplexity".into(),
            format!("{:.4}", b.perplexity),
            format!("{:.4}", a.perplexity),
            ci(a.perplexity_ci95, 3),
        ],
    ];
    if let Some(x) = &a.against {
        rows.push(vec![
            "perplexity ratio".into(),
            "1".into(),
            format!("{:.5}", x.perplexity_ratio),
            ci(x.perplexity_ratio_ci95, 5),
        ]);
        let kl_ci =
            x.kl_ci95.map_or(String::new(), |c| format!("95 %: {} to {}", show::small(c[0]), show::small(c[1])));
        rows.push(vec!["mean KL, nats".into(), "0".into(), show::small(x.kl_mean), kl_ci]);
        rows.push(vec!["same likeliest token".into(), "100 %".into(), format!("{:.2} %", 100.0 * x.top1_agreement)]);
    }
    if let Some([low, median, high]) = speed {
        rows.push(vec!["decode speed".into(), "1".into(), format!("{median:.2}"), format!("{low:.2} to {high:.2}")]);
    }
    if let Some(h) = p.entropy_nats_per_token {
        rows.push(vec![
            "nats above entropy".into(),
            format!("{:.4}", b.nll - h),
            format!("{:.4}", a.nll - h),
            "per token".into(),
        ]);
    }
    let mut costs: Vec<(f64, &str)> = p.sites.iter().filter_map(|s| Some((s.cost?, s.site.as_str()))).collect();
    costs.sort_by(|a, b| b.0.total_cmp(&a.0));
    let costs: Vec<String> = costs.iter().take(3).map(|(cost, site)| format!("{site} {:.2} %", 100.0 * cost)).collect();
    if !costs.is_empty() {
        rows.push(vec!["largest errors".into(), String::new(), costs.join(", "), "of what matrices return".into()]);
    }
    rows.push(vec!["peak memory".into(), String::new(), show::size(optimize::speed::peak_rss_bytes())]);
    show::table(&rows);
}
