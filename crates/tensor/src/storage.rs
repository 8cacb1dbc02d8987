//! The closed list of ways in which a matrix is stored: three float types, the grids, and either with holes.

use crate::{
    Sparse,
    grid::{Grid, GridError},
};
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
    /// Only some values of a row.
    Sparse(Sparse),
}

impl Storage {
    /// The name by which recipes, reports and the command line call it.
    pub fn name(self) -> String {
        match self {
            Storage::F32 => "f32".into(),
            Storage::F16 => "f16".into(),
            Storage::Bf16 => "bf16".into(),
            Storage::Grid(grid) => grid.name(),
            Storage::Sparse(sparse) => sparse.to_string(),
        }
    }

    /// Its name with the levels of a palette: what a file says.
    pub fn full_name(self) -> String {
        match self {
            Storage::Grid(grid) => grid.full_name(),
            Storage::Sparse(sparse) => format!("{}@{}", sparse.values().full_name(), sparse.pattern()),
            float => float.name(),
        }
    }

    /// The storage of that name.
    ///
    /// # Errors
    /// If nothing has that name; the message lists what there is.
    pub fn parse(name: &str) -> Result<Storage, GridError> {
        if let Some((values, pattern)) = name.split_once('@') {
            let values = Storage::parse(values)?;
            let sparse = pattern.parse().ok().and_then(|pattern| Sparse::new(values, pattern));
            return sparse.map(Storage::Sparse).ok_or_else(|| GridError(name.into()));
        }
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
            Storage::Sparse(sparse) => sparse.row_bytes(cols),
        }
    }

    /// Can a row of `cols` values be stored so?
    pub fn fits(self, cols: usize) -> bool {
        match self {
            Storage::Grid(grid) => grid.fits(cols),
            Storage::Sparse(sparse) => sparse.fits(cols),
            _ => true,
        }
    }

    /// Values of which a row must be a multiple; 0 where a row is a block whatever its length.
    pub fn block_len(self) -> usize {
        match self {
            Storage::Grid(grid) => grid.block_len(),
            Storage::Sparse(sparse) => sparse.pattern().unit(),
            _ => 1,
        }
    }

    /// The same of other values: in the same pattern, where those can have holes.
    #[must_use]
    pub fn with_values(self, values: Storage) -> Storage {
        match self {
            Storage::Sparse(sparse) => Sparse::new(values, sparse.pattern()).map_or(values, Storage::Sparse),
            _ => values,
        }
    }

    /// Are values codes, rather than floats?
    pub fn is_coded(self) -> bool {
        matches!(self.dense(), Storage::Grid(_))
    }

    /// How values are stored: the storage itself, or that of what is kept.
    pub fn dense(self) -> Storage {
        if let Storage::Sparse(sparse) = self { sparse.values() } else { self }
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}
