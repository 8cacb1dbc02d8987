//! The decoder: the one forward pass of the project. Calibration, evaluation, chat and explanation all run it.
//!
//! A block runs in four stages, each a set of products that read the same input; the walker rewrites the
//! weights of a stage between seeing its input and running it.

use crate::{Error, Heads, Model, Operation, Point, Profile, Result, Role, Site, Tap};
use tensor::{
    Linear, Tensor,
    ops::{self, Memory, Operand, Rotation, Target},
};

/// The stages of a block, in the order of execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Query, key and value; then attention.
    Qkv,
    /// Output of attention; then the residual and the second norm.
    O,
    /// Gate and up; then the nonlinearity.
    GateUp,
    /// Down; then the residual.
    Down,
}

impl Stage {
    /// All, in the order of execution.
    pub const ALL: [Stage; 4] = [Stage::Qkv, Stage::O, Stage::GateUp, Stage::Down];

    /// The norm that makes this stage's input, where one does.
    pub fn norm(self) -> Option<Role> {
        match self {
            Stage::Qkv => Some(Role::AttnNorm),
            Stage::GateUp => Some(Role::MlpNorm),
            Stage::O | Stage::Down => None,
        }
    }

    /// The roles whose products read this stage's input.
    pub fn roles(self) -> &'static [Role] {
        match self {
            Stage::Qkv => &[Role::Q, Role::K, Role::V],
            Stage::O => &[Role::O],
            Stage::GateUp => &[Role::Gate, Role::Up],
            Stage::Down => &[Role::Down],
        }
    }
}

/// A batch of sequences on its way through the blocks.
#[derive(Clone, Default)]
pub struct Flow {
    /// The residual stream `[tokens, dim]`.
    x: Tensor,
    /// The input of the stage that comes next.
    input: Operand,
    /// Did a parallel block keep back what attention added?
    held: bool,
    rows: Vec<usize>,
    positions: Vec<usize>,
    lengths: Vec<usize>,
    rotations: Vec<Rotation>,
    scratch: Scratch,
    profile: Option<Profile>,
}

/// What a stage writes and the next one does not need; a copy of a flow starts without.
#[derive(Default)]
struct Scratch {
    y: Tensor,
    normed: Tensor,
    held: Tensor,
    /// What adapters make of an input.
    low: Operand,
    /// Is what a block's gradient needs to be kept?
    keep: bool,
    kept: Kept,
}

/// What a block leaves behind; a block that learns ([`Flow::keep`]) leaves all of it, any other what it needs itself.
#[derive(Default)]
pub struct Kept {
    /// The residual stream before the block.
    pub(crate) entry: Tensor,
    /// Queries and keys before their norms, where they have any.
    pub(crate) raw: [Tensor; 2],
    /// Queries, keys and values as attention reads them.
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    /// What attention returned, and the logarithms of its sums.
    pub(crate) attended: Tensor,
    pub(crate) log_sums: Tensor,
    /// What the products [`Role::O`] and [`Role::Down`] returned, where norms follow them.
    pub(crate) returned: [Tensor; 2],
    /// The residual stream between attention and the feed-forward network.
    pub(crate) middle: Tensor,
    /// Gate and up before the nonlinearity.
    pub(crate) gate: Tensor,
    pub(crate) up: Tensor,
}

impl Clone for Scratch {
    fn clone(&self) -> Self {
        Scratch { held: self.held.clone(), ..Scratch::default() }
    }
}

impl Flow {
    /// The input of the products of the next stage, `[tokens, inputs]`.
    pub fn input(&self) -> &Tensor {
        self.input.values()
    }

    /// The residual stream, `[tokens, dim]`.
    pub fn residual(&self) -> &Tensor {
        &self.x
    }

    /// Gives back the memory of everything but what the next stage needs: many flows then wait at the cost of their inputs.
    pub fn rest(&mut self) {
        let held = std::mem::take(&mut self.scratch.held);
        self.scratch = Scratch { held, ..Scratch::default() };
        self.input = Operand::new(std::mem::take(self.input.values_mut()));
    }

