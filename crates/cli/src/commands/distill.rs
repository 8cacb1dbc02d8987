//! `planish distill`: a small model learns what a large one would say.

use super::finetune::{lesson, named, show};
use crate::{
    args::{Common, Distill},
    show::Bar,
};
use anyhow::{Result, bail};
use model::Gpt;
use optimize::teach;
use train::distil::{Divergence, Guidance};

/// Teaches a student.
pub fn run(args: &Distill, common: &Common) -> Result<u8> {
    if !(args.temperature > 0.0 && args.temperature.is_finite()) {
        bail!("--temperature takes a number above 0, not {}", args.temperature);
    }
    if !(0.0..=1.0).contains(&args.share) {
        bail!("--share takes a number from 0 to 1, not {}", args.share);
    }
    let guidance = Guidance {
        divergence: named(&Divergence::ALL, &args.divergence, "--divergence")?,
        temperature: args.temperature,
        share: args.share,
        layers: args.student_layers.clone(),
    };
    let teacher = Gpt::open(&args.teacher)?;
    let mut student = Gpt::open(args.student.as_ref().unwrap_or(&args.teacher))?;
    if let Some(layers) = &args.student_layers {
        student.model = student.model.of_blocks(layers)?;
    }
    let mut lesson = lesson(&args.lesson, student.model.spec.context, common.seed)?;
    lesson.guidance = Some(guidance);
    let place = args.place.place();
    let bar = Bar::new();
    let taught = teach::run(&student, Some(&teacher), &lesson, &place, &bar)?;
    drop(bar);
    show(&taught, &place, common)?;
    Ok(0)
}
