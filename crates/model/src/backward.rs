//! The gradient: the one forward pass, walked back.
//!
//! The model's matrices are packed as floats; products of gradients read their transposes, which [`Backward`] holds.
//! What a block's gradient needs is what its forward pass leaves in [`Kept`]: cheap things (norms, gated products) are
//! made again. Where activations are checkpointed (arXiv 1604.06174), a block leaves only its input and runs again.
//!
//! A matrix that was never given its values does not learn: it stays as the model stores it.

mod head;

use crate::{
    Aim, BlockSpec, Bucket, Change, Error, Flow, Heads, Kept, Likelihood, Model, Parameters, Result, Role, Site,
    Tokens,
    adapting::{self, Adapted, Adapting},
    frozen::Frozen,
};
use std::collections::BTreeMap;
use tensor::{
    Linear, Tensor, Weight,
    ops::{self, Attended, Columns, Memory, Normed, Operand, Target},
    packed::{Form, InputKind, Inputs, Packed, Turn},
};

/// How much of the loss a gradient is of, and of which.
pub struct Asked<'a> {
    /// Which loss.
    pub aim: &'a mut dyn Aim,
    /// Gradients are of so many times its sum.
    pub factor: f32,
}

/// Is told of buckets whose gradients are final, and may do with these what it likes.
pub type Tell<'a> = &'a mut dyn FnMut(Bucket, &mut Parameters);

/// What walking back takes, used again from step to step.
pub struct Backward {
    form: Form,
    /// Transposed matrices of the products whose inputs have gradients.
    across: BTreeMap<Site, Linear>,
    frozen: Frozen,
    adapting: BTreeMap<Site, Adapting>,
    adapters: adapting::Memory,
    flow: Flow,
    /// What blocks left: each of them, or the last that ran where activations are checkpointed.
    kept: Vec<Kept>,
    /// Inputs of blocks that run again.
    entries: Vec<Tensor>,
    /// Keys and values of the block at hand.
    memories: Vec<Memory>,
    /// Gradient of the residual stream.
    dx: Operand,
    /// Parameters of outputs of products, as their inputs' products read them.
    outs: [Operand; 3],
    /// The same before the other half of a parallel block.
    beside: Operand,
    sum: Tensor,
    part: Tensor,
    /// Inputs of products, made again.
    normed: Operand,
    columns: Columns,
    rows: Inputs,
    scratch: Vec<f32>,
    head: Operand,
    logits: Operand,
    some: Tensor,
    losses: Vec<f32>,
    listed: Vec<usize>,
    /// Where the gradients of norms go that do not learn.
    unlearned: Vec<f32>,
}

impl Backward {
    /// For a model whose matrices that learn are packed as floats of `form`; [`Backward::refresh`] and
    /// [`Backward::refresh_adapter`] give it the values.
    pub fn new(model: &Model, form: Form) -> Backward {
        let layers = usize::from(model.spec.layers());
        Backward {
            form,
            across: BTreeMap::new(),
            flow: Flow::default(),
            frozen: Frozen::default(),
            adapting: BTreeMap::new(),
            adapters: adapting::Memory::default(),
            kept: (0..layers).map(|_| Kept::default()).collect(),
            entries: Vec::new(),
            memories: Vec::new(),
            dx: Operand::default(),
            outs: Default::default(),
            beside: Operand::default(),
            sum: Tensor::default(),
            part: Tensor::default(),
            normed: Operand::default(),
            columns: Columns::default(),
            rows: Inputs::default(),
            scratch: Vec::new(),
            head: Operand::default(),
            logits: Operand::default(),
            some: Tensor::default(),
            losses: Vec::new(),
            listed: Vec::new(),
            unlearned: Vec::new(),
        }
    }

    /// From here on blocks leave only their inputs and run again on the way back: the same numbers in less memory.
    pub fn checkpoint_activations(&mut self) {
        if self.entries.is_empty() {
            self.entries.resize_with(self.kept.len(), Tensor::default);
            self.kept.truncate(1);
        }
    }

    /// Takes over the values of a matrix: into the model, packed, and transposed for the way back.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn refresh(&mut self, model: &mut Model, site: Site, values: &Tensor) -> Result<()> {
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
    pub fn refresh_adapter(&mut self, model: &mut Model, site: Site, change: Change<'_>) -> Result<()> {
        let mut own = self.adapting.remove(&site);
        Adapting::refresh(&mut own, model, site, change, self.form)?;
        self.adapting.extend(own.map(|own| (site, own)));
        Ok(())
    }

    /// Runs a batch forth and back: adds the gradient of `factor` times the summed loss to `into`, and returns the summed
    /// negative log-likelihood, without the factor, in nats.
    ///
    /// # Errors
    /// If a token is not in the vocabulary or a sequence is longer than the context.
    pub fn run(
        &mut self,
        model: &Model,
        batch: &Tokens,
        aim: &mut dyn Aim,
        factor: f32,
        into: &mut Parameters,
    ) -> Result<f64> {
        self.run_telling(model, batch, Asked { aim, factor }, into, &mut |_, _| {})
    }

    /// [`Backward::run`] that tells of each bucket as soon as its gradients are final, while the others are still made.
    ///
    /// # Errors
    /// As [`Backward::run`].
    pub fn run_telling(
        &mut self,
        model: &Model,
        batch: &Tokens,
        asked: Asked<'_>,
        into: &mut Parameters,
        tell: Tell<'_>,
    ) -> Result<f64> {
        let mut flow = std::mem::take(&mut self.flow);
        asked.aim.begin(batch)?;
        let result = self.forth_and_back(model, &mut flow, batch, asked, into, tell);
        self.flow = flow;
        result
    }

