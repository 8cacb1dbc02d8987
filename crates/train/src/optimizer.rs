//! Optimizers: how gradients move values, and what is remembered from step to step.

use crate::{checkpoint::Piece, muon};
use bytemuck::{cast_slice, cast_slice_mut};
use formats::Dtype;
use model::{Parameters, Site};
use serde::{Deserialize, Serialize};
use tensor::ops::{self, Adafactor, AdamW, EightBit, Lion};

/// How gradients become steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Two moments (arXiv 1711.05101).
    #[default]
    AdamW,
    /// The sign of one moment (arXiv 2302.06675): half of AdamW's memory; takes a third to a tenth of its rate.
    Lion,
    /// Mean squares of rows and columns (arXiv 1804.04235): hardly any memory; its rate is relative to the values.
    Adafactor,
    /// One moment, made orthogonal (arXiv 2502.16982), of the blocks' matrices; AdamW for everything else, at the same rate.
    Muon,
}

impl Kind {
    /// All, with their names.
    pub const ALL: [(&str, Kind); 4] =
        [("adamw", Kind::AdamW), ("lion", Kind::Lion), ("adafactor", Kind::Adafactor), ("muon", Kind::Muon)];

    /// Decay of the moments that its authors use.
    pub fn beta(self) -> [f32; 2] {
        match self {
            Kind::AdamW | Kind::Adafactor => [0.9, 0.999],
            Kind::Lion => [0.9, 0.99],
            Kind::Muon => [0.95, 0.95],
        }
    }
}

/// What an optimizer does beside the learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    /// Which.
    pub optimizer: Kind,
    /// Bits of a moment, 32 or 8; with 8 those of small parameters stay floats.
    pub bits: u8,
    /// Decay of the moments; Muon's AdamW takes 0.9 for its first.
    pub beta: [f32; 2],
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Weight decay; of matrices only.
    pub decay: f32,
    /// Largest norm of the whole gradient, which is shortened to it; 0 is none.
    pub clip: f32,
}

impl Default for Rule {
    fn default() -> Rule {
        let optimizer = Kind::AdamW;
        Rule { optimizer, bits: 32, beta: optimizer.beta(), eps: 1e-8, decay: 0.01, clip: 1.0 }
    }
}

/// Parameters of fewer numbers keep moments of 32 bits: a byte saves nothing there, and norms are sensitive.
const SMALL: usize = 2048;

/// What is remembered of a parameter.
#[derive(Clone, Debug, PartialEq)]
enum Moment {
    Floats(Vec<f32>),
    Bytes(EightBit),
}

/// An optimizer and its memory.
#[derive(Clone, Debug)]
pub(crate) struct Optimizer {
    rule: Rule,
    /// Of each parameter, in the order of [`Parameters::slices`].
    moments: Vec<Vec<Moment>>,
}

impl Optimizer {
    /// One that has seen nothing.
    pub fn new(rule: Rule, values: &Parameters) -> Optimizer {
        let tables = values.each_table().map(|m| (true, m.rows(), m.cols()));
        let vectors = values.slices().skip(values.tables()).map(|v| (false, 1, v.len()));
        let moments = values.names().zip(tables.chain(vectors)).map(|((site, _), (table, rows, cols))| {
            let len = rows * cols;
            let small = rule.bits == 32 || len < SMALL;
            let moment = |signed| match small {
                true => Moment::Floats(vec![0.0; len]),
                false => Moment::Bytes(EightBit::zeros(len, signed)),
            };
            match rule.optimizer {
                Kind::Lion => vec![moment(true)],
                Kind::Muon if table && orthogonal(site) => vec![Moment::Floats(vec![0.0; len])],
                Kind::AdamW | Kind::Muon => vec![moment(true), moment(false)],
                Kind::Adafactor if table => {
                    vec![Moment::Floats(vec![0.0; rows]), Moment::Floats(vec![0.0; cols])]
                }
                Kind::Adafactor => vec![Moment::Floats(vec![0.0; len])],
            }
        });
        Optimizer { rule, moments: moments.collect() }
    }

