//! The gradient: the one forward pass, walked back.
//!
//! The model's matrices are packed as floats; products of gradients read their transposes, which [`Backward`] holds.
//! What a block's gradient needs is what its forward pass leaves in [`Kept`]: cheap things (norms, gated products) are
//! made again.

use crate::{BlockSpec, Bucket, Error, Flow, Kept, Model, Parameters, Result, Role, Site};
use std::{collections::BTreeMap, ops::Range};
use tensor::{
    Linear, Tensor, Weight,
    ops::{self, Attended, Columns, Memory, Normed, Operand, Target},
    packed::{Form, InputKind, Inputs, Packed, Turn},
};

/// Sequences and what should follow each of their tokens.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    /// The sequences, each from position 0.
    pub sequences: Vec<Vec<u32>>,
    /// For every token of every sequence the one to be predicted from it; `None` counts for nothing.
    pub targets: Vec<Option<u32>>,
}

impl Tokens {
    /// How many predictions count.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|t| t.is_some()).count()
    }
}

/// What is learned from logits.
pub trait Aim {
    /// A batch begins.
    ///
    /// # Errors
    /// If it cannot be prepared.
    fn begin(&mut self, batch: &Tokens) -> Result<()>;

    /// Replaces the logits of some rows of the batch by the gradient of `factor` times their loss; writes the negative
    /// log-likelihood of each row's target (nats) to `losses`, and nothing where there is none.
    ///
    /// # Errors
    /// If what they are compared with cannot be computed.
    fn rows(
        &mut self,
        rows: Range<usize>,
        logits: &mut Tensor,
        targets: &[Option<u32>],
        factor: f32,
        losses: &mut [f32],
    ) -> Result<()>;
}

/// To make the targets likely.
pub struct Likelihood;

impl Aim for Likelihood {
    fn begin(&mut self, _: &Tokens) -> Result<()> {
        Ok(())
    }

    fn rows(
        &mut self,
        _: Range<usize>,
        logits: &mut Tensor,
        targets: &[Option<u32>],
        factor: f32,
        losses: &mut [f32],
    ) -> Result<()> {
        ops::cross_entropy(logits, targets, factor, losses);
        Ok(())
    }
}

/// How much of the loss a gradient is of, and of which.
pub struct Asked<'a> {
    /// Which loss.
    pub aim: &'a mut dyn Aim,
    /// Gradients are of so many times its sum.
    pub factor: f32,
}

/// Is told of buckets whose gradients are final, and may do with these what it likes.
pub type Tell<'a> = &'a mut dyn FnMut(Bucket, &mut Parameters);

/// Rows whose logits are in memory at once.
const HEAD_ROWS: usize = 512;

/// What walking back takes, used again from step to step.
pub struct Backward {
    form: Form,
    /// Transposed matrices of the products whose inputs have gradients.
    across: BTreeMap<Site, Linear>,
    flow: Flow,
    kept: Vec<Kept>,
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
    normed: Tensor,
    columns: Columns,
    rows: Inputs,
    scratch: Vec<f32>,
    head: Operand,
    logits: Operand,
    some: Tensor,
    losses: Vec<f32>,
    listed: Vec<usize>,
}