    /// Forgets what it held for sequences of so many tokens that continue so many earlier positions.
    fn lay_out(&mut self, sequences: impl Iterator<Item = (usize, usize)>) {
        self.held = false;
        self.rows.clear();
        self.positions.clear();
        self.lengths.clear();
        for (rows, past) in sequences {
            self.rows.push(rows);
            self.positions.extend(past..past + rows);
            self.lengths.extend(std::iter::repeat_n(past + rows, rows));
        }
    }

    /// Stands before a block again whose input was kept.
    pub fn stand_at(&mut self, residual: &Tensor) {
        self.x.copy_from(residual);
    }

    /// Tokens of the batch.
    pub fn tokens(&self) -> usize {
        self.x.rows()
    }

    /// Times every operation from here on; returns what was timed before.
    pub fn profile(&mut self) -> Option<Profile> {
        self.profile.replace(Profile::default())
    }

    /// Keeps what the gradient of every block needs; takes what the last block left and gives memory for the next.
    pub fn keep(&mut self, kept: &mut Kept) {
        self.scratch.keep = true;
        std::mem::swap(&mut self.scratch.kept, kept);
    }

    /// What attention read in the block that ran last.
    pub fn heads(&self) -> Heads<'_> {
        let Kept { q, k, v, .. } = &self.scratch.kept;
        Heads { values: [q, k, v], rows: &self.rows }
    }

    /// Tokens of each sequence.
    pub fn rows(&self) -> &[usize] {
        &self.rows
    }

    pub(crate) fn rotation(&self, rope: Option<usize>) -> Option<&Rotation> {
        self.rotations.get(rope?)
    }

    pub(crate) fn lap(&mut self, operation: Operation) {
        if let Some(profile) = &mut self.profile {
            profile.lap(operation);
        }
    }
}

impl Model {
    /// Embeds sequences that continue `past` earlier positions each.
    ///
    /// # Errors
    /// If a token is not in the vocabulary or a sequence is longer than a table of learned positions.
    pub fn start(&self, sequences: &[&[u32]], past: &[usize]) -> Result<Flow> {
        let mut flow = Flow::default();
        self.restart(&mut flow, sequences.iter().copied(), past)?;
        Ok(flow)
    }

