//! `report.html`: what was gained, what was lost and how sure that is, on one page without network.

use crate::{
    changes::Form,
    gate::Proof,
    recipe::Recipe,
    solve::{Point, Sensitivity},
};
use model::{Gpt, Site};
use std::{collections::BTreeMap, fmt::Write};
use tensor::Storage;

/// What a job knows beyond its proof.
#[derive(Default)]
pub struct Report {
    /// What each storage of each site costs, where the solver measured it.
    pub sensitivities: Vec<Sensitivity>,
    /// The trade-off front that the solver saw.
    pub front: Vec<Point>,
}

/// A token on which original and result differ.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Text before it.
    pub context: String,
    /// What the original would say.
    pub before: String,
    /// What the result would say.
    pub after: String,
    /// Divergence in nats.
    pub kl: f64,
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;color:#1a1a1a;background:#fff}\
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%}\
td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}\
.passed{color:#176f2c}.failed{color:#a40e26}code{background:#f2f2f2;padding:0 .25rem}svg{max-width:100%}\
@media(prefers-color-scheme:dark){body{background:#161616;color:#e6e6e6}td,th{border-color:#444}code{background:#2a2a2a}.passed{color:#5bd377}.failed{color:#ff7b88}}";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

impl Report {
    /// The page.
    pub fn html(
        &self,
        before: &Gpt,
        after: &Gpt,
        recipe: &Recipe,
        proof: &Proof,
        differences: &[Difference],
    ) -> String {
        let name = before.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = write!(
            out,
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
             <title>{0}: planish report</title><style>{STYLE}</style></head><body><h1>{0}: {1:.1} % of its 16-bit size</h1>",
            escape(&name),
            100.0 * proof.after.size_bytes as f64 / (2.0 * proof.after.parameters as f64),
        );
        self.verdict(&mut out, proof);
        summary(&mut out, proof);
        self.front(&mut out, proof);
        self.sites(&mut out, after, proof);
        show_differences(&mut out, differences);
        let text = recipe.to_text().unwrap_or_default();
        let _ = writeln!(out, "<h2>The recipe</h2><pre><code>{}</code></pre></body></html>", escape(&text));
        out
    }

    fn verdict(&self, out: &mut String, proof: &Proof) {
        let class = &proof.gate.result;
        let _ = write!(
            out,
            "<p>Gate: <strong class=\"{class}\">{class}</strong>, on {} documents of {}.</p><ul>",
            proof.documents[2],
            escape(&proof.data)
        );
        for c in &proof.gate.checks {
            let _ = write!(out, "<li>{}</li>", escape(&c.words));
        }
        for w in &proof.warnings {
            let _ = write!(out, "<li>{}</li>", escape(w));
        }
        out.push_str("</ul>");
    }

    fn front(&self, out: &mut String, proof: &Proof) {
        if self.front.len() < 2 {
            return;
        }
        out.push_str("<h2>The trade-off</h2><p>What each size costs, as the solver measured it site by site; the ring is the result, measured whole.</p>");
        let mut points: Vec<(f64, f64)> = self.front.iter().map(|p| (p.bytes as f64, p.kl.max(1e-9).log10())).collect();
        let kl = proof.after.against.as_ref().map_or(0.0, |a| a.kl_mean);
        points.push((proof.after.size_bytes as f64, kl.max(1e-9).log10()));
        let ends = |f: fn(&(f64, f64)) -> f64| {
            points.iter().map(f).fold((f64::MAX, f64::MIN), |(a, b), v| (a.min(v), b.max(v)))
        };
        let ((x0, x1), (y0, y1)) = (ends(|p| p.0), ends(|p| p.1));
        let x = |v: f64| 60.0 + 700.0 * (v - x0) / (x1 - x0).max(1e-9);
        let y = |v: f64| 20.0 + 240.0 * (y1 - v) / (y1 - y0).max(1e-9);
        let path: Vec<String> =
            points[..points.len() - 1].iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
        let (rx, ry) = points[points.len() - 1];
        let _ = write!(
            out,
            "<svg viewBox=\"0 0 800 300\" role=\"img\" aria-label=\"divergence over size\"><polyline fill=\"none\" stroke=\"#4477aa\" stroke-width=\"2\" points=\"{}\"/>\
             <circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"6\" fill=\"none\" stroke=\"#cc3311\" stroke-width=\"3\"/>\
             <g fill=\"currentColor\" font-size=\"12\"><text x=\"60\" y=\"290\">{} kB</text><text x=\"760\" y=\"290\" text-anchor=\"end\">{} kB</text>\
             <text x=\"4\" y=\"26\">{:.1e}</text><text x=\"4\" y=\"262\">{:.1e}</text><text x=\"4\" y=\"144\">KL, nats</text></g></svg>",
            path.join(" "),
            x(rx),
            y(ry),
            (x0 / 1000.0).round(),
            (x1 / 1000.0).round(),
            10f64.powf(y1),
            10f64.powf(y0),
        );
    }

    fn sites(&self, out: &mut String, after: &Gpt, proof: &Proof) {
        let measured: BTreeMap<Site, &Sensitivity> =
            self.sensitivities.iter().flat_map(|s| s.sites.iter().map(move |site| (*site, s))).collect();
        out.push_str(
            "<h2>Site by site</h2><p>The cost of a matrix is the squared error of what it returns, as a part of that, all else as in the \
             original; of one that reads fewer inputs than it did, with what reaches it.</p><table><tr><th>site</th><th>was</th><th>is</th>\
             <th>values</th><th>bytes</th><th>cost</th><th>its loss alone</th><th>why</th></tr>",
        );
        for change in &proof.sites {
            let site = change.site.parse::<Site>().ok();
            let storage = site.and_then(|site| after.model.linears.get(&site)).map(|l| l.weight.storage());
            let alone = site.and_then(|site| measured.get(&site)).zip(storage);
            let (loss, why) = alone.map_or((String::new(), "asked for".to_string()), |(s, storage)| why(s, storage));
            let form = |f: &Form| format!("{}&times;{} {}", f.shape[0], f.shape[1], f.storage);
            let left = |of: fn(&Form) -> usize| {
                let after = change.after.as_ref().map_or(0, of);
                format!("{after} ({:.1} %)", 100.0 * after as f64 / of(&change.before).max(1) as f64)
            };
            let cost = change.cost.map_or(String::new(), |cost| format!("{:.3} %", 100.0 * cost));
            let _ = write!(
                out,
                "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{cost}</td><td>{loss}</td><td>{why}</td></tr>",
                change.site,
                form(&change.before),
                change.after.as_ref().map_or("gone".to_string(), form),
                left(|f| f.values),
                left(|f| f.bytes),
            );
        }
        out.push_str("</table>");
    }
}

fn show_differences(out: &mut String, differences: &[Difference]) {
    if differences.is_empty() {
        return;
    }
    out.push_str(
        "<h2>Where they differ most</h2><table><tr><th>after</th><th>original says</th><th>result says</th><th>KL, nats</th></tr>",
    );
    for d in differences {
        let _ = write!(
            out,
            "<tr><td>&hellip;{}</td><td>{}</td><td>{}</td><td>{:.3}</td></tr>",
            escape(&d.context),
            escape(&d.before),
            escape(&d.after),
            d.kl
        );
    }
    out.push_str("</table>");
}

/// The loss of the chosen storage alone and what the next step would have brought.
fn why(s: &Sensitivity, chosen: Storage) -> (String, String) {
    let Some(i) = s.candidates.iter().position(|c| c.storage == chosen) else {
        return (String::new(), "asked for".into());
    };
    let now = &s.candidates[i];
    let words = match s.candidates.get(i + 1) {
        None => "nothing larger is better".to_string(),
        Some(next) => {
            format!("{} would save {:.1e} for {} bytes more", next.storage, now.kl - next.kl, next.bytes - now.bytes)
        }
    };
    (format!("{:.1e}", now.kl), words)
}

fn summary(out: &mut String, proof: &Proof) {
    let (b, a) = (&proof.before, &proof.after);
    out.push_str("<h2>Before and after</h2><table>");
    let mut row = |name: &str, before: String, after: String| {
        let _ = write!(out, "<tr><td>{name}</td><td>{before}</td><td>{after}</td></tr>");
    };
    row("<strong>what</strong>", "<strong>before</strong>".into(), "<strong>after</strong>".into());
    row("size, bytes", b.size_bytes.to_string(), a.size_bytes.to_string());
    row("bits per weight", format!("{:.2}", b.bits_per_weight), format!("{:.2}", a.bits_per_weight));
    row("perplexity", format!("{:.4}", b.perplexity), format!("{:.4}", a.perplexity));
    row("bits per byte of text", format!("{:.4}", b.bits_per_byte), format!("{:.4}", a.bits_per_byte));
    if let Some(x) = &a.against {
        let ci = |c: Option<[f64; 2]>| c.map_or(String::new(), |c| format!(" [{:.5}, {:.5}]", c[0], c[1]));
        row(
            "perplexity ratio, 95 % interval",
            String::new(),
            format!("{:.5}{}", x.perplexity_ratio, ci(x.perplexity_ratio_ci95)),
        );
        let kl_ci = x.kl_ci95.map_or(String::new(), |c| format!(" [{:.2e}, {:.2e}]", c[0], c[1]));
        row("mean KL, nats, 95 % interval", String::new(), format!("{:.2e}{kl_ci}", x.kl_mean));
        row("KL that 1 % of tokens exceed", String::new(), format!("{:.4}", x.kl_p99));
        row("same likeliest token", String::new(), format!("{:.2} %", 100.0 * x.top1_agreement));
    }
    if let Some(h) = proof.entropy_nats_per_token {
        row("nats per token above the source's entropy", format!("{:.4}", b.nll - h), format!("{:.4}", a.nll - h));
    }
    out.push_str("</table>");
}
