//! House rules and generators.
fn main() {}
