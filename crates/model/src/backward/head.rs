//! The last norm, the head and the loss, and the way back from them to the residual stream.

use super::{Asked, Backward, Out};
use crate::{Flow, Model, Parameters, Result, Site};
use std::ops::Range;
use tensor::ops::{self, Normed, Target};

/// Rows whose logits are in memory at once.
pub(super) const ROWS: usize = 512;

impl Backward {
    /// The loss of some rows; their logits become its gradient, times `factor`.
    pub(super) fn logits(
        &mut self,
        model: &Model,
        flow: &Flow,
        rows: Range<usize>,
        targets: &[Option<u32>],
        asked: &mut Asked<'_>,
    ) -> Result<f64> {
        self.listed.clear();
        self.listed.extend(rows.clone());
        model.final_into(flow, &self.listed, self.head.values_mut())?;
        model.head_into(&mut self.head, self.way.logits.values_mut(), &mut ())?;
        self.losses.clear();
        self.losses.resize(rows.len(), 0.0);
        if model.spec.logit_cap.is_some() {
            self.way.part.copy_from(self.way.logits.values());
        }
        let own = &targets[rows.clone()];
        asked.aim.rows(rows, self.way.logits.values_mut(), own, asked.factor, &mut self.losses)?;
        if let Some(cap) = model.spec.logit_cap {
            ops::soft_cap_gradient(self.way.logits.values_mut(), &self.way.part, cap);
        }
        Ok(self.losses.iter().map(|l| f64::from(*l)).sum())
    }

    /// The last norm, the head and the loss, a few rows at a time; leaves the gradient of the residual stream.
    pub(super) fn head(
        &mut self,
        model: &Model,
        flow: &Flow,
        targets: &[Option<u32>],
        mut asked: Asked<'_>,
        into: &mut Parameters,
    ) -> Result<f64> {
        let site = model.spec.resolve(Site::HEAD);
        let norm = model.norm(Site::FINAL_NORM)?;
        let mut loss = 0.0;
        self.way.dx.values_mut().reset(flow.tokens(), model.spec.dim);
        for first in (0..flow.tokens()).step_by(ROWS) {
            let rows = first..flow.tokens().min(first + ROWS);
            loss += self.logits(model, flow, rows.clone(), targets, &mut asked)?;
            self.way.columns.pack(self.head.values(), self.way.form);
            self.way.weight(site, Out::Logits, into)?;
            match self.way.across.get(&site) {
                Some(linear) => ops::products(&mut self.way.logits, [Target { linear, out: &mut self.way.sum }]),
                None => {
                    let weight = &model.linear(site)?.weight;
                    self.way.frozen.product(
                        self.way.form,
                        self.way.logits.values(),
                        None,
                        weight,
                        &mut self.way.sum,
                        false,
                    )?;
                }
            }
            self.some.reset(rows.len(), model.spec.dim);
            self.way.part.reset(rows.len(), model.spec.dim);
            ops::clear(self.way.part.as_mut_slice());
            for (i, row) in rows.clone().enumerate() {
                self.some.row_mut(i).copy_from_slice(flow.residual().row(row));
            }
            let normed = Normed { kind: model.spec.norm, x: &self.some, weight: &norm.scale, eps: model.spec.norm_eps };
            let (scale, shift) = into.norm(Site::FINAL_NORM).unwrap_or((&mut self.way.unlearned[..], None));
            ops::norm_gradient(normed, &self.way.sum, &mut self.way.part, scale, shift, &mut self.way.scratch);
            for (i, row) in rows.enumerate() {
                self.way.dx.values_mut().row_mut(row).copy_from_slice(self.way.part.row(i));
            }
        }
        Ok(loss)
    }
}
