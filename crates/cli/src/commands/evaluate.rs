//! `planish evaluate`.

use super::{open_to_run, place, print_json};
use crate::{
    args::{Common, Evaluate},
    show::{self, Bar},
};
use anyhow::{Context, Result, bail};
use model::Gpt;
use optimize::{
    builtin,
    data::{self, Cutting, Document},
    evaluate::{self, Evaluation},
    progress::Progress,
    run::file_bytes,
};
use std::{fs::File, io::BufWriter, io::Write, path::Path};

/// Measures quality.
pub fn run(args: &Evaluate, common: &Common) -> Result<u8> {
    let gpt = open_to_run(&place(&args.model)?, &args.attached, !args.fast, args.kv.as_deref())?;
    let blocks = match args.protocol.as_str() {
        "documents" => false,
        "blocks" => true,
        other => bail!("--protocol takes documents or blocks, not {other:?}"),
    };
    let context = args.context.unwrap_or(gpt.model.spec.context);
    if context < 2 || context > gpt.model.spec.context {
        bail!("--context takes a number from 2 to the model's {}", gpt.model.spec.context);
    }
    let cutting = Cutting { separator: args.separator.clone(), context, blocks };
    let text = match &args.data {
        Some(path) => data::read_text(path)?,
        None if args.model.model.is_none() => builtin::text(common.seed),
        None => bail!("give --data FILE, the text to measure on"),
    };
    let mut documents = data::documents(&text, &gpt.tokenizer, &cutting)?;
    documents.truncate(args.documents.unwrap_or(usize::MAX));
    if documents.is_empty() {
        bail!("the text holds no document of two tokens or more");
    }
    if let Some(path) = &args.logits {
        write_logits(&gpt, &documents, path)?;
    }
    let bar = Bar::new();
    bar.begin("evaluating", documents.len() as u64);
    let result = match &args.against {
        None => {
            let scores = evaluate::score(&gpt.model, &documents, &bar)?;
            evaluate::summarize(&gpt.model, file_bytes(&gpt.path), &documents, &scores)
        }
        Some(base) => {
            let base = Gpt::open(base)?;
            let pairs = evaluate::compare(&gpt.model, &base.model, &documents, &bar)?;
            let scores: Vec<_> = pairs.iter().map(|p| p.score.clone()).collect();
            let mut e = evaluate::summarize(&gpt.model, file_bytes(&gpt.path), &documents, &scores);
            e.against = Some(evaluate::summarize_pair(&pairs));
            e
        }
    };
    drop(bar);
    if common.json {
        print_json(&result)?
    } else {
        print(&result)
    }
    Ok(0)
}

fn print(e: &Evaluation) {
    let ci = |c: Option<[f64; 2]>| {
        c.map_or("(under 30 documents: no interval)".into(), |c| format!("[{:.5}, {:.5}]", c[0], c[1]))
    };
    let mut rows = vec![
        vec!["documents, predicted tokens".to_string(), format!("{}, {}", e.documents, e.tokens)],
        vec!["perplexity".into(), format!("{:.4}", e.perplexity), ci(e.perplexity_ci95)],
        vec!["nats per token".into(), format!("{:.5}", e.nll)],
        vec!["bits per byte".into(), format!("{:.5}", e.bits_per_byte)],
        vec!["size".into(), show::size(e.size_bytes as u64), format!("{:.3} bits per weight", e.bits_per_weight)],
    ];
    if let Some(a) = &e.against {
        rows.push(vec![
            "perplexity over the original's".into(),
            format!("{:.5}", a.perplexity_ratio),
            ci(a.perplexity_ratio_ci95),
        ]);
        let kl_ci = a.kl_ci95.map_or_else(|| ci(None), |c| format!("[{}, {}]", show::small(c[0]), show::small(c[1])));
        rows.push(vec!["mean KL, nats".into(), show::small(a.kl_mean), kl_ci]);
        rows.push(vec![
            "KL: median, 99 %, largest".into(),
            format!("{:.6}, {:.5}, {:.4}", a.kl_median, a.kl_p99, a.kl_max),
        ]);
        rows.push(vec!["same likeliest token".into(), format!("{:.2} %", 100.0 * a.top1_agreement)]);
    }
    show::table(&rows);
}

/// Writes what other programs compare themselves with.
fn write_logits(gpt: &Gpt, documents: &[Document], path: &Path) -> Result<()> {
    let create =
        |p: &Path| File::create(p).map(BufWriter::new).with_context(|| format!("cannot write {}", p.display()));
    let mut ids_path = path.as_os_str().to_owned();
    ids_path.push(".ids");
    let (mut logits, mut ids) = (create(path)?, create(Path::new(&ids_path))?);
    for d in documents {
        let rows = gpt.model.forward(&[&d.ids], &mut ())?;
        for v in rows.as_slice() {
            logits.write_all(&v.to_le_bytes())?;
        }
        for id in &d.ids {
            ids.write_all(&id.to_le_bytes())?;
        }
    }
    logits.flush()?;
    Ok(ids.flush()?)
}
