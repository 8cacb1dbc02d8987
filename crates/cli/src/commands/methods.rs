//! `planish methods`.

use super::print_json;
use crate::args::Common;
use anyhow::Result;
use optimize::METHODS;
use serde_json::{Value, json};

/// Lists the methods.
pub fn run(common: &Common) -> Result<u8> {
    if common.json {
        let list: Vec<Value> = METHODS
            .iter()
            .map(|m| json!({"name": m.name, "about": m.about, "paper": m.paper, "cost": m.cost}))
            .collect();
        print_json(&list)?;
        return Ok(0);
    }
    for m in METHODS {
        sayln!("{}\n  {}\n  {}; {}", m.name, m.about, m.paper, m.cost);
    }
    Ok(0)
}