    /// The summed negative log-likelihood of a batch, nats.
    ///
    /// # Errors
    /// As [`Backward::run`].
    pub fn loss(&mut self, model: &Model, batch: &Tokens) -> Result<f64> {
        let mut flow = std::mem::take(&mut self.flow);
        let result = self.forth(model, &mut flow, batch).and_then(|()| {
            let rows = |first| first..flow.tokens().min(first + head::ROWS);
            let pieces = (0..flow.tokens()).step_by(head::ROWS).map(rows);
            let mut asked = Asked { aim: &mut Likelihood, factor: 0.0 };
            pieces.map(|rows| self.logits(model, &flow, rows, &batch.targets, &mut asked)).sum()
        });
        self.flow = flow;
        result
    }

    fn forth_and_back(
        &mut self,
        model: &Model,
        flow: &mut Flow,
        batch: &Tokens,
        asked: Asked<'_>,
        into: &mut Parameters,
        tell: Tell<'_>,
    ) -> Result<f64> {
        self.forth(model, flow, batch)?;
        let Asked { aim, factor } = asked;
        let loss = self.head(model, flow, &batch.targets, Asked { aim: &mut *aim, factor }, into)?;
        tell(Bucket::Head, into);
        for layer in (0..model.spec.layers()).rev() {
            if aim.looks_at(layer) {
                let next = usize::from(layer) + 1;
                // What a block returns the next one begins with.
                let output = match self.entries.get(next).or_else(|| self.kept.get(next).map(|kept| &kept.entry)) {
                    Some(entry) => entry,
                    None => flow.residual(),
                };
                aim.output(layer, output, self.dx.values_mut(), factor, into);
            }
            self.block(model, layer, flow, Asked { aim: &mut *aim, factor }, into)?;
            tell(Bucket::Block(layer), into);
        }
        self.embedding(model, batch, into)?;
        tell(Bucket::Embedding, into);
        Ok(loss)
    }

    fn forth(&mut self, model: &Model, flow: &mut Flow, batch: &Tokens) -> Result<()> {
        let past = vec![0; batch.sequences.len()];
        model.restart(flow, batch.sequences.iter().map(Vec::as_slice), &past)?;
        for layer in 0..model.spec.layers() {
            if let Some(entry) = self.entries.get_mut(usize::from(layer)) {
                entry.copy_from(flow.residual());
            }
            self.run_block(model, layer, flow)?;
        }
        Ok(())
    }

    /// Runs a block, which leaves what its gradient needs.
    fn run_block(&mut self, model: &Model, layer: u16, flow: &mut Flow) -> Result<()> {
        let (at, place, blocks) = (usize::from(layer), self.place(layer), &model.spec.blocks);
        flow.keep(&mut self.kept[place]);
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
        flow.keep(&mut self.kept[place]);
        Ok(())
    }

    /// Where what a block leaves is kept.
    fn place(&self, layer: u16) -> usize {
        if self.entries.is_empty() { usize::from(layer) } else { 0 }
    }

    /// Walks back through a block.
    fn block(
        &mut self,
        model: &Model,
        layer: u16,
        flow: &mut Flow,
        asked: Asked<'_>,
        into: &mut Parameters,
    ) -> Result<()> {
        let (spec, site) = (&model.spec, |role| Site::of(layer, role));
        // What the last block left is still there.
        if let Some(entry) = self.entries.get(usize::from(layer)).filter(|_| layer + 1 < spec.layers()) {
            flow.stand_at(entry);
            self.run_block(model, layer, flow)?;
        }
        let place = self.place(layer);
        let mut kept = std::mem::take(&mut self.kept[place]);
        if spec.parallel {
            // Both halves read the same and return beside each other: what attention returned has this gradient too.
            self.beside.values_mut().copy_from(self.dx.values());
        }
        let from = self.returned(model, site(Role::PostMlpNorm), &kept.returned[1], Out::Residual, into)?;
        self.feed_forward(model, layer, from, &mut kept, into)?;
        let middle = if spec.parallel { &kept.entry } else { &kept.middle };
        self.norm(model, site(Role::MlpNorm), middle, into)?;
        let before = if spec.parallel { Out::Beside } else { Out::Residual };
        let from = self.returned(model, site(Role::PostAttnNorm), &kept.returned[0], before, into)?;
        self.attention(model, layer, from, (flow, &kept), asked, into)?;
        self.norm(model, site(Role::AttnNorm), &kept.entry, into)?;
        self.kept[place] = kept;
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
    fn weight(&mut self, site: Site, out: Out, into: &mut Parameters) -> Result<()> {
        let dy = match out {
            Out::Of(i) => self.outs[i].values(),
            Out::Logits => self.logits.values(),
            Out::Residual => self.dx.values(),
            Out::Beside => self.beside.values(),
        };
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

    /// Adds the gradient of the residual stream to the rows of the embedding, and to those of learned positions.
    fn embedding(&mut self, model: &Model, batch: &Tokens, into: &mut Parameters) -> Result<()> {
        if let Some(table) = into.matrices.get_mut(&Site::POSITION) {
            let mut row = 0;
            for sequence in &batch.sequences {
                for position in 0..sequence.len() {
                    add(table.row_mut(position), self.dx.values().row(row));
                    row += 1;
                }
            }
        }
        if let Some(scale) = model.spec.embed_scale {
            ops::scale(self.dx.values_mut(), scale);
        }
        let Some(table) = into.matrices.get_mut(&Site::EMBED) else { return Ok(()) };
        for (row, token) in batch.sequences.iter().flatten().enumerate() {
            add(table.row_mut(*token as usize), self.dx.values().row(row));
        }
        Ok(())
    }
}

/// Which gradient of an output.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Out {
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

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(t, f)| *t += f);
}
