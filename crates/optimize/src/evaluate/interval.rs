//! Intervals by resampling documents: tokens of one document are not independent, documents are.

use model::uniform;

/// Resamples of an interval.
const RESAMPLES: u64 = 2000;
/// Fewest documents for which an interval is given.
pub const FEWEST: usize = 30;

/// Two ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// A sum over tokens for each document, and how many tokens: the mean is over tokens, the chance over documents.
#[derive(Clone, Debug)]
pub struct Paired {
    sums: Vec<(f64, usize)>,
}

impl Paired {
    /// One sum and count for each document.
    pub fn new(sums: Vec<(f64, usize)>) -> Paired {
        Paired { sums }
    }

    /// Documents.
    pub fn documents(&self) -> usize {
        self.sums.len()
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.sums.iter().map(|s| s.1).sum()
    }

    /// Mean over tokens.
    pub fn mean(&self) -> f64 {
        self.sums.iter().map(|s| s.0).sum::<f64>() / self.tokens().max(1) as f64
    }

    /// Means of resampled sets of documents, rising.
    fn resampled(&self) -> Vec<f64> {
        let n = self.sums.len();
        let mut means: Vec<f64> = (0..RESAMPLES)
            .map(|r| {
                let (mut sum, mut tokens) = (0.0, 0);
                for i in 0..n as u64 {
                    let at = (uniform(r ^ 0x9e37, i) * n as f64) as usize;
                    sum += self.sums[at].0;
                    tokens += self.sums[at].1;
                }
                sum / tokens.max(1) as f64
            })
            .collect();
        means.sort_by(f64::total_cmp);
        means
    }

    /// The two-sided percentile interval (Efron 1979); none under 30 documents.
    pub fn interval(&self, level: f64) -> Option<Interval> {
        if self.sums.len() < FEWEST {
            return None;
        }
        let means = self.resampled();
        let at = |q: f64| means[((means.len() - 1) as f64 * q).round() as usize];
        let tail = (1.0 - level) / 2.0;
        Some(Interval { low: at(tail), high: at(1.0 - tail) })
    }

    /// The one-sided upper bound; none under 30 documents.
    pub fn upper_bound(&self, level: f64) -> Option<f64> {
        self.interval(2.0 * level - 1.0).map(|i| i.high)
    }

    /// Standard error of the mean over tokens, documents being the units.
    pub fn standard_error(&self) -> f64 {
        let n = self.sums.len() as f64;
        let mean = self.mean();
        let per = self.tokens() as f64 / n.max(1.0);
        let squares: f64 = self.sums.iter().map(|(s, t)| (s - mean * *t as f64).powi(2)).sum();
        (squares / (n - 1.0).max(1.0)).sqrt() / per.max(1.0) / n.max(1.0).sqrt()
    }
}

/// Tokens with which the one-sided 95 % bound would meet `floor` at the same mean; `None` where the mean misses it.
pub fn needed_tokens(x: &Paired, floor: f64) -> Option<usize> {
    let room = floor - x.mean();
    if room <= 0.0 {
        return None;
    }
    let factor = (1.645 * x.standard_error() / room).powi(2).max(FEWEST as f64 / x.documents().max(1) as f64);
    Some((x.tokens() as f64 * factor * 1.1).ceil() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_cover_the_truth_about_as_often_as_they_say() {
        let mut covered = 0;
        for trial in 0..300u64 {
            let draw = |i| uniform(trial + 7, i) + uniform(trial + 7, i + 1000) + uniform(trial + 7, i + 2000) - 1.5;
            let x = Paired::new((0..60).map(|i| (10.0 * draw(i), 10)).collect());
            let i = x.interval(0.95).unwrap();
            covered += usize::from(i.low <= 0.0 && 0.0 <= i.high);
        }
        assert!((273..=297).contains(&covered), "{covered} of 300");
    }

    #[test]
    fn few_documents_give_no_interval_and_say_how_many_are_needed() {
        let x = Paired::new((0..29).map(|i| (0.1 * f64::from(i % 3), 10)).collect());
        assert!(x.interval(0.95).is_none() && x.upper_bound(0.95).is_none());
        assert!(needed_tokens(&x, 0.02).unwrap() > x.tokens());
        assert_eq!(needed_tokens(&x, 0.0), None);
    }
}
