//! The gate: did the quality hold? It says yes only where the one-sided 95 % bound meets the floor.

use crate::{
    changes::Change,
    evaluate::{Evaluation, Pair, Paired, divergence, log_ratio, needed_tokens},
    recipe::Floor,
};
use serde::{Deserialize, Serialize};

/// Level of the one-sided bound.
const LEVEL: f64 = 0.95;

/// The verdict.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Verdict {
    /// `passed`, `failed`, or `not asked` where no floor was given.
    pub result: String,
    /// Each floor and how it was met.
    pub checks: Vec<Check>,
}

/// One floor.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Check {
    /// What is bounded.
    pub quantity: String,
    /// What it must not exceed.
    pub floor: f64,
    /// What was measured.
    pub mean: f64,
    /// One-sided 95 % upper bound; none under 30 documents.
    pub bound: Option<f64>,
    /// Did it hold?
    pub passed: bool,
    /// In words, with the remedy.
    pub words: String,
}

impl Verdict {
    /// Is the result good, or was nothing asked?
    pub fn is_good(&self) -> bool {
        self.result != "failed"
    }
}

/// Judges a paired comparison.
pub fn judge(floor: &Floor, pairs: &[Pair]) -> Verdict {
    let mut checks = Vec::new();
    if let Some(max) = floor.max_loss {
        // The floor is on the perplexity ratio; what is measured is its logarithm.
        checks.push(check("perplexity rise", max, &log_ratio(pairs), max.ln_1p(), |x| x.exp_m1()));
    }
    if let Some(max) = floor.max_kl {
        checks.push(check("mean KL divergence", max, &divergence(pairs), max, |x| x));
    }
    let result = match (checks.is_empty(), checks.iter().all(|c| c.passed)) {
        (true, _) => "not asked",
        (_, true) => "passed",
        _ => "failed",
    };
    Verdict { result: result.into(), checks }
}

fn check(quantity: &str, floor: f64, x: &Paired, inner: f64, show: impl Fn(f64) -> f64) -> Check {
    let (mean, bound) = (x.mean(), x.upper_bound(LEVEL));
    let passed = bound.is_some_and(|b| b <= inner);
    let tokens = x.tokens();
    let words = match (passed, bound) {
        (true, Some(b)) => format!("{quantity} is at most {:.5} with 95 % confidence; the floor is {floor}", show(b)),
        _ => match (needed_tokens(x, inner), bound) {
            (Some(n), None) => format!(
                "{quantity} is {:.4} on {} documents, too few for a verdict (30 are needed): give about {n} tokens to the gate, {} in all",
                show(mean),
                x.documents(),
                5 * n
            ),
            (Some(n), Some(b)) => format!(
                "{quantity} is {:.4} but may be {:.4}, above the floor {floor}: {tokens} tokens are too few; about {n} in the gate ({} in all) would decide",
                show(mean),
                show(b),
                5 * n
            ),
            (None, _) => format!("{quantity} is {:.4}, above the floor {floor}", show(mean)),
        },
    };
    Check { quantity: quantity.into(), floor, mean: show(mean), bound: bound.map(show), passed, words }
}

/// What `proof.json` holds.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Proof {
    /// The original on the gate's documents.
    pub before: Evaluation,
    /// The exported and reloaded result on the same documents.
    pub after: Evaluation,
    /// Did the quality hold?
    pub gate: Verdict,
    /// Where the text came from: a file's name, or that the model wrote it.
    pub data: String,
    /// Documents for calibration, solver and gate.
    pub documents: [usize; 3],
    /// What a reader should know, such as sites that were not treated as asked.
    pub warnings: Vec<String>,
    /// Entropy of the source in nats per token and the losses over it, where the text's true entropy is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy_nats_per_token: Option<f64>,
    /// What became of each matrix of the original.
    #[serde(default)]
    pub sites: Vec<Change>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::Score;

    fn pairs(documents: usize, rise: f64, noise: f64) -> Vec<Pair> {
        let pair = |i: usize| {
            let wobble = noise * (model::uniform(3, i as u64) - 0.5);
            let score = Score { nll: 100.0 * (1.0 + rise + wobble), tokens: 100 };
            Pair { score, base_nll: 100.0, kl: vec![0.01; 100], same_top: 90 }
        };
        (0..documents).map(pair).collect()
    }

    #[test]
    fn it_says_yes_only_when_the_bound_meets_the_floor() {
        let floor = Floor { max_loss: Some(0.02), max_kl: None };
        assert!(judge(&floor, &pairs(100, 0.01, 0.01)).is_good());
        assert_eq!(judge(&floor, &pairs(100, 0.03, 0.01)).result, "failed");
        let few = judge(&floor, &pairs(20, 0.01, 0.01));
        assert!(!few.is_good() && few.checks[0].words.contains("too few"), "{few:?}");
        let noisy = judge(&floor, &pairs(40, 0.005, 0.2));
        assert!(!noisy.is_good() && noisy.checks[0].words.contains("would decide"), "{noisy:?}");
        let kl = Floor { max_loss: None, max_kl: Some(0.009) };
        assert_eq!(judge(&kl, &pairs(100, 0.0, 0.0)).result, "failed");
        assert_eq!(judge(&Floor::default(), &pairs(5, 0.0, 0.0)).result, "not asked");
    }
}
