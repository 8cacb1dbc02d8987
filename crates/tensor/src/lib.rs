//! Numbers: storage, grids, kernels per instruction set, operations; knows no model.
