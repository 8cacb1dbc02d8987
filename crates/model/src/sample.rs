//! Choosing the next token from logits; random numbers depend on seed and step alone.

use tensor::ops;

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the likeliest so many; 0 is all.
    pub top_k: usize,
    /// The likeliest whose probabilities reach this sum; 1 is all.
    pub top_p: f32,
    /// Only tokens at least this likely relative to the likeliest; 0 is all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen before (arXiv 1909.05858); 1 is off.
    pub repetition_penalty: f32,
    /// Start of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Chooses a token. `seen` holds the tokens of the text so far; `step` numbers the choice.
    pub fn choose(&self, logits: &[f32], seen: &[u32], step: u64) -> u32 {
        if self.temperature <= 0.0 && self.repetition_penalty == 1.0 {
            return ops::argmax(logits) as u32;
        }
        let mut logits = logits.to_vec();
        if self.repetition_penalty != 1.0 {
            let mut ids = seen.to_vec();
            ids.sort_unstable();
            ids.dedup();
            for l in ids.iter().filter_map(|id| logits.get(*id as usize).map(|_| *id as usize)).collect::<Vec<_>>() {
                let v = &mut logits[l];
                *v = if *v > 0.0 { *v / self.repetition_penalty } else { *v * self.repetition_penalty };
            }
        }
        if self.temperature <= 0.0 {
            return ops::argmax(&logits) as u32;
        }
        let keep = if self.top_k == 0 { logits.len() } else { self.top_k };
        let order = ops::top(&logits, keep);
        let highest = logits[order[0]];
        let weight = |id: &usize| f64::from((logits[*id] - highest) / self.temperature).exp();
        let weights: Vec<f64> = order.iter().map(weight).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = 0.0;
        let mut end = 0;
        for w in &weights {
            // The likeliest always stays; one that crosses `top_p` still belongs to the nucleus.
            if end > 0 && (kept / total >= f64::from(self.top_p) || *w < f64::from(self.min_p)) {
                break;
            }
            kept += w;
            end += 1;
        }
        let mut left = uniform(self.seed, step) * kept;
        for (id, w) in order[..end].iter().zip(&weights) {
            left -= w;
            if left < 0.0 {
                return *id as u32;
            }
        }
        order[end - 1] as u32
    }
}

/// A number in 0 to 1 that depends on its two arguments alone (SplitMix64).
pub fn uniform(seed: u64, step: u64) -> f64 {
    let mut z =
        seed.wrapping_mul(0xA24B_AED4_963E_E407).wrapping_add(step.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    (z >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_restriction_keeps_what_it_says() {
        let logits = [1.0f32, 3.0, 2.0, -1.0];
        let draw = |s: &Sampling| -> Vec<u32> { (0..400).map(|step| s.choose(&logits, &[], step)).collect() };
        let hot = Sampling { temperature: 1.0, ..Sampling::default() };
        assert!((0..4).all(|id| draw(&hot).contains(&id)));
        assert!(draw(&Sampling { top_k: 2, ..hot.clone() }).iter().all(|id| [1, 2].contains(id)));
        assert!(draw(&Sampling { top_p: 0.5, ..hot.clone() }).iter().all(|id| *id == 1));
        assert!(draw(&Sampling { min_p: 0.3, ..hot.clone() }).iter().all(|id| [1, 2].contains(id)));
        assert_eq!(draw(&hot), draw(&hot));
        assert_ne!(draw(&hot), draw(&Sampling { seed: 1, ..hot.clone() }));
        let greedy = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(greedy.choose(&logits, &[1], 0), 2);
        let share = draw(&hot).iter().filter(|id| **id == 1).count() as f64 / 400.0;
        assert!((share - 0.657).abs() < 0.08, "{share}");
    }
}
