//! `Profile`: where the time of a forward pass goes, operation by operation.

use std::time::{Duration, Instant};

/// What is timed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Embedding and the angles of the positions.
    Embed,
    /// Normalisation, with what it adds to the residual stream.
    Norm,
    /// Query, key and value.
    Qkv,
    /// Rotary embedding, and writing keys and values.
    Rope,
    /// Scores, softmax and mixture.
    Attention,
    /// Output of attention.
    O,
    /// Gate and up with the nonlinearity.
    GateUp,
    /// Down.
    Down,
    /// Logits.
    Head,
}

impl Operation {
    /// All, in the order of execution.
    pub const ALL: [Operation; 9] = [
        Operation::Embed,
        Operation::Norm,
        Operation::Qkv,
        Operation::Rope,
        Operation::Attention,
        Operation::O,
        Operation::GateUp,
        Operation::Down,
        Operation::Head,
    ];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Embed => "embed",
            Operation::Norm => "norm and residual",
            Operation::Qkv => "q, k, v",
            Operation::Rope => "rope and cache",
            Operation::Attention => "attention",
            Operation::O => "o",
            Operation::GateUp => "gate, up",
            Operation::Down => "down",
            Operation::Head => "head",
        }
    }
}

/// Time by operation.
#[derive(Clone, Debug)]
pub struct Profile {
    last: Instant,
    spent: [Duration; Operation::ALL.len()],
}

impl Default for Profile {
    fn default() -> Self {
        Profile { last: Instant::now(), spent: Default::default() }
    }
}

impl Profile {
    /// Starts the clock without counting what passed.
    pub fn begin(&mut self) {
        self.last = Instant::now();
    }

    /// Counts the time since the last call as an operation's.
    pub fn lap(&mut self, operation: Operation) {
        let now = Instant::now();
        self.spent[operation as usize] += now - self.last;
        self.last = now;
    }

    /// Time of an operation.
    pub fn spent(&self, operation: Operation) -> Duration {
        self.spent[operation as usize]
    }
}
