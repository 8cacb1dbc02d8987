//! `planish bench`.

use super::{open, print_json};
use crate::{
    args::{Bench, Common},
    show,
};
use anyhow::{Result, bail};
use optimize::speed;

/// Measures speed.
pub fn run(args: &Bench, common: &Common) -> Result<u8> {
    let gpt = open(&args.model)?;
    let context = gpt.model.spec.context;
    if args.prefill == 0 || args.decode == 0 || args.prefill + args.decode > context {
        bail!("--prefill and --decode take numbers from 1 on that fit the model's context of {context} together");
    }
    let s = speed::measure(&gpt.model, args.prefill, args.decode)?;
    if common.json {
        print_json(&s)?;
        return Ok(0);
    }
    let (p, d, l) = (&s.prefill, &s.decode, &s.limits);
    show::table(&[
        vec![
            format!("prefill, {} tokens", p.tokens),
            format!("{:.1} tok/s", p.tokens_per_second),
            format!("{:.1} % of {:.0} GFLOP/s", 100.0 * p.share_of_peak, l.f32_gigaflops),
        ],
        vec![
            format!("decode, {} tokens", d.tokens),
            format!("{:.1} tok/s", d.tokens_per_second),
            format!("{:.1} % of {:.1} GB/s", 100.0 * d.share_of_bandwidth, l.read_gigabytes_per_second),
        ],
        vec!["peak memory".into(), show::size(s.peak_rss_bytes)],
        vec!["threads".into(), l.threads.to_string()],
    ]);
    Ok(0)
}
