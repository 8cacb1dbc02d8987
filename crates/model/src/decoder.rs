//! The decoder: the one forward pass of the project. Calibration, evaluation, chat and explanation all run it.
//!
//! A block runs in four stages, each a set of products that read the same input; the walker rewrites the
//! weights of a stage between seeing its input and running it.

use crate::{Error, Model, Point, Result, Role, Site, Spec, Tap};
use tensor::{
    Tensor,
    ops::{self, AttentionShape, Memory, Rotation, Segment},
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

/// Keys and values of one sequence in every block.
#[derive(Clone, Debug)]
pub struct Cache {
    blocks: Vec<Memory>,
    /// The tokens held.
    tokens: Vec<u32>,
    /// The length of the sequence when its keys were last turned.
    turned_for: usize,
}

impl Cache {
    /// An empty cache for `model`.
    pub fn new(model: &Model) -> Cache {
        let blocks = model.spec.blocks.iter().map(|b| Memory::new(b.kv_heads, b.head_dim)).collect();
        Cache { blocks, tokens: Vec::new(), turned_for: 0 }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Does it hold nothing?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets every position from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.blocks.iter_mut().for_each(|m| m.truncate(len));
        self.tokens.truncate(len);
    }

    /// Takes in `new` tokens; returns what has to run, which is all of them where longer sequences turn their keys
    /// otherwise (dynamic scaling, LongRoPE).
    fn feed(&mut self, spec: &Spec, new: &[u32]) -> Vec<u32> {
        let length = self.len() + new.len();
        let anew = !self.is_empty() && spec.ropes.iter().any(|r| r.changes(self.turned_for, length));
        let run = if anew { [&self.tokens[..], new].concat() } else { new.to_vec() };
        if anew {
            self.truncate(0);
        }
        self.turned_for = length;
        run
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        self.blocks.iter().map(Memory::size_bytes).sum()
    }
}

/// A batch of sequences on its way through the blocks.
#[derive(Clone)]
pub struct Flow {
    /// The residual stream `[tokens, dim]`.
    x: Tensor,
    /// The input of the stage that comes next.
    input: Tensor,
    /// What attention added, kept back where the block is parallel.
    held: Option<Tensor>,
    rows: Vec<usize>,
    rotations: Vec<Rotation>,
}

impl Flow {
    /// The input of the products of the next stage, `[tokens, inputs]`.
    pub fn input(&self) -> &Tensor {
        &self.input
    }

    /// The residual stream, `[tokens, dim]`.
    pub fn residual(&self) -> &Tensor {
        &self.x
    }

    /// Tokens of the batch.
    pub fn tokens(&self) -> usize {
        self.x.rows()
    }
}

impl Model {
    /// Embeds sequences that continue `past` earlier positions each.
    ///
    /// # Errors
    /// If a token is not in the vocabulary or a sequence is longer than a table of learned positions.
    pub fn start(&self, sequences: &[&[u32]], past: &[usize]) -> Result<Flow> {
        let spec = &self.spec;
        let embed = &self.linear(Site::EMBED)?.weight;
        let total = sequences.iter().map(|s| s.len()).sum();
        let mut x = Tensor::zeros(total, spec.dim);
        let mut positions = Vec::with_capacity(total);
        let mut lengths = Vec::with_capacity(total);
        for (sequence, past) in sequences.iter().zip(past) {
            for (i, &token) in sequence.iter().enumerate() {
                if token as usize >= spec.vocab {
                    return Err(Error::Asked(format!("token {token} is not in the vocabulary of {}", spec.vocab)));
                }
                embed.decode_row(token as usize, x.row_mut(positions.len()));
                positions.push(past + i);
                lengths.push(past + sequence.len());
            }
        }
        if let Some(scale) = spec.embed_scale {
            ops::scale(&mut x, scale);
        }
        if let Some(rows) = spec.learned_positions {
            let table = &self.linear(Site::POSITION)?.weight;
            let mut row = vec![0.0; spec.dim];
            for (t, &position) in positions.iter().enumerate() {
                if position >= rows {
                    return Err(Error::Asked(format!("position {position} is beyond the model's context of {rows}")));
                }
                table.decode_row(position, &mut row);
                x.row_mut(t).iter_mut().zip(&row).for_each(|(x, p)| *x += p);
            }
        }
        let rotations = spec.ropes.iter().map(|r| r.rotation(&positions, &lengths)).collect();
        let rows = sequences.iter().map(|s| s.len()).collect();
        Ok(Flow { x, input: Tensor::default(), held: None, rows, rotations })
    }

    /// Prepares the input of a block's first stage.
    pub fn enter(&self, layer: u16, flow: &mut Flow) -> Result<()> {
        flow.input = self.normed(Site::of(layer, Role::AttnNorm), &flow.x)?;
        Ok(())
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
                let y = self.product(layer, Role::O, flow, tap)?;
                let y = self.post_norm(layer, Role::PostAttnNorm, y)?;
                if self.spec.parallel {
                    flow.input = self.normed(Site::of(layer, Role::MlpNorm), &flow.x)?;
                    flow.held = Some(y);
                } else {
                    ops::add_to(&mut flow.x, &y);
                    flow.input = self.normed(Site::of(layer, Role::MlpNorm), &flow.x)?;
                }
                Ok(())
            }
            Stage::GateUp => {
                let mut up = self.product(layer, Role::Up, flow, tap)?;
                if self.spec.gated {
                    let mut gate = self.product(layer, Role::Gate, flow, tap)?;
                    ops::gate(self.spec.activation, &mut gate, &up);
                    up = gate;
                } else {
                    self.spec.activation.apply(&mut up);
                }
                flow.input = up;
                Ok(())
            }
            Stage::Down => {
                let y = self.product(layer, Role::Down, flow, tap)?;
                let y = self.post_norm(layer, Role::PostMlpNorm, y)?;
                if let Some(held) = flow.held.take() {
                    ops::add_to(&mut flow.x, &held);
                }
                ops::add_to(&mut flow.x, &y);
                tap.at(Point::Residual(layer), &flow.x);
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
        flow.rows.iter().map(|_| Memory::new(b.kv_heads, b.head_dim)).collect()
    }

    /// Norm before the head of the residual rows that are listed, `[rows, dim]`.
    pub fn final_rows(&self, flow: &Flow, rows: &[usize]) -> Result<Tensor> {
        self.normed(Site::FINAL_NORM, &flow.x.select_rows(rows))
    }

    /// Logits `[rows, vocab]` of what [`Model::final_rows`] returns.
    pub fn head(&self, normed: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        tap.at(Point::Input(Site::HEAD), normed);
        let mut logits = match self.linears.get(&Site::HEAD) {
            Some(head) => head.apply(normed),
            None => ops::matmul(normed, &self.linear(Site::HEAD)?.weight),
        };
        if let Some(cap) = self.spec.logit_cap {
            ops::soft_cap(&mut logits, cap);
        }
        Ok(logits)
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

    /// Feeds each sequence's next tokens to its cache; logits after the last token of each, `[sequences, vocab]`.
    pub fn decode(&self, sequences: &[&[u32]], caches: &mut [Cache]) -> Result<Tensor> {
        let fed: Vec<Vec<u32>> = sequences.iter().zip(caches.iter_mut()).map(|(s, c)| c.feed(&self.spec, s)).collect();
        let sequences: Vec<&[u32]> = fed.iter().map(Vec::as_slice).collect();
        let past: Vec<usize> = caches.iter().map(Cache::len).collect();
        let mut flow = self.start(&sequences, &past)?;
        for layer in 0..self.spec.layers() {
            let take = |c: &mut Cache| std::mem::replace(&mut c.blocks[usize::from(layer)], Memory::new(0, 0));
            let mut memory: Vec<Memory> = caches.iter_mut().map(take).collect();
            let run = self.block(layer, &mut flow, &mut memory, &mut ());
            for (cache, memory) in caches.iter_mut().zip(memory) {
                cache.blocks[usize::from(layer)] = memory;
            }
            run?;
        }
        caches.iter_mut().zip(&fed).for_each(|(cache, run)| cache.tokens.extend(run));
        let mut end = 0;
        let last: Vec<usize> = flow
            .rows
            .iter()
            .map(|n| {
                end += n;
                end - 1
            })
            .collect();
        self.head(&self.final_rows(&flow, &last)?, &mut ())
    }

    fn attend(&self, layer: u16, flow: &mut Flow, memory: &mut [Memory], tap: &mut dyn Tap) -> Result<()> {
        let b = &self.spec.blocks[usize::from(layer)];
        let mut q = self.product(layer, Role::Q, flow, tap)?;
        let mut k = self.product(layer, Role::K, flow, tap)?;
        let v = self.product(layer, Role::V, flow, tap)?;
        if self.spec.qk_norm {
            for (role, x) in [(Role::QNorm, &mut q), (Role::KNorm, &mut k)] {
                ops::norm_heads(self.spec.norm, x, &self.norm(Site::of(layer, role))?.scale, self.spec.norm_eps);
            }
        }
        if let Some(rotation) = b.rope.and_then(|r| flow.rotations.get(r)) {
            ops::rope(&mut q, b.head_dim, rotation);
            ops::rope(&mut k, b.head_dim, rotation);
        }
        let mut row = 0;
        for (memory, rows) in memory.iter_mut().zip(&flow.rows) {
            memory.append(&k, &v, row, row + rows);
            row += rows;
        }
        let mut row = 0;
        let mut segments = Vec::with_capacity(memory.len());
        for (memory, rows) in memory.iter().zip(&flow.rows) {
            segments.push(Segment { row, rows: *rows, memory });
            row += rows;
        }
        let shape = AttentionShape {
            heads: b.heads,
            kv_heads: b.kv_heads,
            head_dim: b.head_dim,
            scale: b.score_scale,
            window: b.window,
            soft_cap: b.score_cap,
        };
        flow.input = ops::attention(&q, &segments, &shape);
        Ok(())
    }

    fn product(&self, layer: u16, role: Role, flow: &Flow, tap: &mut dyn Tap) -> Result<Tensor> {
        let site = Site::of(layer, role);
        tap.at(Point::Input(site), &flow.input);
        let y = self.linear(site)?.apply(&flow.input);
        tap.at(Point::Output(site), &y);
        Ok(y)
    }

    fn normed(&self, site: Site, x: &Tensor) -> Result<Tensor> {
        let norm = self.norm(site)?;
        Ok(ops::norm(self.spec.norm, x, &norm.scale, norm.shift.as_deref(), self.spec.norm_eps))
    }

    fn post_norm(&self, layer: u16, role: Role, y: Tensor) -> Result<Tensor> {
        if self.spec.post_norms { self.normed(Site::of(layer, role), &y) } else { Ok(y) }
    }
}
