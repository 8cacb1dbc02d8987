//! The block types of ggml, with their sizes.

use std::fmt;
use tensor::{Storage, grid::Grid};

/// A ggml element or block type; those that planish does not compute are known by name and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GgmlType(pub u32);

/// Number, name, values and bytes of a block.
const TYPES: &[(u32, &str, usize, usize)] = &[
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
];

/// Numbers of types that ggml has dropped; no current program reads them.
const DROPPED: &[u32] = &[4, 5, 31, 32, 33, 36, 37, 38];

/// Types that planish computes.
const STORAGES: &[(u32, Storage)] = &[
    (0, Storage::F32),
    (1, Storage::F16),
    (30, Storage::Bf16),
    (2, Storage::Grid(Grid::Q4_0)),
    (3, Storage::Grid(Grid::Q4_1)),
    (6, Storage::Grid(Grid::Q5_0)),
    (7, Storage::Grid(Grid::Q5_1)),
    (8, Storage::Grid(Grid::Q8_0)),
    (10, Storage::Grid(Grid::Q2K)),
    (11, Storage::Grid(Grid::Q3K)),
    (12, Storage::Grid(Grid::Q4K)),
    (13, Storage::Grid(Grid::Q5K)),
    (14, Storage::Grid(Grid::Q6K)),
    (20, Storage::Grid(Grid::Iq4Nl)),
    (23, Storage::Grid(Grid::Iq4Xs)),
    (39, Storage::Grid(Grid::Mxfp4)),
    (16, Storage::Grid(Grid::Iq2Xxs)),
    (17, Storage::Grid(Grid::Iq2Xs)),
    (18, Storage::Grid(Grid::Iq3Xxs)),
    (19, Storage::Grid(Grid::Iq1S)),
    (21, Storage::Grid(Grid::Iq3S)),
    (22, Storage::Grid(Grid::Iq2S)),
    (29, Storage::Grid(Grid::Iq1M)),
    (34, Storage::Grid(Grid::Tq1)),
    (35, Storage::Grid(Grid::Tq2)),
    (40, Storage::Grid(Grid::Nvfp4)),
];

impl GgmlType {
    /// 32-bit floats.
    pub const F32: GgmlType = GgmlType(0);

    fn row(self) -> Option<&'static (u32, &'static str, usize, usize)> {
        TYPES.iter().find(|t| t.0 == self.0)
    }

    /// Had ggml a type of this number and dropped it?
    pub fn is_dropped(self) -> bool {
        DROPPED.contains(&self.0)
    }

    /// Bytes of a tensor, `shape` outermost first; `None` where a row does not divide into blocks, the type is
    /// unknown or the size overflows.
    pub fn bytes_of(self, shape: &[usize]) -> Option<u64> {
        let &(_, _, len, bytes) = self.row()?;
        if !shape.last()?.is_multiple_of(len) {
            return None;
        }
        // Within 63 bits, as ggml counts; a 0 must not hide that the others overflow, in whatever order.
        let whole = shape.iter().try_fold(1i64, |n, d| n.checked_mul(i64::try_from((*d).max(1)).ok()?))?;
        let elements = if shape.contains(&0) { 0 } else { whole.unsigned_abs() };
        (elements / len as u64).checked_mul(bytes as u64)
    }

    /// Is it a type that exists?
    pub fn is_known(self) -> bool {
        self.row().is_some()
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.row().map_or("unknown", |t| t.1)
    }

    /// Values in a block.
    pub fn block_len(self) -> usize {
        self.row().map_or(1, |t| t.2)
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.row().map_or(1, |t| t.3)
    }

    /// The storage that computes it, where planish has one.
    pub fn storage(self) -> Option<Storage> {
        STORAGES.iter().find(|(id, _)| *id == self.0).map(|(_, s)| *s)
    }

    /// The type that stores it; planish's own grids have none.
    pub fn of(storage: Storage) -> Option<GgmlType> {
        STORAGES.iter().find(|(_, s)| *s == storage).map(|(id, _)| GgmlType(*id))
    }

    /// `general.file_type` of a file whose matrices are mostly of this type.
    pub fn file_type(self) -> u32 {
        match self.name() {
            "F32" => 0,
            "F16" => 1,
            "Q4_0" => 2,
            "Q4_1" => 3,
            "Q8_0" => 7,
            "Q5_0" => 8,
            "Q5_1" => 9,
            "Q2_K" => 10,
            "Q3_K" => 12,
            "Q4_K" => 15,
            "Q5_K" => 17,
            "Q6_K" => 18,
            "IQ2_XXS" => 19,
            "IQ2_XS" => 20,
            "IQ3_XXS" => 23,
            "IQ1_S" => 24,
            "IQ4_NL" => 25,
            "IQ3_S" => 26,
            "IQ2_S" => 28,
            "IQ4_XS" => 30,
            "IQ1_M" => 31,
            "TQ1_0" => 36,
            "TQ2_0" => 37,
            "NVFP4" => 39,
            "MXFP4" => 38,
            "BF16" => 32,
            _ => 1024,
        }
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_are_impossible_have_no_bytes() {
        let q4_0 = GgmlType(2);
        assert_eq!(q4_0.bytes_of(&[3, 64]), Some(3 * 2 * 18));
        assert_eq!(q4_0.bytes_of(&[0, 32]), Some(0));
        assert_eq!(q4_0.bytes_of(&[3, 33]), None);
        assert_eq!(q4_0.bytes_of(&[]), None);
        assert_eq!(GgmlType::F32.bytes_of(&[usize::MAX]), None);
        assert_eq!(GgmlType::F32.bytes_of(&[1 << 40, 1 << 40]), None);
        assert_eq!(GgmlType::F32.bytes_of(&[0, 1 << 40, 1 << 40]), None);
        assert_eq!(GgmlType(4).bytes_of(&[1]), None);
    }

    #[test]
    fn sizes_agree_with_the_grids() {
        for (id, storage) in STORAGES {
            let t = GgmlType(*id);
            assert_eq!(storage.row_bytes(t.block_len()), t.block_bytes(), "{}", t.name());
            assert_eq!(GgmlType::of(*storage), Some(t));
        }
    }
}
