//! `--profile`: the time of each operation, beside what the machine could do in it.

use super::limits::Limits;
use crate::Result;
use model::{Cache, Model, Operation, Runner, Wanted, uniform};
use serde::{Deserialize, Serialize};
use tensor::Weight;

/// One operation of one phase.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Row {
    /// `prefill` or `decode`.
    pub phase: String,
    /// The operation.
    pub operation: String,
    /// Mean per token.
    pub microseconds_per_token: f64,
    /// Part of the phase's time.
    pub share_of_time: f64,
    /// Of a product: stored bytes of its weights over its time (decode), in billions.
    pub gigabytes_per_second: Option<f64>,
    /// Of a product: its operations over its time, in billions.
    pub gigaops: Option<f64>,
    /// Of a product: its share of the limit that binds, reading in decode and arithmetic in prefill.
    pub share_of_limit: Option<f64>,
}

/// A row whose limits are not known yet.
pub(super) struct Timed {
    row: Row,
    /// Operations per token by weight, to be held against its peak.
    weights: Vec<Weight>,
}

impl Timed {
    pub(super) fn against(mut self, limits: &Limits) -> Row {
        let least: f64 = self.weights.iter().map(|w| 2.0 * w.len() as f64 / limits.peak(w)).sum();
        if !self.weights.is_empty() {
            let share = match self.row.gigabytes_per_second {
                Some(rate) => rate / limits.read_gigabytes_per_second,
                None => least / 1e3 / self.row.microseconds_per_token,
            };
            self.row.share_of_limit = Some(share);
        }
        self.row
    }
}

/// Times the operations of a prompt and of the tokens after it.
pub(super) fn measure(model: &Model, prefill: usize, decode: usize) -> Result<Vec<Timed>> {
    let prompt: Vec<u32> = (0..prefill).map(|i| (uniform(1, i as u64) * model.spec.vocab as f64) as u32).collect();
    let mut runner = Runner::new(model);
    let mut cache = [Cache::with_room(model, prefill + decode)];
    let mut rows = Vec::new();
    // The first prompt finds cold caches.
    for _ in 0..2 {
        cache[0].truncate(0);
        runner.profile();
        runner.read(&prompt, &mut cache[0])?;
    }
    let spent = runner.profile().unwrap_or_default();
    table(model, "prefill", prefill, &spent, &mut rows);
    for _ in 0..decode {
        runner.step(&[[0u32]], &mut cache, Wanted::Last)?;
    }
    let spent = runner.profile().unwrap_or_default();
    table(model, "decode", decode, &spent, &mut rows);
    Ok(rows)
}

fn table(model: &Model, phase: &str, tokens: usize, spent: &model::Profile, rows: &mut Vec<Timed>) {
    let total: f64 = Operation::ALL.iter().map(|o| spent.spent(*o).as_secs_f64()).sum();
    for operation in Operation::ALL {
        let time = spent.spent(operation).as_secs_f64() / tokens as f64;
        // Of a prompt, only the last token runs the head.
        let times = if operation == Operation::Head && phase == "prefill" { 1.0 / tokens as f64 } else { 1.0 };
        let sites = model.linears.iter().filter(|(s, _)| runs_in(model, **s) == Some(operation));
        let weights: Vec<Weight> = sites.map(|(_, l)| l.weight.clone()).collect();
        let bytes: usize = weights.iter().map(Weight::size_bytes).sum();
        let operations: usize = weights.iter().map(|w| 2 * w.len()).sum();
        let product = !weights.is_empty() && time > 0.0;
        rows.push(Timed {
            row: Row {
                phase: phase.into(),
                operation: operation.name().into(),
                microseconds_per_token: time * 1e6,
                share_of_time: time * tokens as f64 / total,
                gigabytes_per_second: (product && phase == "decode").then(|| bytes as f64 / time / 1e9),
                gigaops: product.then(|| times * operations as f64 / time / 1e9),
                share_of_limit: None,
            },
            weights: if times < 1.0 { Vec::new() } else { weights },
        });
    }
}

/// The operation in which a matrix is multiplied.
fn runs_in(model: &Model, site: model::Site) -> Option<Operation> {
    use model::Role;
    if site == model.spec.resolve(model::Site::HEAD) {
        return Some(Operation::Head);
    }
    match site.role {
        Role::Q | Role::K | Role::V => Some(Operation::Qkv),
        Role::O => Some(Operation::O),
        Role::Gate | Role::Up => Some(Operation::GateUp),
        Role::Down => Some(Operation::Down),
        _ => None,
    }
}
