//! The way back through one block: the gradients of its products, norms and attention. A whole model's
//! ([`super::Backward`]) walks through it block by block; a block that learns alone has it as [`BlockBackward`].

use super::Asked;
use crate::{
    BlockSpec, Change, Error, Flow, Heads, Kept, Likelihood, Model, Parameters, Result, Role, Site,
    adapting::{self, Adapted, Adapting},
    frozen::Frozen,
};
use std::collections::BTreeMap;
use tensor::{
    Linear, Tensor, Weight,
    ops::{self, Attended, Columns, Gram, Memory, Normed, Operand, Squares, Target},
    packed::{Form, InputKind, Inputs, Packed, Turn},
};

/// One block forth and back, whatever its inputs are and whatever is asked of its outputs.
pub struct BlockBackward {
    way: Way,
    flow: Flow,
    kept: Kept,
}

impl BlockBackward {
    /// For a model of which matrices that learn are packed as floats of `form`; [`BlockBackward::refresh`] gives it the values of
    /// every matrix of the block.
    pub fn new(model: &Model, form: Form) -> BlockBackward {
        BlockBackward { way: Way::new(model, form), flow: Flow::default(), kept: Kept::default() }
    }

    /// Takes over the values of a matrix: into the model, packed, and transposed for the way back.
    ///
    /// # Errors
    /// If there is no memory for it, or the model has no such matrix.
    pub fn refresh(&mut self, model: &mut Model, site: Site, values: &Tensor) -> Result<()> {
        self.way.refresh(model, site, values)
    }

    /// Runs a block over sequences of so many tokens each, each from position 0: what the residual stream holds before it,
    /// `[tokens, dim]`, becomes what it holds after it.
    ///
    /// # Errors
    /// If the model lacks a weight of the block.
    pub fn forward(&mut self, model: &Model, layer: u16, rows: &[usize], inputs: &Tensor) -> Result<&Tensor> {
        model.restart_before_block(&mut self.flow, rows, inputs);
        self.way.run_block(model, layer, &mut self.flow, &mut self.kept)?;
        Ok(self.flow.residual())
    }

    /// From the gradient of what [`BlockBackward::forward`] returned last to those of the block's parameters, which are added
    /// to `into` as far as it has them. Returns that of the inputs.
    ///
    /// # Errors
    /// If the model lacks a weight of the block.
    pub fn backward(&mut self, model: &Model, layer: u16, outputs: &Tensor, into: &mut Parameters) -> Result<&Tensor> {
        self.way.dx.values_mut().copy_from(outputs);
        // Nothing is asked of what attention reads.
        let asked = Asked { aim: &mut Likelihood, factor: 1.0 };
        self.way.block(model, layer, &self.flow, &mut self.kept, asked, into)?;
        Ok(self.way.dx.values())
    }
}

/// What walking back through blocks takes, used again from block to block.
pub(super) struct Way {
    pub(super) form: Form,
    /// Transposed matrices of the products whose inputs have gradients.
    pub(super) across: BTreeMap<Site, Linear>,
    pub(super) frozen: Frozen,
    adapting: BTreeMap<Site, Adapting>,
    adapters: adapting::Memory,
    /// Keys and values of the block at hand.
    memories: Vec<Memory>,
    /// Gradient of the residual stream.
    pub(super) dx: Operand,
    /// Parameters of outputs of products, as their inputs' products read them.
    outs: [Operand; 3],
    /// The same before the other half of a parallel block.
    beside: Operand,
    pub(super) logits: Operand,
    pub(super) sum: Tensor,
    pub(super) part: Tensor,
    /// Inputs of products, made again.
    normed: Operand,
    pub(super) columns: Columns,
    rows: Inputs,
    pub(super) scratch: Vec<f32>,
    /// Where the gradients of norms go that do not learn.
    pub(super) unlearned: Vec<f32>,
    /// Second moments of gradients of outputs, where somebody asks for them.
    pub(super) moments: Option<BTreeMap<Site, Gram>>,
    /// Their squares.
    pub(super) squares: Option<BTreeMap<Site, Squares>>,
}

impl Way {
    pub(super) fn new(model: &Model, form: Form) -> Way {
        let widest = model.spec.blocks.iter().map(|b| b.head_dim).max().unwrap_or(0);
        Way {
            form,
            across: BTreeMap::new(),
            frozen: Frozen::default(),
            adapting: BTreeMap::new(),
            adapters: adapting::Memory::default(),
            memories: Vec::new(),
            dx: Operand::default(),
            outs: Default::default(),
            beside: Operand::default(),
            logits: Operand::default(),
            sum: Tensor::default(),
            part: Tensor::default(),
            normed: Operand::default(),
            columns: Columns::default(),
            rows: Inputs::default(),
            scratch: Vec::new(),
            unlearned: vec![0.0; widest.max(model.spec.dim)],
            moments: None,
            squares: None,
        }
    }

