//! `planish export`.

use super::{attach, open, print_json};
use crate::{
    args::{Common, Export},
    show::{self, Bar},
};
use anyhow::{Result, bail};
use formats::quantized;
use model::Gpt;
use optimize::{
    export::{self, Format},
    progress::Progress,
};
use serde_json::{Value, json};
use tensor::Storage;

/// Writes a model for another program, reads it again and compares.
pub fn run(args: &Export, common: &Common) -> Result<u8> {
    let mut gpt = open(&args.model)?;
    let format = match args.to.as_str() {
        "gguf" => Format::Gguf,
        "safetensors" => Format::Safetensors,
        other => match quantized::Format::parse(other) {
            Some(format) => Format::Quantized(format),
            None => bail!("--to takes gguf, safetensors, compressed-tensors, gptq or awq, not {other:?}"),
        },
    };
    if !args.attached.adapters.is_empty() && !args.merge {
        return adapter(&gpt, format, args, common);
    }
    if args.merge {
        attach(&mut gpt.model, &args.attached)?;
        gpt.model = gpt.model.merged()?;
    }
    let storage = args.kind.as_deref().map(Storage::parse).transpose().map_err(optimize::Error::from)?;
    let settings = export::Settings {
        format,
        storage,
        out: args.out.clone(),
        overwrite: args.overwrite,
        strict: args.strict,
        requantize: args.requantize,
    };
    let bar = Bar::new();
    bar.begin("writing", 1);
    let done = export::export(&gpt, &settings)?;
    drop(bar);
    if common.json {
        let fallbacks: Vec<Value> = done
            .fallbacks
            .iter()
            .map(|f| json!({"site": f.site.to_string(), "asked": f.asked.name(), "got": f.got.name()}))
            .collect();
        print_json(&json!({
            "out": args.out, "size_bytes": done.size_bytes, "file_bytes": done.file_bytes,
            "bits_per_weight": done.bits_per_weight, "largest_logit_difference": done.difference, "fallbacks": fallbacks,
            "notes": done.notes,
        }))?;
        return Ok(0);
    }
    sayln!("{}: {} ({:.3} bits per weight)", args.out.display(), show::size(done.file_bytes), done.bits_per_weight);
    sayln!("read again: largest logit difference to what was to be written {:.1e}", done.difference);
    for f in &done.fallbacks {
        sayln!("{}: a row does not divide into blocks of {}; stored as {}", f.site, f.asked, f.got);
    }
    done.notes.iter().for_each(|n| sayln!("note: {n}"));
    Ok(0)
}

/// Writes an adapter alone.
fn adapter(gpt: &Gpt, format: Format, args: &Export, common: &Common) -> Result<u8> {
    let ([path], Format::Gguf) = (&args.attached.adapters[..], format) else {
        bail!("--adapter goes with --merge, or one of it with --to gguf, which writes the adapter alone");
    };
    let difference = export::adapter(gpt, path, &args.out, args.overwrite)?;
    let bytes = optimize::run::file_bytes(&args.out);
    if common.json {
        print_json(&json!({"out": args.out, "file_bytes": bytes, "largest_logit_difference": difference}))?;
    } else {
        sayln!("{}: {}", args.out.display(), show::size(bytes));
        sayln!("read again: largest logit difference to what was to be written {difference:.1e}");
    }
    Ok(0)
}
