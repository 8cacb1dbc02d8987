//! The closed list of ways in which a matrix is stored: three float types and the grids.

use crate::grid::{Grid, GridError};
use std::fmt;

/// How the values of a matrix are stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Storage {
    /// 32-bit IEEE floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// 16-bit brain floats.
    Bf16,
    /// Codes on a grid.
    Grid(Grid),
}

impl Storage {
    /// The name by which recipes, reports and the command line call it.
    pub fn name(self) -> String {
        match self {
            Storage::F32 => "f32".into(),
            Storage::F16 => "f16".into(),
            Storage::Bf16 => "bf16".into(),
            Storage::Grid(grid) => grid.name(),
        }
    }

    /// The storage of that name.
    ///
    /// # Errors
    /// If nothing has that name; the message lists what there is.
    pub fn parse(name: &str) -> Result<Storage, GridError> {
        match name.to_ascii_lowercase().as_str() {
            "f32" => Ok(Storage::F32),
            "f16" => Ok(Storage::F16),
            "bf16" => Ok(Storage::Bf16),
            other => Grid::parse(other).map(Storage::Grid),
        }
    }

    /// Bytes of a row of `cols` values.
    pub fn row_bytes(self, cols: usize) -> usize {
        match self {
            Storage::F32 => 4 * cols,
            Storage::F16 | Storage::Bf16 => 2 * cols,
            Storage::Grid(grid) => grid.row_bytes(cols),
        }
    }

    /// Can a row of `cols` values be stored so?
    pub fn fits(self, cols: usize) -> bool {
        match self {
            Storage::Grid(grid) => grid.fits(cols),
            _ => true,
        }
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}