    /// Takes over the values of a matrix: into the model, packed, and transposed for the way back.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(super) fn refresh(&mut self, model: &mut Model, site: Site, values: &Tensor) -> Result<()> {
        let full = |source| Error::NoRoom { bytes: 4 * values.as_slice().len(), source };
        let head = model.spec.resolve(Site::HEAD);
        let linear = model.linears.get_mut(&site);
        let linear = linear.ok_or_else(|| Error::Site { site, reason: "the model has no such matrix".into() })?;
        if site.layer.is_none() && site != head {
            // A table that is only looked up.
            linear.weight.set_floats(values);
            return Ok(());
        }
        match &mut linear.weight {
            Weight::Packed(packed) => packed.refill(values, Turn::Straight).map_err(full)?,
            weight => *weight = Weight::Packed(Packed::of(values, self.form, Turn::Straight).map_err(full)?),
        }
        match self.across.get_mut(&site) {
            Some(Linear { weight: Weight::Packed(packed), .. }) => packed.refill(values, Turn::Across).map_err(full),
            _ => {
                let packed = Packed::of(values, self.form, Turn::Across).map_err(full)?;
                self.across.insert(site, Linear::new(Weight::Packed(packed)));
                Ok(())
            }
        }
    }

    /// Takes over the values of an adapter: into the model, and across for the way back.
    ///
    /// # Errors
    /// If it does not fit its site, or there is no memory for it.
    pub(super) fn refresh_adapter(&mut self, model: &mut Model, site: Site, change: Change<'_>) -> Result<()> {
        let mut own = self.adapting.remove(&site);
        Adapting::refresh(&mut own, model, site, change, self.form)?;
        self.adapting.extend(own.map(|own| (site, own)));
        Ok(())
    }

    /// Runs a block, which leaves what its gradient needs.
    pub(super) fn run_block(&mut self, model: &Model, layer: u16, flow: &mut Flow, kept: &mut Kept) -> Result<()> {
        let (at, blocks) = (usize::from(layer), &model.spec.blocks);
        flow.keep(kept);
        let memories = &mut self.memories;
        memories.iter_mut().for_each(|m| m.truncate(0));
        let shape = |b: &BlockSpec| (b.kv_heads, b.head_dim);
        if blocks.iter().any(|b| shape(b) != shape(&blocks[at])) {
            memories.clear();
        }
        let sequences = flow.rows().len();
        memories.truncate(sequences);
        if memories.len() < sequences {
            memories.extend(model.memory(layer, flow).into_iter().skip(memories.len()));
        }
        model.block(layer, flow, memories, &mut ())?;
        flow.keep(kept);
        Ok(())
    }

    /// Walks back through a block.
    pub(super) fn block(
        &mut self,
        model: &Model,
        layer: u16,
        flow: &Flow,
        kept: &mut Kept,
        asked: Asked<'_>,
        into: &mut Parameters,
    ) -> Result<()> {
        let (spec, site) = (&model.spec, |role| Site::of(layer, role));
        if spec.parallel {
            // Both halves read the same and return beside each other: what attention returned has this gradient too.
            self.beside.values_mut().copy_from(self.dx.values());
        }
        let from = self.returned(model, site(Role::PostMlpNorm), &kept.returned[1], Out::Residual, into)?;
        self.feed_forward(model, layer, from, kept, into)?;
        let middle = if spec.parallel { &kept.entry } else { &kept.middle };
        self.norm(model, site(Role::MlpNorm), middle, into)?;
        let before = if spec.parallel { Out::Beside } else { Out::Residual };
        let from = self.returned(model, site(Role::PostAttnNorm), &kept.returned[0], before, into)?;
        self.attention(model, layer, from, (flow, kept), asked, into)?;
        self.norm(model, site(Role::AttnNorm), &kept.entry, into)?;
        Ok(())
    }

    /// Where the gradient of what a half of the block returned lies: at `from`, or before the norm that follows it.
    fn returned(
        &mut self,
        model: &Model,
        post: Site,
        before: &Tensor,
        from: Out,
        into: &mut Parameters,
    ) -> Result<Out> {
        if !model.spec.post_norms {
            return Ok(from);
        }
        let dx = if from == Out::Beside { self.beside.values() } else { self.dx.values() };
        let weight = &model.norm(post)?.scale;
        let normed = Normed { kind: model.spec.norm, x: before, weight, eps: model.spec.norm_eps };
        let out = self.outs[0].values_mut();
        out.reset(dx.rows(), dx.cols());
        ops::clear(out.as_mut_slice());
        let (scale, shift) = into.norm(post).unwrap_or((&mut self.unlearned[..], None));
        ops::norm_gradient(normed, dx, out, scale, shift, &mut self.scratch);
        Ok(Out::Of(0))
    }

    /// Adds what a norm's input gets through the norm, whose output's gradient is `self.sum`, to that of the residual.
    fn norm(&mut self, model: &Model, site: Site, x: &Tensor, into: &mut Parameters) -> Result<()> {
        let weight = &model.norm(site)?.scale;
        let normed = Normed { kind: model.spec.norm, x, weight, eps: model.spec.norm_eps };
        let (scale, shift) = into.norm(site).unwrap_or((&mut self.unlearned[..], None));
        ops::norm_gradient(normed, &self.sum, self.dx.values_mut(), scale, shift, &mut self.scratch);
        Ok(())
    }

    /// From the gradient of what the feed-forward network returned (`from`) to that of its input (`sum`).
    fn feed_forward(
        &mut self,
        model: &Model,
        layer: u16,
        from: Out,
        kept: &mut Kept,
        into: &mut Parameters,
    ) -> Result<()> {
        let (spec, site) = (&model.spec, |role| Site::of(layer, role));
        if spec.gated {
            ops::gate_to(spec.activation, &kept.gate, &kept.up, self.normed.values_mut());
        } else {
            self.normed.values_mut().copy_from(&kept.up);
            spec.activation.apply(self.normed.values_mut());
        }
        self.columns.pack(self.normed.values(), self.form);
        self.back(model, site(Role::Down), from, into)?;
        if spec.gated {
            ops::gate_gradient(spec.activation, &mut kept.gate, &mut kept.up, &self.part);
        } else {
            ops::activation_gradient(spec.activation, &mut kept.up, &self.part);
        }
        let middle = if spec.parallel { &kept.entry } else { &kept.middle };
        self.again(model, site(Role::MlpNorm), middle)?;
        std::mem::swap(self.outs[0].values_mut(), &mut kept.up);
        std::mem::swap(self.outs[1].values_mut(), &mut kept.gate);
        let roles = if spec.gated { &[Role::Up, Role::Gate][..] } else { &[Role::Up] };
        self.inputs(model, layer, roles, into)
    }

    /// From the gradient of what attention returned (`from`) to that of its input (`sum`).
    fn attention(
        &mut self,
        model: &Model,
        layer: u16,
        from: Out,
        (flow, kept): (&Flow, &Kept),
        Asked { aim, factor }: Asked<'_>,
        into: &mut Parameters,
    ) -> Result<()> {
        let (spec, site) = (&model.spec, |role| Site::of(layer, role));
        let b = &spec.blocks[usize::from(layer)];
        self.columns.pack(&kept.attended, self.form);
        if model.adapters.contains_key(&site(Role::O)) {
            self.normed.values_mut().copy_from(&kept.attended);
        }
        self.back(model, site(Role::O), from, into)?;
        let shape = b.attention();
        let attended = Attended {
            q: &kept.q,
            k: &kept.k,
            v: &kept.v,
            out: &kept.attended,
            log_sums: &kept.log_sums,
            rows: flow.rows(),
            shape: &shape,
        };
        let [dq, dk, dv] = &mut self.outs;
        let form = if self.form == Form::Bf16 { Form::Bf16 } else { Form::F32 };
        ops::attention_gradient(attended, &self.part, form, [dq.values_mut(), dk.values_mut(), dv.values_mut()]);
        let heads = Heads { values: [&kept.q, &kept.k, &kept.v], rows: flow.rows() };
        aim.attended(layer, heads, self.outs.each_mut().map(Operand::values_mut), factor);
        if let Some(rotation) = flow.rotation(b.rope) {
            ops::rope_gradient(self.outs[0].values_mut(), b.head_dim, rotation);
            ops::rope_gradient(self.outs[1].values_mut(), b.head_dim, rotation);
        }
        if spec.qk_norm {
            for (role, i) in [(Role::QNorm, 0), (Role::KNorm, 1)] {
                let weight = &model.norm(site(role))?.scale;
                let normed = Normed { kind: spec.norm, x: &kept.raw[i], weight, eps: spec.norm_eps };
                let dy = self.outs[i].values_mut();
                self.part.reset(dy.rows(), dy.cols());
                ops::clear(self.part.as_mut_slice());
                let (scale, _) = into.norm(site(role)).unwrap_or((&mut self.unlearned[..], None));
                ops::norm_gradient(normed, dy, &mut self.part, scale, None, &mut self.scratch);
                std::mem::swap(dy, &mut self.part);
            }
        }
        self.again(model, site(Role::AttnNorm), &kept.entry)?;
        self.inputs(model, layer, &[Role::Q, Role::K, Role::V], into)
    }

    /// Makes a norm's output again: the input of the products that follow, as columns.
    fn again(&mut self, model: &Model, site: Site, x: &Tensor) -> Result<()> {
        let (norm, spec) = (model.norm(site)?, &model.spec);
        ops::norm(spec.norm, x, &norm.scale, norm.shift.as_deref(), spec.norm_eps, self.normed.values_mut());
        self.columns.pack(self.normed.values(), self.form);
        Ok(())
    }

    /// Parameters of products that read one input (`columns`), those of their outputs being `outs`: of their weights, and
    /// of the input (`sum`).
    fn inputs(&mut self, model: &Model, layer: u16, roles: &[Role], into: &mut Parameters) -> Result<()> {
        for (i, role) in roles.iter().enumerate() {
            self.product(model, Site::of(layer, *role), Out::Of(i), Into::Sum { add: i > 0 }, into)?;
        }
        Ok(())
    }

    /// The gradients of a product's weight and bias, and that of its input (`part`) from that of its output.
    fn back(&mut self, model: &Model, site: Site, from: Out, into: &mut Parameters) -> Result<()> {
        self.product(model, site, from, Into::Part, into)
    }

    /// The gradients of a product's parameters and of its input from that of its output.
    fn product(&mut self, model: &Model, site: Site, from: Out, to: Into, into: &mut Parameters) -> Result<()> {
        self.weight(site, from, into)?;
        let (dy, add) = (
            match from {
                Out::Of(i) => &mut self.outs[i],
                Out::Logits => &mut self.logits,
                Out::Residual => &mut self.dx,
                Out::Beside => &mut self.beside,
            },
            to == Into::Sum { add: true },
        );
        let dx = if to == Into::Part { &mut self.part } else { &mut self.sum };
        let (linear, branch) = (model.linear(site)?, model.adapters.get(&site));
        match self.across.get(&site) {
            Some(linear) if add => ops::add_product(dy, linear, dx),
            Some(linear) => ops::products(dy, [Target { linear, out: &mut *dx }]),
            None => {
                let gain = branch.and_then(|b| b.gain.as_ref()).map(|g| &g.factors[..]);
                self.frozen.product(self.form, dy.values(), gain, &linear.weight, dx, add)?;
            }
        }
        if let (Some(branch), Some(own)) = (branch, self.adapting.get(&site)) {
            let adapted = Adapted { site, linear, branch, own, form: self.form };
            self.adapters.gradient(adapted, &mut self.normed, &self.columns, dy, into, dx)?;
        }
        Ok(())
    }

    /// Adds the gradients of a product's weight and bias, its input being `columns`.
    pub(super) fn weight(&mut self, site: Site, out: Out, into: &mut Parameters) -> Result<()> {
        let dy = match out {
            Out::Of(i) => self.outs[i].values(),
            Out::Logits => self.logits.values(),
            Out::Residual => self.dx.values(),
            Out::Beside => self.beside.values(),
        };
        if let Some(moments) = self.moments.as_mut().filter(|_| site.layer.is_some()) {
            moments.entry(site).or_insert_with(|| Gram::new(dy.cols())).add(dy);
        }
        if let Some(squares) = self.squares.as_mut().filter(|_| site.layer.is_some()) {
            squares.entry(site).or_insert_with(|| Squares::new(dy.cols())).add(dy);
        }
        if let Some(gradient) = into.matrices.get_mut(&site) {
            let kernels = tensor::kernels::kernels();
            self.rows.pack_columns(dy, InputKind::of(self.form, kernels), kernels);
            ops::weight_gradient(&self.columns, &self.rows, gradient);
        }
        if let Some(bias) = into.biases.get_mut(&site) {
            ops::column_sums(dy, bias, &mut self.scratch);
        }
        Ok(())
    }
}

/// Which gradient of an output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Out {
    Of(usize),
    Logits,
    /// Of the residual stream.
    Residual,
    /// The same before the other half of a parallel block.
    Beside,
}

/// Where the gradient of a product's input goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Into {
    Part,
    Sum { add: bool },
}
