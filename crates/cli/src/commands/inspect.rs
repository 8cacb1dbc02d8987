//! `planish inspect`.

use super::{open, print_json};
use crate::{
    args::{Common, Model},
    show,
};
use anyhow::Result;
use model::Gpt;
use optimize::audit;
use serde_json::{Value, json};

/// Shows what a model is made of and what is wrong with it.
pub fn run(args: &Model, common: &Common) -> Result<u8> {
    let gpt = open(args)?;
    let faults = faults(&gpt);
    if common.json {
        print_json(&describe(&gpt, &faults))?;
        return Ok(0);
    }
    let (m, s) = (&gpt.model, &gpt.model.spec);
    let head = &s.blocks[0];
    show::table(&[
        vec!["family".into(), m.family.name.into()],
        vec!["blocks, width, hidden".into(), format!("{}, {}, {}", s.blocks.len(), s.dim, head.hidden)],
        vec!["heads, key heads, head width".into(), format!("{}, {}, {}", head.heads, head.kv_heads, head.head_dim)],
        vec!["vocabulary, context".into(), format!("{}, {}", s.vocab, s.context)],
        vec!["embeddings".into(), if s.tied { "tied to the head" } else { "not tied" }.into()],
        vec!["parameters".into(), m.parameters().to_string()],
        vec![
            "size".into(),
            format!("{} ({:.3} bits per weight)", show::size(m.size_bytes() as u64), m.bits_per_weight()),
        ],
        vec!["BOS added, ends at".into(), format!("{}, {:?}", gpt.tokenizer.adds_bos(), gpt.ends)],
    ]);
    sayln!("");
    let mut rows = vec![vec!["site".to_string(), "shape".into(), "storage".into(), "bytes".into()]];
    for (site, l) in &m.linears {
        let w = &l.weight;
        rows.push(vec![site.to_string(), format!("{} x {}", w.rows(), w.cols()), w.name(), w.size_bytes().to_string()]);
    }
    show::table(&rows);
    for fault in faults {
        sayln!("fault: {fault}");
    }
    for matrix in &gpt.decoded {
        sayln!("decoded into floats: {matrix}");
    }
    for name in &gpt.unused {
        sayln!("not used: {name}");
    }
    Ok(0)
}

/// Weights that no good model has.
fn faults(gpt: &Gpt) -> Vec<String> {
    let of = |(site, l): (&model::Site, &tensor::Linear)| {
        let found = audit::faults_of(&l.weight.to_tensor());
        found.into_iter().map(|fault| format!("{site} {fault}")).collect::<Vec<_>>()
    };
    gpt.model.linears.iter().flat_map(of).collect()
}

fn describe(gpt: &Gpt, faults: &[String]) -> Value {
    let (m, s) = (&gpt.model, &gpt.model.spec);
    let sites: Vec<Value> = m
        .linears
        .iter()
        .map(|(site, l)| {
            let w = &l.weight;
            json!({
                "site": site.to_string(), "shape": [w.rows(), w.cols()], "storage": w.name(),
                "bytes": w.size_bytes(), "bits_per_weight": 8.0 * w.size_bytes() as f64 / w.len().max(1) as f64,
            })
        })
        .collect();
    json!({
        "family": m.family.name, "blocks": s.blocks.len(), "dim": s.dim, "hidden": s.blocks[0].hidden,
        "heads": s.blocks[0].heads, "kv_heads": s.blocks[0].kv_heads, "head_dim": s.blocks[0].head_dim,
        "vocab": s.vocab, "context": s.context, "tied": s.tied, "parameters": m.parameters(),
        "size_bytes": m.size_bytes(), "bits_per_weight": m.bits_per_weight(), "adds_bos": gpt.tokenizer.adds_bos(),
        "ends": gpt.ends, "sites": sites, "faults": faults, "unused": gpt.unused, "decoded": gpt.decoded,
    })
}