    /// What it was made with.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// Moves values. `step` counts from 1, `norm` is that of the gradient times `scale`.
    pub fn step(&mut self, step: u64, values: &mut Parameters, gradient: &Parameters, [rate, norm, scale]: [f64; 3]) {
        let Rule { optimizer, beta, eps, decay, clip, .. } = self.rule;
        let clip = f64::from(clip);
        let scale = (scale * if clip > 0.0 && norm > clip { clip / norm } else { 1.0 }) as f32;
        let rate = rate as f32;
        let correction = |b: f32| (1.0 / (1.0 - f64::from(b).powf(step as f64))) as f32;
        let along = |decay: f32| match optimizer {
            Kind::Lion => Along::Lion(Lion { rate, beta, decay, scale }),
            _ => {
                let beta = if optimizer == Kind::Muon { [0.9, beta[1]] } else { beta };
                Along::AdamW(AdamW { rate, beta, eps, decay, corrections: beta.map(correction), scale })
            }
        };
        let adafactor = |decay: f32| Adafactor {
            rate,
            share: (step as f64).powf(-0.8) as f32,
            most: (1.0 / (step as f64).sqrt()) as f32,
            decay,
            scale,
        };
        let mut moments = self.moments.iter_mut();
        let count = values.tables();
        let sites: Vec<Site> = values.names().map(|(site, _)| site).take(count).collect();
        let tables = values.each_table_mut().zip(gradient.each_table()).zip(sites);
        for (((values, gradient), site), moments) in tables.zip(moments.by_ref()) {
            match (optimizer, &mut moments[..]) {
                (Kind::Adafactor, [Moment::Floats(rows), Moment::Floats(columns)]) => {
                    ops::adafactor(adafactor(decay), values, gradient, rows, columns);
                }
                (Kind::Muon, [Moment::Floats(moment)]) if orthogonal(site) => {
                    muon::step(values, gradient, moment, muon::Step { rate, momentum: beta[0], decay, scale });
                }
                (_, moments) => along(decay).run(values.as_mut_slice(), gradient.as_slice(), moments),
            }
        }
        let vectors = values.slices_mut().zip(gradient.slices()).skip(count);
        for ((values, gradient), moments) in vectors.zip(moments) {
            match (optimizer, &mut moments[..]) {
                (Kind::Adafactor, [Moment::Floats(means)]) => {
                    ops::adafactor_vector(adafactor(0.0), values, gradient, means);
                }
                (_, moments) => along(0.0).run(values, gradient, moments),
            }
        }
    }

    /// Its memory, to be saved.
    pub fn pieces(&self, values: &Parameters) -> Vec<Piece<&[u8]>> {
        let mut out = Vec::new();
        for ((site, name), moments) in values.names().zip(&self.moments) {
            for (slot, moment) in moments.iter().enumerate() {
                let name = format!("moment {slot} {site} {name}");
                match moment {
                    Moment::Floats(floats) => out.push(Piece { name, dtype: Dtype::F32, bytes: cast_slice(floats) }),
                    Moment::Bytes(bytes) => {
                        let (codes, scales) = bytes.parts();
                        out.push(Piece {
                            name: format!("{name} scales"),
                            dtype: Dtype::F32,
                            bytes: cast_slice(scales),
                        });
                        out.push(Piece { name: format!("{name} codes"), dtype: Dtype::U8, bytes: codes });
                    }
                }
            }
        }
        out
    }

    /// The same to be read.
    pub fn pieces_mut(&mut self, values: &Parameters) -> Vec<Piece<&mut [u8]>> {
        let mut out = Vec::new();
        for ((site, name), moments) in values.names().zip(&mut self.moments) {
            for (slot, moment) in moments.iter_mut().enumerate() {
                let name = format!("moment {slot} {site} {name}");
                match moment {
                    Moment::Floats(floats) => {
                        out.push(Piece { name, dtype: Dtype::F32, bytes: cast_slice_mut(floats) });
                    }
                    Moment::Bytes(bytes) => {
                        let (codes, scales) = bytes.parts_mut();
                        let scales = cast_slice_mut(scales);
                        out.push(Piece { name: format!("{name} scales"), dtype: Dtype::F32, bytes: scales });
                        out.push(Piece { name: format!("{name} codes"), dtype: Dtype::U8, bytes: codes });
                    }
                }
            }
        }
        out
    }

    /// Bytes of its memory.
    pub fn bytes(&self, values: &Parameters) -> usize {
        self.pieces(values).iter().map(|p| p.bytes.len()).sum()
    }
}

/// Does Muon make the steps of a site's tables orthogonal? Of embedding and head it does not.
fn orthogonal(site: Site) -> bool {
    site.layer.is_some()
}

/// Steps that take every number by itself.
#[derive(Clone, Copy)]
enum Along {
    AdamW(AdamW),
    Lion(Lion),
}

impl Along {
    fn run(self, values: &mut [f32], gradient: &[f32], moments: &mut [Moment]) {
        match (self, moments) {
            (Along::AdamW(step), [Moment::Floats(first), Moment::Floats(second)]) => {
                ops::adamw(step, values, gradient, first, second);
            }
            (Along::AdamW(step), [Moment::Bytes(first), Moment::Bytes(second)]) => {
                ops::adamw_eight_bit(step, values, gradient, first, second);
            }
            (Along::Lion(step), [Moment::Floats(first)]) => ops::lion(step, values, gradient, first),
            (Along::Lion(step), [Moment::Bytes(first)]) => ops::lion_eight_bit(step, values, gradient, first),
            _ => unreachable!("`Optimizer::new` makes the moments that a step has"),
        }
    }
}
