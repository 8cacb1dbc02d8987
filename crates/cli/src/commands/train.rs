//! `planish train`: a model from nothing.

use super::finetune::show;
use crate::{
    args::{Common, Train},
    show::Bar,
};
use anyhow::Result;
use optimize::create::{self, Creation};

/// Makes and teaches a model.
pub fn run(args: &Train, common: &Common) -> Result<u8> {
    let mut creation = Creation::read(&args.config)?;
    let asked = [
        (&args.data, &mut creation.data.train),
        (&args.validation, &mut creation.data.validation),
        (&args.tokenizer, &mut creation.tokenizer.from),
    ];
    for (asked, named) in asked.into_iter().filter(|(asked, _)| asked.is_some()) {
        named.clone_from(asked);
    }
    if args.tokenizer.is_some() {
        creation.tokenizer.vocab = None;
    }
    let place = args.place.place();
    let bar = Bar::new();
    let taught = create::run(&creation, &args.config, common.seed, &place, &bar)?;
    drop(bar);
    show(&taught, &place, common)?;
    Ok(0)
}
