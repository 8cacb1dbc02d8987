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
        model.head_into(&mut self.head, self.logits.values_mut(), &mut ())?;
        self.losses.clear();
        self.losses.resize(rows.len(), 0.0);
        if model.spec.logit_cap.is_some() {
            self.part.copy_from(self.logits.values());
        }
        let own = &targets[rows.clone()];
        asked.aim.rows(rows, self.logits.values_mut(), own, asked.factor, &mut self.losses)?;
        if let Some(cap) = model.spec.logit_cap {
            ops::soft_cap_gradient(self.logits.values_mut(), &self.part, cap);
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
        let widest = model.spec.blocks.iter().map(|b| b.head_dim).max().unwrap_or(0);
        self.unlearned.resize(widest.max(model.spec.dim), 0.0);
        let mut loss = 0.0;
        self.dx.values_mut().reset(flow.tokens(), model.spec.dim);
        for first in (0..flow.tokens()).step_by(ROWS) {
            let rows = first..flow.tokens().min(first + ROWS);
            loss += self.logits(model, flow, rows.clone(), targets, &mut asked)?;
            self.columns.pack(self.head.values(), self.form);
            self.weight(site, Out::Logits, into)?;
            match self.across.get(&site) {
                Some(linear) => ops::products(&mut self.logits, [Target { linear, out: &mut self.sum }]),
                None => {
                    let weight = &model.linear(site)?.weight;
                    self.frozen.product(self.form, self.logits.values(), None, weight, &mut self.sum, false)?;
                }
            }
            self.some.reset(rows.len(), model.spec.dim);
            self.part.reset(rows.len(), model.spec.dim);
            ops::clear(self.part.as_mut_slice());
            for (i, row) in rows.clone().enumerate() {
                self.some.row_mut(i).copy_from_slice(flow.residual().row(row));
            }
            let normed = Normed { kind: model.spec.norm, x: &self.some, weight: &norm.scale, eps: model.spec.norm_eps };
            let (scale, shift) = into.norm(Site::FINAL_NORM).unwrap_or((&mut self.unlearned[..], None));
            ops::norm_gradient(normed, &self.sum, &mut self.part, scale, shift, &mut self.scratch);
            for (i, row) in rows.enumerate() {
                self.dx.values_mut().row_mut(row).copy_from_slice(self.part.row(i));
            }
        }
        Ok(loss)
    }
}
