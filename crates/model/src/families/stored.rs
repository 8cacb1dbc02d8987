//! How a stored tensor holds the parameters of one or more sites.

use crate::Role;

/// Which parameter of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The matrix, or the scale of a norm.
    Weight,
    /// The bias, or the shift of a norm.
    Bias,
}

/// How the values lie in the stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[outputs, inputs]`, several sites one after the other along the outputs.
    Rows,
    /// `[inputs, outputs]`, several sites side by side (GPT-2's `Conv1D`).
    Columns,
    /// Query, key and value interleaved head by head along the outputs (GPT-NeoX).
    HeadByHead,
    /// A norm scale stored as `w - 1` (Gemma).
    MinusOne,
    /// Rows of each head permuted so that adjacent channels rotate together (Llama's queries and keys in GGUF).
    Adjacent,
}

/// One stored tensor: `{}` in its name is the number of the block.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    /// What it holds, in order.
    pub sites: &'static [(Role, Part)],
    /// Its name.
    pub name: &'static str,
    /// How the values lie.
    pub layout: Layout,
}

impl Stored {
    /// The weight of one site, as rows.
    pub const fn weight(role: &'static [(Role, Part)], name: &'static str) -> Stored {
        Stored { sites: role, name, layout: Layout::Rows }
    }

    /// The same tensor with another layout.
    pub const fn with(self, layout: Layout) -> Stored {
        Stored { layout, ..self }
    }

    /// Its name in block `layer`.
    pub fn name_in(&self, layer: Option<u16>) -> String {
        layer.map_or_else(|| self.name.to_string(), |l| self.name.replacen("{}", &l.to_string(), 1))
    }

    /// Does it stand once, outside the blocks?
    pub fn is_edge(&self) -> bool {
        !self.name.contains("{}")
    }
}

/// Shorthand for tables: `w!(Q, "name")`, `b!(Q, "name")`, several roles as `w!(Q K V, "name")`.
macro_rules! w {
    ($($role:ident)+, $name:literal) => {
        $crate::families::Stored::weight(&[$(($crate::Role::$role, $crate::families::Part::Weight)),+], $name)
    };
}
macro_rules! b {
    ($($role:ident)+, $name:literal) => {
        $crate::families::Stored::weight(&[$(($crate::Role::$role, $crate::families::Part::Bias)),+], $name)
    };
}
pub(crate) use {b, w};