    /// The same in the memory of a flow that is done.
    ///
    /// # Errors
    /// As [`Model::start`].
    pub fn restart<'a>(
        &self,
        flow: &mut Flow,
        sequences: impl Iterator<Item = &'a [u32]> + Clone,
        past: &[usize],
    ) -> Result<()> {
        let spec = &self.spec;
        if let Some(profile) = &mut flow.profile {
            profile.begin();
        }
        let embed = &self.linear(Site::EMBED)?.weight;
        flow.lay_out(sequences.clone().map(<[u32]>::len).zip(past.iter().copied()));
        flow.x.reset(flow.positions.len(), spec.dim);
        for (row, &token) in sequences.flatten().enumerate() {
            if token as usize >= spec.vocab {
                return Err(Error::Asked(format!("token {token} is not in the vocabulary of {}", spec.vocab)));
            }
            embed.decode_row(token as usize, flow.x.row_mut(row));
        }
        if let Some(scale) = spec.embed_scale {
            ops::scale(&mut flow.x, scale);
        }
        if let Some(rows) = spec.learned_positions {
            let table = &self.linear(Site::POSITION)?.weight;
            let row = &mut flow.scratch.y;
            row.reset(1, spec.dim);
            for (t, &position) in flow.positions.iter().enumerate() {
                if position >= rows {
                    return Err(Error::Asked(format!("position {position} is beyond the model's context of {rows}")));
                }
                table.decode_row(position, row.row_mut(0));
                flow.x.row_mut(t).iter_mut().zip(row.row(0)).for_each(|(x, p)| *x += p);
            }
        }
        self.turn(flow);
        flow.lap(Operation::Embed);
        Ok(())
    }

    /// A flow before a block, in the memory of one that is done: sequences of so many tokens each, each from position 0, and
    /// what the residual stream holds there, `[tokens, dim]`.
    pub(crate) fn restart_before_block(&self, flow: &mut Flow, rows: &[usize], residual: &Tensor) {
        flow.lay_out(rows.iter().map(|rows| (*rows, 0)));
        flow.x.copy_from(residual);
        self.turn(flow);
    }

    /// Makes the rotations of a flow's positions.
    fn turn(&self, flow: &mut Flow) {
        flow.rotations.resize_with(self.spec.ropes.len(), Rotation::default);
        for (rope, rotation) in self.spec.ropes.iter().zip(&mut flow.rotations) {
            rope.rotate(&flow.positions, &flow.lengths, rotation);
        }
    }

    /// Prepares the input of a block's first stage.
    pub fn enter(&self, layer: u16, flow: &mut Flow) -> Result<()> {
        if flow.scratch.keep {
            flow.scratch.kept.entry.copy_from(&flow.x);
        }
        self.normed(Site::of(layer, Role::AttnNorm), &flow.x, flow.input.values_mut())?;
        flow.lap(Operation::Norm);
        Ok(())
    }

    /// Makes the input of a stage anew, where a norm makes it: after that norm was changed.
    pub fn norm_again(&self, layer: u16, stage: Stage, flow: &mut Flow) -> Result<()> {
        match stage.norm() {
            Some(role) => self.normed(Site::of(layer, role), &flow.x, flow.input.values_mut()),
            None => Ok(()),
        }
    }

    /// Runs the products of a stage and what follows them, so that the flow stands before the next stage.
    ///
    /// `memory` holds keys and values of this block, one per sequence; the stage [`Stage::Qkv`] adds to it.
    pub fn advance(
        &self,
        layer: u16,
        stage: Stage,
        flow: &mut Flow,
        memory: &mut [Memory],
        tap: &mut dyn Tap,
    ) -> Result<()> {
        match stage {
            Stage::Qkv => self.attend(layer, flow, memory, tap),
            Stage::O => {
                self.join_residual(layer, [Role::O, Role::PostAttnNorm], flow, self.spec.parallel, tap)?;
                if flow.scratch.keep {
                    flow.scratch.kept.middle.copy_from(&flow.x);
                }
                self.normed(Site::of(layer, Role::MlpNorm), &flow.x, flow.input.values_mut())?;
                flow.lap(Operation::Norm);
                Ok(())
            }
            Stage::GateUp => self.feed_forward(layer, flow, tap),
            Stage::Down => {
                self.join_residual(layer, [Role::Down, Role::PostMlpNorm], flow, false, tap)?;
                tap.at(Point::Residual(layer), &flow.x);
                flow.lap(Operation::Norm);
                Ok(())
            }
        }
    }

    /// Runs one block.
    pub fn block(&self, layer: u16, flow: &mut Flow, memory: &mut [Memory], tap: &mut dyn Tap) -> Result<()> {
        self.enter(layer, flow)?;
        Stage::ALL.iter().try_for_each(|stage| self.advance(layer, *stage, flow, memory, tap))
    }

    /// Runs one block over whole sequences, whose keys and values are then forgotten.
    pub fn block_once(&self, layer: u16, flow: &mut Flow, tap: &mut dyn Tap) -> Result<()> {
        let mut memory = self.memory(layer, flow);
        self.block(layer, flow, &mut memory, tap)
    }

    /// An empty memory of a block for every sequence of a batch.
    pub fn memory(&self, layer: u16, flow: &Flow) -> Vec<Memory> {
        let b = &self.spec.blocks[usize::from(layer)];
        flow.rows.iter().map(|_| Memory::new(self.key_value, b.kv_heads, b.head_dim)).collect()
    }

    /// Norm before the head of the residual rows that are listed, `[rows, dim]`.
    pub fn final_rows(&self, flow: &Flow, rows: &[usize]) -> Result<Tensor> {
        let mut out = Tensor::default();
        self.final_into(flow, rows, &mut out)?;
        Ok(out)
    }

    /// The same into a tensor that is there.
    pub fn final_into(&self, flow: &Flow, rows: &[usize], out: &mut Tensor) -> Result<()> {
        let norm = self.norm(Site::FINAL_NORM)?;
        ops::norm_rows(self.spec.norm, &flow.x, rows, &norm.scale, norm.shift.as_deref(), self.spec.norm_eps, out);
        Ok(())
    }

    /// Logits `[rows, vocab]` of what [`Model::final_rows`] returns.
    pub fn head(&self, normed: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        let mut logits = Tensor::default();
        self.head_into(&mut Operand::new(normed.clone()), &mut logits, tap)?;
        Ok(logits)
    }

    /// The same into a tensor that is there.
    pub fn head_into(&self, normed: &mut Operand, logits: &mut Tensor, tap: &mut dyn Tap) -> Result<()> {
        tap.at(Point::Input(Site::HEAD), normed.values());
        let linear = self.linear(Site::HEAD)?;
        ops::products(normed, [Target { linear, out: logits }]);
        if let Some(cap) = self.spec.logit_cap {
            ops::soft_cap(logits, cap);
        }
        Ok(())
    }

    /// Logits of every position of every sequence, without a cache, `[tokens, vocab]`.
    pub fn forward(&self, sequences: &[&[u32]], tap: &mut dyn Tap) -> Result<Tensor> {
        let mut flow = self.start(sequences, &vec![0; sequences.len()])?;
        for layer in 0..self.spec.layers() {
            self.block_once(layer, &mut flow, tap)?;
        }
        let rows: Vec<usize> = (0..flow.tokens()).collect();
        self.head(&self.final_rows(&flow, &rows)?, tap)
    }

    fn attend(&self, layer: u16, flow: &mut Flow, memory: &mut [Memory], tap: &mut dyn Tap) -> Result<()> {
        let b = &self.spec.blocks[usize::from(layer)];
        let keep = flow.scratch.keep;
        let Scratch { low, kept: Kept { q, k, v, raw, log_sums, .. }, .. } = &mut flow.scratch;
        let roles = [Role::Q, Role::K, Role::V];
        roles.iter().for_each(|r| tap.at(Point::Input(Site::of(layer, *r)), flow.input.values()));
        ops::products(
            &mut flow.input,
            [
                Target { linear: self.linear(Site::of(layer, Role::Q))?, out: q },
                Target { linear: self.linear(Site::of(layer, Role::K))?, out: k },
                Target { linear: self.linear(Site::of(layer, Role::V))?, out: v },
            ],
        );
        for (role, y) in roles.into_iter().zip([&mut *q, k, v]) {
            self.adapt(Site::of(layer, role), &mut flow.input, y, low);
        }
        if let Some(profile) = &mut flow.profile {
            profile.lap(Operation::Qkv);
        }
        roles.iter().zip([&*q, k, v]).for_each(|(r, y)| tap.at(Point::Output(Site::of(layer, *r)), y));
        if self.spec.qk_norm {
            if keep {
                raw[0].copy_from(q);
                raw[1].copy_from(k);
            }
            for (role, x) in [(Role::QNorm, &mut *q), (Role::KNorm, k)] {
                ops::norm_heads(self.spec.norm, x, &self.norm(Site::of(layer, role))?.scale, self.spec.norm_eps);
            }
        }
        let rotation = b.rope.and_then(|r| flow.rotations.get(r));
        if let Some(rotation) = rotation {
            ops::rope(q, b.head_dim, rotation);
            ops::rope(k, b.head_dim, rotation);
        }
        let mut row = 0;
        for (memory, rows) in memory.iter_mut().zip(&flow.rows) {
            memory.append(k, v, rotation, row, row + rows);
            row += rows;
        }
        if let Some(profile) = &mut flow.profile {
            profile.lap(Operation::Rope);
        }
        ops::attention(q, &flow.rows, memory, &b.attention(), flow.input.values_mut(), keep.then_some(log_sums));
        flow.lap(Operation::Attention);
        Ok(())
    }

    /// Runs gate and up with the nonlinearity, or up alone: the input of the last stage.
    fn feed_forward(&self, layer: u16, flow: &mut Flow, tap: &mut dyn Tap) -> Result<()> {
        let (activation, up) = (self.spec.activation, self.linear(Site::of(layer, Role::Up))?);
        let Scratch { keep, low, kept: Kept { gate: first, up: second, .. }, .. } = &mut flow.scratch;
        let site = |role| Site::of(layer, role);
        let adapted = [Role::Gate, Role::Up].iter().any(|role| self.adapters.contains_key(&site(*role)));
        tap.at(Point::Input(site(Role::Up)), flow.input.values());
        if self.spec.gated {
            let gate = self.linear(site(Role::Gate))?;
            tap.at(Point::Input(site(Role::Gate)), flow.input.values());
            // Side by side only in one storage: others' inputs may be cut into other tiles of tokens.
            if !*keep && !adapted && is_packed(gate) && gate.weight.storage() == up.weight.storage() && is_packed(up) {
                // What is laid out for speed is not watched: both products stay in the caches.
                ops::gated(&mut flow.input, activation, gate, up, first);
                std::mem::swap(first, flow.input.values_mut());
            } else {
                let targets = [Target { linear: gate, out: first }, Target { linear: up, out: second }];
                ops::products(&mut flow.input, targets);
                self.adapt(site(Role::Gate), &mut flow.input, first, low);
                self.adapt(site(Role::Up), &mut flow.input, second, low);
                tap.at(Point::Output(site(Role::Gate)), first);
                tap.at(Point::Output(site(Role::Up)), second);
                ops::gate_to(activation, first, second, flow.input.values_mut());
            }
        } else {
            ops::products(&mut flow.input, [Target { linear: up, out: second }]);
            self.adapt(site(Role::Up), &mut flow.input, second, low);
            tap.at(Point::Output(site(Role::Up)), second);
            if *keep {
                flow.input.values_mut().copy_from(second);
            } else {
                std::mem::swap(second, flow.input.values_mut());
            }
            activation.apply(flow.input.values_mut());
        }
        flow.lap(Operation::GateUp);
        Ok(())
    }

    /// Runs the product of `role` and adds it, normed where `post` has a norm, to the residual stream; or holds it
    /// back until the block's other half is done.
    fn join_residual(
        &self,
        layer: u16,
        [role, post]: [Role; 2],
        flow: &mut Flow,
        hold: bool,
        tap: &mut dyn Tap,
    ) -> Result<()> {
        let site = Site::of(layer, role);
        let linear = self.linear(site)?;
        let Scratch { y, normed, held, low, keep, kept } = &mut flow.scratch;
        tap.at(Point::Input(site), flow.input.values());
        ops::products(&mut flow.input, [Target { linear, out: y }]);
        self.adapt(site, &mut flow.input, y, low);
        if let Some(profile) = &mut flow.profile {
            profile.lap(if role == Role::O { Operation::O } else { Operation::Down });
        }
        tap.at(Point::Output(site), y);
        if self.spec.post_norms {
            self.normed(Site::of(layer, post), y, normed)?;
            std::mem::swap(y, normed);
            if *keep {
                std::mem::swap(normed, &mut kept.returned[usize::from(role == Role::Down)]);
            }
        }
        if *keep && role == Role::O {
            std::mem::swap(flow.input.values_mut(), &mut kept.attended);
        }
        if hold {
            std::mem::swap(y, held);
            flow.held = true;
            return Ok(());
        }
        if std::mem::take(&mut flow.held) {
            ops::add_to(&mut flow.x, held);
        }
        ops::add_to(&mut flow.x, y);
        Ok(())
    }

    fn normed(&self, site: Site, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let norm = self.norm(site)?;
        ops::norm(self.spec.norm, x, &norm.scale, norm.shift.as_deref(), self.spec.norm_eps, out);
        Ok(())
    }
}

fn is_packed(linear: &Linear) -> bool {
    matches!(linear.weight, tensor::Weight::Packed(_))
}
