//! `planish audit`.

use super::{open, print_json};
use crate::{
    args::{self, Common},
    exit,
    show::{self, Bar},
};
use anyhow::{Result, bail};
use model::Gpt;
use optimize::{
    artefact::{self, Target},
    audit::{self, Audit},
    data::{self, Cutting},
};
use serde_json::json;

/// Tokens of text that are read with both models.
const TOKENS: usize = 8192;

/// Looks at a quantized model that somebody made, and makes its bad matrices anew where asked.
pub fn run(args: &args::Audit, common: &Common) -> Result<u8> {
    let gpt = open(&args.model)?;
    let base = args.against.as_ref().map(|p| open(&args::Model { model: Some(p.clone()) })).transpose()?;
    let documents = match (&args.data, &base) {
        (Some(path), Some(base)) => {
            let context = gpt.model.spec.context.min(base.model.spec.context);
            let cutting = Cutting { separator: args.separator.clone(), context, blocks: false };
            let mut all = data::documents(&data::read_text(path)?, &gpt.tokenizer, &cutting)?;
            let mut held = 0;
            all.retain(|d| {
                held += d.ids.len();
                held <= TOKENS || held == d.ids.len()
            });
            all
        }
        (Some(_), None) => bail!("--data is read with the original too: give --against"),
        _ => Vec::new(),
    };
    let bar = Bar::new();
    let found = audit::audit(&gpt.model, base.as_ref().map(|b| &b.model), &documents, &bar)?;
    drop(bar);
    let bad = found.bad();
    let mut written = None;
    if let Some(out) = &args.repair {
        let Some(base) = &base else { bail!("--repair takes matrices from the original: give --against") };
        artefact::check_free(out, args.overwrite)?;
        let target = Target::like(&gpt, out)?;
        let model = audit::repaired(&gpt.model, &base.model, &found)?;
        target.place(&gpt, &model, out, args.overwrite)?;
        let again = audit::audit(&Gpt::open(out)?.model, Some(&base.model), &documents, &Bar::new())?;
        written = Some((out, again));
    }
    if common.json {
        print_json(&json!({
            "audit": found, "decoded": gpt.decoded, "unused": gpt.unused,
            "repaired": written.as_ref().map(|(out, again)| json!({"out": out, "sites": bad.len(), "audit": again})),
        }))?;
    } else {
        print(&gpt, &found, args.all);
        if let Some((out, again)) = &written {
            sayln!("");
            sayln!("{}: written, {} matrices made anew from the original", out.display(), bad.len());
            print_against(again);
        }
    }
    let clean = written.map_or(found.is_clean(), |(_, again)| again.is_clean());
    Ok(if clean { 0 } else { exit::GATE })
}

fn print(gpt: &Gpt, found: &Audit, all: bool) {
    let number = |x: Option<f64>, digits: usize| x.map_or(String::new(), |x| format!("{x:.digits$}"));
    let small = |x: Option<f64>| x.map_or(String::new(), show::small);
    let shown: Vec<_> = found.matrices.iter().filter(|m| all || !m.faults.is_empty()).collect();
    if !shown.is_empty() {
        let heads = ["site", "storage", "bits", "effective", "error", "of rounding", ""];
        let mut rows = vec![heads.map(String::from).to_vec()];
        for m in shown {
            rows.push(vec![
                m.site.clone(),
                m.storage.clone(),
                format!("{:.3}", m.bits),
                number(m.effective_bits, 2),
                small(m.error),
                small(m.rounding),
                m.faults.join("; "),
            ]);
        }
        show::table(&rows);
        sayln!("");
    }
    found.others.iter().for_each(|o| sayln!("fault: {o}"));
    gpt.decoded.iter().for_each(|d| sayln!("decoded into floats: {d}"));
    gpt.unused.iter().for_each(|name| sayln!("not used: {name}"));
    let bad = found.matrices.iter().filter(|m| !m.faults.is_empty()).count();
    sayln!("matrices: {}, bad: {bad}", found.matrices.len());
    sayln!("size: {} ({:.3} bits per weight)", show::size(found.size_bytes as u64), found.bits_per_weight);
    sayln!(
        "effective bits: {:.3} of a matrix's value on average, by how often each code is used",
        found.effective_bits
    );
    print_against(found);
}

fn print_against(found: &Audit) {
    if let Some(x) = &found.against {
        let ci =
            x.kl_ci95.map_or(String::new(), |c| format!(" (95 %: {} to {})", show::small(c[0]), show::small(c[1])));
        sayln!("mean KL to the original: {} nats{ci}", show::small(x.kl_mean));
        sayln!("perplexity ratio: {:.5}, same likeliest token: {:.2} %", x.perplexity_ratio, 100.0 * x.top1_agreement);
    }
}
