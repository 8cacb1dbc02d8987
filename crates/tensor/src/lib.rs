//! Numbers: storage, grids, kernels per instruction set, operations, safe file maps.
//!
//! This is the only crate with `unsafe`. It knows no model and no file format.

mod bytes;
pub mod entropy;
pub mod grid;
pub mod kernels;
pub mod limits;
mod linear;
mod lines;
mod low_rank;
pub mod ops;
pub mod packed;
mod sparse;
mod storage;
mod stored;
mod tensor;
pub mod threads;
mod weight;

pub use bytes::{Bytes, Pages};
pub use linear::{Eight, Linear, Rounding};
pub use low_rank::{LowRank, Misfit};
pub use sparse::{Pattern, Sparse};
pub use storage::Storage;
pub use stored::Stored;
pub use tensor::Tensor;
pub use weight::{Weight, WeightError};
