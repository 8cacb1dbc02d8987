//! `planish distill`: a small model learns what a large one would say.

use super::{
    converse_by,
    finetune::{lesson, named, show},
};
use crate::{
    args::{Common, Distill},
    show::Bar,
};
use anyhow::{Context, Result, bail};
use model::{Channels, Gpt};
use optimize::teach;
use train::distil::{Divergence, Guidance};

/// Teaches a student.
pub fn run(args: &Distill, common: &Common) -> Result<u8> {
    let guidance = Guidance {
        divergence: named(&Divergence::ALL, &args.divergence, "--divergence")?,
        temperature: args.temperature,
        share: args.share,
        layers: args.student_layers.clone(),
        widths: args.student_widths.clone(),
        top_k: args.teacher_cache.as_ref().map(|_| args.top_k),
        on_policy: args.on_policy,
        hidden: args.hidden,
        relations: args.relations,
    };
    guidance.check()?;
    let teacher = args.teacher.as_ref().map(|path| Gpt::open(path)).transpose()?;
    let begun = args.student.as_ref().or(args.teacher.as_ref());
    let mut student =
        Gpt::open(begun.context("give a STUDENT: --student-layers and --student-widths take parts of a --teacher")?)?;
    converse_by(&mut student, args.lesson.template.as_deref())?;
    if let Some(layers) = &args.student_layers {
        student.model = student.model.of_blocks(layers)?;
    }
    if let Some(widths) = &args.student_widths {
        student.model = student.model.of_channels(&Channels::largest(&student.model, widths.parse()?)?)?;
    }
    let mut lesson = lesson(&args.lesson, student.model.spec.context, common.seed)?;
    if lesson.teaches_adapters() && args.student.is_none() {
        bail!(
            "--lora and --adapter teach adapters of a model that stays as it is; give it as STUDENT, in place of \
             --student-layers and --student-widths"
        );
    }
    lesson.guidance = Some(guidance);
    lesson.teacher_cache = args.teacher_cache.clone();
    let place = args.place.place();
    let bar = Bar::new();
    let taught = teach::run(&student, teacher.as_ref(), &lesson, &place, &bar)?;
    drop(bar);
    show(&taught, &place, common)?;
    Ok(0)
}
