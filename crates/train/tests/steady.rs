//! Steps use the memory of those before them again.
#![allow(clippy::unwrap_used)]

use model::{Likelihood, Tokens, load, uniform};
use std::path::Path;
use train::{Learner, Precision, Rule};

/// What a step may take for lists of sites and the like. The smallest activation of the step below takes 128 KiB, and the
/// gradient 2.3 MB.
const BOOKKEEPING: u64 = 32 << 10;

fn part(seed: u64) -> Tokens {
    let ids: Vec<u32> = (0..257).map(|i| (uniform(seed, i) * 64.0) as u32).collect();
    Tokens {
        sequences: vec![ids[..256].to_vec()],
        targets: ids[1..].iter().map(|id| Some(*id)).collect(),
        ..Tokens::default()
    }
}

#[test]
fn a_step_takes_no_memory_that_grows_with_model_or_batch() {
    let gpt = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sample/gpt");
    let model = load::open(&gpt).unwrap().model;
    let parts = [part(1), part(2), part(3)];
    for (precision, again) in [(Precision::F32, false), (Precision::Bf16, true), (Precision::Fp16, false)] {
        let mut learner = Learner::new(&model, precision, Rule::default()).unwrap();
        if again {
            learner.checkpoint_activations();
        }
        // One worker: what others take is not counted.
        let mut step = |count: usize| {
            tensor::threads::limited(1, || {
                for _ in 0..count {
                    learner.step(&parts, &mut Likelihood, 1e-4).unwrap();
                }
            });
        };
        step(2);
        let taken = allocation_counter::measure(|| step(4));
        println!("{precision:?}: {} bytes in {} pieces a step", taken.bytes_total / 4, taken.count_total / 4);
        assert!(taken.bytes_total < 4 * BOOKKEEPING, "{precision:?}: {} bytes a step", taken.bytes_total / 4);
        assert_eq!(taken.bytes_current, 0, "{precision:?}: what a step takes it gives back");
    }
}