impl Backward {
    /// For a model whose matrices are packed as floats of `form`; [`Backward::refresh`] gives it the values.
    pub fn new(model: &Model, form: Form) -> Backward {
        let layers = usize::from(model.spec.layers());
        Backward {
            form,
            across: BTreeMap::new(),
            flow: Flow::default(),
            kept: (0..layers).map(|_| Kept::default()).collect(),
            memories: Vec::new(),
            dx: Operand::default(),
            outs: Default::default(),
            beside: Operand::default(),
            sum: Tensor::default(),
            part: Tensor::default(),
            normed: Tensor::default(),
            columns: Columns::default(),
            rows: Inputs::default(),
            scratch: Vec::new(),
            head: Operand::default(),
            logits: Operand::default(),
            some: Tensor::default(),
            losses: Vec::new(),
            listed: Vec::new(),
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
            let rows = |first| first..flow.tokens().min(first + HEAD_ROWS);
            let pieces = (0..flow.tokens()).step_by(HEAD_ROWS).map(rows);
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
        let loss = self.head(model, flow, &batch.targets, asked, into)?;
        tell(Bucket::Head, into);
        for layer in (0..model.spec.layers()).rev() {
            self.block(model, layer, flow, into)?;
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
            let at = usize::from(layer);
            flow.keep(&mut self.kept[at]);
            let memories = &mut self.memories;
            memories.iter_mut().for_each(|m| m.truncate(0));
            let shape = |b: &BlockSpec| (b.kv_heads, b.head_dim);
            if at > 0 && shape(&model.spec.blocks[at]) != shape(&model.spec.blocks[at - 1]) {
                memories.clear();
            }
            memories.truncate(batch.sequences.len());
            memories.extend(model.memory(layer, flow).into_iter().skip(memories.len()));
            model.block(layer, flow, memories, &mut ())?;
            flow.keep(&mut self.kept[at]);
        }
        Ok(())
    }

    /// The loss of some rows; their logits become its gradient, times `factor`.
    fn logits(
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
    fn head(
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
        self.dx.values_mut().reset(flow.tokens(), model.spec.dim);
        for first in (0..flow.tokens()).step_by(HEAD_ROWS) {
            let rows = first..flow.tokens().min(first + HEAD_ROWS);
            loss += self.logits(model, flow, rows.clone(), targets, &mut asked)?;
            self.columns.pack(self.head.values(), self.form);
            self.weight(site, Out::Logits, into)?;
            let linear = across(&self.across, site)?;
            ops::products(&mut self.logits, [Target { linear, out: &mut self.sum }]);
            self.some.reset(rows.len(), model.spec.dim);
            self.part.reset(rows.len(), model.spec.dim);
            ops::clear(self.part.as_mut_slice());
            for (i, row) in rows.clone().enumerate() {
                self.some.row_mut(i).copy_from_slice(flow.residual().row(row));
            }
            let normed = Normed { kind: model.spec.norm, x: &self.some, weight: &norm.scale, eps: model.spec.norm_eps };
            let (scale, shift) = into.norm(Site::FINAL_NORM)?;
            ops::norm_gradient(normed, &self.sum, &mut self.part, scale, shift, &mut self.scratch);
            for (i, row) in rows.enumerate() {
                self.dx.values_mut().row_mut(row).copy_from_slice(self.part.row(i));
            }
        }
        Ok(loss)
    }

    /// Walks back through a block.
    fn block(&mut self, model: &Model, layer: u16, flow: &Flow, into: &mut Parameters) -> Result<()> {
        let (spec, site) = (&model.spec, |role| Site::of(layer, role));
        let mut kept = std::mem::take(&mut self.kept[usize::from(layer)]);
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
        self.attention(model, layer, from, flow, &kept, into)?;
        self.norm(model, site(Role::AttnNorm), &kept.entry, into)?;
        self.kept[usize::from(layer)] = kept;
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
        let (scale, shift) = into.norm(post)?;
        ops::norm_gradient(normed, dx, out, scale, shift, &mut self.scratch);
        Ok(Out::Of(0))
    }

    /// Adds what a norm's input gets through the norm, whose output's gradient is `self.sum`, to that of the residual.
    fn norm(&mut self, model: &Model, site: Site, x: &Tensor, into: &mut Parameters) -> Result<()> {
        let weight = &model.norm(site)?.scale;
        let normed = Normed { kind: model.spec.norm, x, weight, eps: model.spec.norm_eps };
        let (scale, shift) = into.norm(site)?;
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
            ops::gate_to(spec.activation, &kept.gate, &kept.up, &mut self.normed);
        } else {
            self.normed.copy_from(&kept.up);
            spec.activation.apply(&mut self.normed);
        }
        self.columns.pack(&self.normed, self.form);
        self.back(site(Role::Down), from, into)?;
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
        self.inputs(layer, roles, into)
    }

    /// From the gradient of what attention returned (`from`) to that of its input (`sum`).
    fn attention(
        &mut self,
        model: &Model,
        layer: u16,
        from: Out,
        flow: &Flow,
        kept: &Kept,
        into: &mut Parameters,
    ) -> Result<()> {
        let (spec, site) = (&model.spec, |role| Site::of(layer, role));
        let b = &spec.blocks[usize::from(layer)];
        self.columns.pack(&kept.attended, self.form);
        self.back(site(Role::O), from, into)?;
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
        ops::attention_gradient(attended, &self.part, self.form, [dq.values_mut(), dk.values_mut(), dv.values_mut()]);
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
                let (scale, _) = into.norm(site(role))?;
                ops::norm_gradient(normed, dy, &mut self.part, scale, None, &mut self.scratch);
                std::mem::swap(dy, &mut self.part);
            }
        }
        self.again(model, site(Role::AttnNorm), &kept.entry)?;
        self.inputs(layer, &[Role::Q, Role::K, Role::V], into)
    }

    /// Makes a norm's output again: the input of the products that follow, as columns.
    fn again(&mut self, model: &Model, site: Site, x: &Tensor) -> Result<()> {
        let (norm, spec) = (model.norm(site)?, &model.spec);
        ops::norm(spec.norm, x, &norm.scale, norm.shift.as_deref(), spec.norm_eps, &mut self.normed);
        self.columns.pack(&self.normed, self.form);
        Ok(())
    }

    /// Parameters of products that read one input (`columns`), those of their outputs being `outs`: of their weights, and
    /// of the input (`sum`).
    fn inputs(&mut self, layer: u16, roles: &[Role], into: &mut Parameters) -> Result<()> {
        for (i, role) in roles.iter().enumerate() {
            let site = Site::of(layer, *role);
            self.weight(site, Out::Of(i), into)?;
            let linear = across(&self.across, site)?;
            if i == 0 {
                ops::products(&mut self.outs[i], [Target { linear, out: &mut self.sum }]);
            } else {
                ops::add_product(&mut self.outs[i], linear, &mut self.sum);
            }
        }
        Ok(())
    }

    /// The gradients of a product's weight and bias, and that of its input (`part`) from that of its output.
    fn back(&mut self, site: Site, from: Out, into: &mut Parameters) -> Result<()> {
        self.weight(site, from, into)?;
        let linear = across(&self.across, site)?;
        let from = match from {
            Out::Of(i) => &mut self.outs[i],
            Out::Logits => &mut self.logits,
            Out::Residual => &mut self.dx,
            Out::Beside => &mut self.beside,
        };
        ops::products(from, [Target { linear, out: &mut self.part }]);
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
        let kernels = tensor::kernels::kernels();
        self.rows.pack_columns(dy, InputKind::of(self.form, kernels), kernels);
        ops::weight_gradient(&self.columns, &self.rows, into.matrix(site)?);
        if let Some(bias) = into.biases.get_mut(&site) {
            ops::column_sums(dy, bias, &mut self.scratch);
        }
        Ok(())
    }

    /// Adds the gradient of the residual stream to the rows of the embedding, and to those of learned positions.
    fn embedding(&mut self, model: &Model, batch: &Tokens, into: &mut Parameters) -> Result<()> {
        if model.spec.learned_positions.is_some() {
            let table = into.matrix(Site::POSITION)?;
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
        let table = into.matrix(Site::EMBED)?;
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

fn across(all: &BTreeMap<Site, Linear>, site: Site) -> Result<&Linear> {
    all.get(&site).ok_or_else(|| Error::Site { site, reason: "was never given its values".into() })
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(t, f)| *t += f);
}
