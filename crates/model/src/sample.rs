//! Choosing the next token from logits; random numbers depend on seed and step alone.

use std::cell::RefCell;
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
        SCRATCH.with_borrow_mut(|scratch| self.draw(logits, seen, step, scratch))
    }

    fn draw(&self, logits: &[f32], seen: &[u32], step: u64, s: &mut Scratch) -> u32 {
        s.logits.clear();
        s.logits.extend_from_slice(logits);
        if self.repetition_penalty != 1.0 {
            s.ids.clear();
            s.ids.extend(seen.iter().filter(|id| (**id as usize) < logits.len()));
            s.ids.sort_unstable();
            s.ids.dedup();
            for id in &s.ids {
                let v = &mut s.logits[*id as usize];
                *v = if *v > 0.0 { *v / self.repetition_penalty } else { *v * self.repetition_penalty };
            }
        }
        if self.temperature <= 0.0 {
            return ops::argmax(&s.logits) as u32;
        }
        ops::softmax(&s.logits, self.temperature, &mut s.probabilities);
        let mut order = Order::new(&s.probabilities, &mut s.ids);
        let most = if self.top_k == 0 { logits.len() } else { self.top_k.min(logits.len()) };
        let total = if most < logits.len() { (0..most).map(|i| order.get(i).1).sum() } else { 1.0 };
        let (mut end, mut kept) = (most, total);
        if self.top_p < 1.0 || self.min_p > 0.0 {
            let least = f64::from(self.min_p) * order.get(0).1;
            (end, kept) = (0, 0.0);
            // The likeliest always stays; one that crosses `top_p` still belongs to the nucleus.
            while end < most && (end == 0 || kept / total < f64::from(self.top_p) && order.get(end).1 >= least) {
                kept += order.get(end).1;
                end += 1;
            }
        }
        let mut left = uniform(self.seed, step) * kept;
        for i in 0..end {
            let (id, p) = order.get(i);
            left -= p;
            if left < 0.0 {
                return id;
            }
        }
        order.get(end - 1).0
    }
}

/// Tokens by falling probability, of equal ones the first; only as many are put in order as are asked for.
struct Order<'a> {
    p: &'a [f32],
    ids: &'a mut Vec<u32>,
    sorted: usize,
}

impl<'a> Order<'a> {
    /// A few hundred tokens at most are at least so likely, and they have most of the probability.
    const LIKELY: f32 = 1.0 / 512.0;

    fn new(p: &'a [f32], ids: &'a mut Vec<u32>) -> Order<'a> {
        ids.clear();
        ids.extend((0..p.len() as u32).filter(|id| p[*id as usize] >= Order::LIKELY));
        let mut order = Order { p, ids, sorted: 0 };
        order.sort(order.ids.len());
        order
    }

    /// Puts the next tokens in order, up to `until`.
    fn sort(&mut self, until: usize) {
        let p = self.p;
        let before = |a: &u32, b: &u32| p[*b as usize].total_cmp(&p[*a as usize]).then(a.cmp(b));
        let rest = &mut self.ids[self.sorted..];
        let count = until - self.sorted;
        if count < rest.len() {
            rest.select_nth_unstable_by(count, before);
        }
        rest[..count].sort_unstable_by(before);
        self.sorted = until;
    }

    /// The token of a rank below their number, and its probability.
    fn get(&mut self, rank: usize) -> (u32, f64) {
        if rank >= self.ids.len() {
            let p = self.p;
            self.ids
                .extend((0..p.len() as u32).filter(|id| p[*id as usize] < Order::LIKELY || p[*id as usize].is_nan()));
        }
        if rank >= self.sorted {
            self.sort(self.ids.len().min(8 * (rank + 8)));
        }
        let id = self.ids[rank];
        (id, f64::from(self.p[id as usize]))
    }
}

/// What is used again from token to token.
#[derive(Default)]
struct Scratch {
    logits: Vec<f32>,
    probabilities: Vec<f32>,
    ids: Vec<u32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
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
        // Of many tokens only some are put in order: what is drawn is what a whole order gives.
        let many: Vec<f32> = (0..5000).map(|i| 0.002 * ((i * 2741) % 5000) as f32).collect();
        let among = |s: &Sampling, most: usize| {
            let order = ops::top(&many, most);
            (0..300).all(|step| order.contains(&(s.choose(&many, &[], step) as usize)))
        };
        // Each is 0.2 % likelier than the next: the first 693 of them have three quarters of what is there.
        assert!(among(&Sampling { top_p: 0.75, ..hot.clone() }, 694) && !among(&hot, 694));
        assert!(!among(&Sampling { top_p: 0.75, ..hot.clone() }, 600));
        assert!(
            among(&Sampling { min_p: 0.5, ..hot.clone() }, 347) && !among(&Sampling { min_p: 0.5, ..hot.clone() }, 300)
        );
        assert!(among(&Sampling { top_k: 100, top_p: 0.5, ..hot.clone() }, 60));
        let share = draw(&hot).iter().filter(|id| **id == 1).count() as f64 / 400.0;
        assert!((share - 0.657).abs() < 0.08, "{share}");
    }
}
