//! GGUF metadata keys and the `config.json` fields they stand for: one table, read both ways.

/// What kind of value a key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 32-bit whole number.
    Count,
    /// 32-bit float.
    Number,
    /// True or false.
    Flag,
}

/// A metadata key (without the architecture's prefix) and the field it stands for.
#[derive(Clone, Copy, Debug)]
pub struct GgufKey {
    /// For example `block_count`.
    pub key: &'static str,
    /// For example `num_hidden_layers`.
    pub field: &'static str,
    /// What kind of value.
    pub kind: Kind,
    /// Must a file have it?
    pub required: bool,
}

/// A whole number that a file must have.
pub const fn count(key: &'static str, field: &'static str) -> GgufKey {
    GgufKey { key, field, kind: Kind::Count, required: true }
}

/// A number that a file must have.
pub const fn number(key: &'static str, field: &'static str) -> GgufKey {
    GgufKey { key, field, kind: Kind::Number, required: true }
}

/// A switch that a file must have.
pub const fn flag(key: &'static str, field: &'static str) -> GgufKey {
    GgufKey { key, field, kind: Kind::Flag, required: true }
}

impl GgufKey {
    /// The same key where a file may do without.
    pub const fn optional(self) -> GgufKey {
        GgufKey { required: false, ..self }
    }
}
