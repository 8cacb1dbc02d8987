//! Gradients of adapters, and the values that they and the running model take over after each step.
//!
//! Of `y = gain (W x + scale B A x) + bias` the values of `A` and `B` learn, and with DoRA the lengths that `gain` comes
//! from: `magnitude / |row|`, where the row's own length counts as a constant (arXiv 2402.09353, section 4.3).

use crate::{
    Branch, Change, Error, Model, Parameters, Result, Site,
    adapter::{Gain, gains, misfit, packed, repack, row_norms},
};
use tensor::{
    Linear, Tensor,
    kernels::kernels,
    ops::{self, Columns, Operand, Target},
    packed::{Form, InputKind, Inputs, Turn},
};

/// What walking back through the adapter of a site takes beside its [`Branch`].
pub(crate) struct Adapting {
    /// `B` with scale and gain across, `[rank, outputs]`.
    up: Linear,
    /// `A` across, `[inputs, rank]`.
    down: Linear,
    scale: f32,
    lengths: Option<Lengths>,
}

/// What the gradient of magnitudes takes.
struct Lengths {
    /// Of the rows of `W + scale B A`.
    norms: Vec<f32>,
    /// `scale B`.
    up: Tensor,
}

impl Adapting {
    /// Takes over the values of an adapter, into the model as well.
    pub fn refresh(
        place: &mut Option<Adapting>,
        model: &mut Model,
        site: Site,
        change: Change<'_>,
        form: Form,
    ) -> Result<()> {
        let linear = model.linear(site)?;
        if let Some(reason) = misfit(model.spec.shape(site).filter(|_| site.layer.is_some()), change) {
            return Err(Error::Site { site, reason });
        }
        let lengths = change.magnitude.map(|magnitude| (magnitude, row_norms(&linear.weight, Some(change))));
        let gain = lengths.as_ref().map(|(m, norms)| Gain::new(gains(m, norms), linear.bias.as_deref()));
        let mut up = change.up.clone();
        ops::scale(&mut up, change.scale);
        let lengths = lengths.map(|(_, norms)| Lengths { norms, up: up.clone() });
        if let Some(gain) = &gain {
            (0..up.rows()).for_each(|o| up.row_mut(o).iter_mut().for_each(|b| *b *= gain.factors[o]));
        }
        match (model.adapters.get_mut(&site), place) {
            (Some(branch), Some(own)) => {
                repack(&mut branch.down, change.down, Turn::Straight)?;
                repack(&mut branch.up, &up, Turn::Straight)?;
                repack(&mut own.down, change.down, Turn::Across)?;
                repack(&mut own.up, &up, Turn::Across)?;
                (branch.gain, own.scale, own.lengths) = (gain, change.scale, lengths);
            }
            (_, place) => {
                let straight = |x| packed(x, form, Turn::Straight);
                let branch = Branch { down: straight(change.down)?, up: straight(&up)?, gain };
                model.adapters.insert(site, branch);
                let (up, down) = (packed(&up, form, Turn::Across)?, packed(change.down, form, Turn::Across)?);
                *place = Some(Adapting { up, down, scale: change.scale, lengths });
            }
        }
        Ok(())
    }
}

/// Memory for gradients of adapters, used again from one to the next.
#[derive(Default)]
pub(crate) struct Memory {
    low: Operand,
    low_gradient: Operand,
    columns: Columns,
    rows: Inputs,
    product: Tensor,
    base: Tensor,
    dots: Vec<f32>,
    scratch: Vec<f32>,
}

/// A product and its adapter.
pub(crate) struct Adapted<'a> {
    pub site: Site,
    pub linear: &'a Linear,
    pub branch: &'a Branch,
    pub own: &'a Adapting,
    pub form: Form,
}

impl Memory {
    /// From the gradient of a product's output (`dy`) to those of its adapter (`into`) and, added, of its input (`dx`); the
    /// input is `x`, its columns `columns`.
    pub fn gradient(
        &mut self,
        adapted: Adapted<'_>,
        x: &mut Operand,
        columns: &Columns,
        dy: &mut Operand,
        into: &mut Parameters,
        dx: &mut Tensor,
    ) -> Result<()> {
        let Adapted { site, linear, branch, own, form } = adapted;
        let kind = InputKind::of(form, kernels());
        let none = || Error::Site { site, reason: "has no adapter that learns".into() };
        ops::products(x, [Target { linear: &branch.down, out: self.low.values_mut() }]);
        ops::products(dy, [Target { linear: &own.up, out: self.low_gradient.values_mut() }]);
        self.rows.pack_columns(self.low_gradient.values(), kind, kernels());
        ops::weight_gradient(columns, &self.rows, into.downs.get_mut(&site).ok_or_else(none)?);

        self.columns.pack(self.low.values(), form);
        self.rows.pack_columns(dy.values(), kind, kernels());
        let up = into.ups.get_mut(&site).ok_or_else(none)?;
        self.product.reset(up.rows(), up.cols());
        ops::clear(self.product.as_mut_slice());
        ops::weight_gradient(&self.columns, &self.rows, &mut self.product);
        let gain = branch.gain.as_ref();
        for o in 0..up.rows() {
            let factor = own.scale * gain.map_or(1.0, |g| g.factors[o]);
            up.row_mut(o).iter_mut().zip(self.product.row(o)).for_each(|(b, d)| *b += factor * d);
        }
        if let (Some(lengths), Some(magnitudes)) = (&own.lengths, into.magnitudes.get_mut(&site)) {
            self.lengths(lengths, linear, x, dy.values(), magnitudes);
        }
        ops::add_product(&mut self.low_gradient, &own.down, dx);
        Ok(())
    }

    /// Adds the gradient of magnitudes: that of each output with what it is before its gain, over the row's length.
    fn lengths(&mut self, lengths: &Lengths, linear: &Linear, x: &mut Operand, dy: &Tensor, into: &mut [f32]) {
        let plain = Linear::new(linear.weight.clone());
        ops::products(x, [Target { linear: &plain, out: &mut self.base }]);
        self.base.as_mut_slice().iter_mut().zip(dy.as_slice()).for_each(|(b, d)| *b *= d);
        self.dots.clear();
        self.dots.resize(into.len(), 0.0);
        ops::column_sums(&self.base, &mut self.dots, &mut self.scratch);
        for (o, into) in into.iter_mut().enumerate().filter(|(o, _)| lengths.norms[*o] > 0.0) {
            let low: f32 = lengths.up.row(o).iter().zip(self.product.row(o)).map(|(b, d)| b * d).sum();
            *into += (self.dots[o] + low) / lengths.norms[o];
        }
    }
}
