//! Evaluation: how well a model predicts documents, alone and paired with its original.

mod interval;
mod score;

pub use interval::{Interval, Paired, needed_tokens};
pub use score::{Pair, Score, compare, score};

use crate::data::Document;
use model::Model;
use serde::{Deserialize, Serialize};

/// What `evaluate --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Evaluation {
    /// Predicted tokens.
    pub tokens: usize,
    /// Documents.
    pub documents: usize,
    /// Mean negative log-likelihood of a token in nats.
    pub nll: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// 95 % interval of the perplexity; none under 30 documents.
    pub perplexity_ci95: Option<[f64; 2]>,
    /// Nats per byte of predicted text, in bits.
    pub bits_per_byte: f64,
    /// Tensor payload with scales and codebooks, tied tensors once.
    pub size_bytes: usize,
    /// Bytes of the files that hold the tensors.
    pub file_bytes: u64,
    /// Number of parameters, tied tensors once.
    pub parameters: usize,
    /// Payload bits per parameter.
    pub bits_per_weight: f64,
    /// The comparison with the original.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub against: Option<Against>,
}

/// A model against its original on the same tokens.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Against {
    /// Mean Kullback-Leibler divergence of a token's distribution in nats.
    pub kl_mean: f64,
    /// Its 95 % interval; none under 30 documents.
    pub kl_ci95: Option<[f64; 2]>,
    /// Divergence that one token in a hundred exceeds.
    pub kl_p99: f64,
    /// Largest divergence of a token.
    pub kl_max: f64,
    /// Median divergence.
    pub kl_median: f64,
    /// Share of tokens whose likeliest continuation is the original's.
    pub top1_agreement: f64,
    /// Perplexity over the original's.
    pub perplexity_ratio: f64,
    /// Its 95 % interval; none under 30 documents.
    pub perplexity_ratio_ci95: Option<[f64; 2]>,
    /// The original's perplexity.
    pub base_perplexity: f64,
}

/// Puts a score and a model's size together.
pub fn summarize(model: &Model, file_bytes: u64, documents: &[Document], scores: &[Score]) -> Evaluation {
    let tokens: usize = scores.iter().map(|s| s.tokens).sum();
    let total: f64 = scores.iter().map(|s| s.nll).sum();
    let bytes: usize = documents.iter().map(|d| d.bytes).sum();
    let nll = total / tokens.max(1) as f64;
    let mean = Paired::new(scores.iter().map(|s| (s.nll, s.tokens)).collect());
    Evaluation {
        tokens,
        documents: scores.len(),
        nll,
        perplexity: nll.exp(),
        perplexity_ci95: mean.interval(0.95).map(|i| [i.low.exp(), i.high.exp()]),
        bits_per_byte: total / std::f64::consts::LN_2 / bytes.max(1) as f64,
        size_bytes: model.size_bytes(),
        file_bytes,
        parameters: model.parameters(),
        bits_per_weight: model.bits_per_weight(),
        against: None,
    }
}

/// Puts a paired comparison together.
pub fn summarize_pair(pairs: &[Pair]) -> Against {
    let tokens: usize = pairs.iter().map(|p| p.score.tokens).sum();
    let n = tokens.max(1) as f64;
    let kl = Paired::new(pairs.iter().map(|p| (p.kl.iter().map(|k| f64::from(*k)).sum(), p.score.tokens)).collect());
    let ratio = log_ratio(pairs);
    let mut all: Vec<f32> = pairs.iter().flat_map(|p| p.kl.iter().copied()).collect();
    all.sort_by(f32::total_cmp);
    let quantile = |q: f64| {
        let at = (q * all.len().saturating_sub(1) as f64).round() as usize;
        all.get(at).copied().map_or(0.0, f64::from)
    };
    let base: f64 = pairs.iter().map(|p| p.base_nll).sum::<f64>() / n;
    Against {
        kl_mean: kl.mean(),
        kl_ci95: kl.interval(0.95).map(|i| [i.low, i.high]),
        kl_p99: quantile(0.99),
        kl_max: quantile(1.0),
        kl_median: quantile(0.5),
        top1_agreement: pairs.iter().map(|p| p.same_top).sum::<usize>() as f64 / n,
        perplexity_ratio: ratio.mean().exp(),
        perplexity_ratio_ci95: ratio.interval(0.95).map(|i| [i.low.exp(), i.high.exp()]),
        base_perplexity: base.exp(),
    }
}

/// The logarithm of the perplexity ratio, document by document.
pub fn log_ratio(pairs: &[Pair]) -> Paired {
    Paired::new(pairs.iter().map(|p| (p.score.nll - p.base_nll, p.score.tokens)).collect())
}

/// The divergence, document by document.
pub fn divergence(pairs: &[Pair]) -> Paired {
    Paired::new(pairs.iter().map(|p| (p.kl.iter().map(|k| f64::from(*k)).sum(), p.score.tokens)).collect())
}
