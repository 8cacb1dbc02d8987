//! The packed forms: how a matrix lies in memory while it is multiplied.
//!
//! A packed matrix is cut into panels of [`LANES`] rows, one row per lane, and a panel into chunks of [`CHUNK`]
//! columns. Float forms hold the values of one step (one column, or two of bf16) of all lanes side by side. Code
//! forms hold spans of chunks: the scales that they share, and of each chunk its own scales and its codes as bit
//! planes: byte `4 lane + i` of a plane holds the bits of column `4 step + i` for `8 / width` steps in a row, the
//! first in the lowest bits.
//!
//! Of sparse matrices a chunk holds [`MASKS`] bytes of masks and then only the values that are kept, in the order of the bits of
//! the masks: of codes a mask of 64 bits per step, bit `4 lane + i`, and their bytes, or halves of bytes from a whole byte on; of
//! floats a mask of 16 bits per column, bit `lane`. A chunk begins where the last one ended.
//!
//! Of codes two of every four of which are kept, a lane's four bytes are those of eight columns: what is read is the inputs that
//! they belong to. A chunk holds the planes of the places of these among their four, then half as many planes of codes.

use crate::{
    Pattern, Storage,
    grid::{Grid, Table, Zero},
};

/// Rows of a panel.
pub const LANES: usize = 16;
/// Columns of a chunk, which share the scale of their rounded inputs.
pub const CHUNK: usize = 64;
/// Bytes of the masks of a chunk of a sparse matrix: a bit per value.
pub const MASKS: usize = LANES * CHUNK / 8;
/// The pattern whose codes lie in pairs, without masks.
pub const PAIRS: Pattern = Pattern::Of { n: 2, m: 4 };
/// Bytes that kernels may read beyond the values of a step.
const BEYOND: usize = 64;

/// How the values of a packed matrix lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// `[cols][LANES]` 32-bit floats; inputs stay 32-bit.
    F32,
    /// `[cols][LANES]` 16-bit floats; inputs stay 32-bit.
    F16,
    /// As [`Form::F32`], of values and inputs that are rounded to 16-bit floats.
    Half,
    /// `[cols / 2][LANES][2]` brain floats; inputs are rounded to brain floats.
    Bf16,
    /// Codes; inputs are rounded to 8 bits, 64 of a token at a time.
    Codes(Codes),
    /// Floats of which only some are there; inputs stay 32-bit.
    Sparse(Floats, Pattern),
}

/// The floats of [`Form::Sparse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Floats {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// Brain floats.
    Bf16,
}

impl Floats {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        if self == Floats::F32 { 4 } else { 2 }
    }
}

/// A form of whole-number codes. A code stands for `scale * (code - zero)`, or `scale * code + minimum`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Codes {
    /// Bits of a code, 2 to 8; 4 or 8 where there are masks.
    pub bits: u8,
    /// Which of them are there, unless all are; the others stand for zero.
    pub pattern: Option<Pattern>,
    /// The whole numbers that stand between code and level, each plus 128.
    pub table: Option<[u8; 16]>,
    /// Columns that share a scale inside a chunk: 16 or 32.
    pub sub: u8,
    /// Has each sub-block a minimum?
    pub minimum: bool,
    /// Is the minimum told as the code that stands for zero, a whole number as a 16-bit float?
    pub point: bool,
    /// The code (or level of the table, plus 128) that stands for zero; 0 where there are minima.
    pub zero: u8,
    /// Where scales and minima come from.
    pub scales: Scales,
    /// How often the scale that a span shares is halved before it counts.
    pub halvings: u8,
}

/// How the scales of a code form are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scales {
    /// One 16-bit float per sub-block; then the minima.
    Halves,
    /// One 16-bit float per so many chunks; then the minimum.
    Group(u8),
    /// One 16-bit float per 256 columns, times one signed byte per sub-block.
    Steps,
    /// As `Steps` with a minimum, in a word of 32 bits per lane and chunk: six bits each of the first step, the
    /// second, the first minimum and the second, the first lowest; the upper bytes of four chunks are the float and
    /// that of the minima.
    Sixes,
    /// As `Steps` with a minimum; unsigned 4-bit steps in the low half of a byte and the minimum's in the high half.
    Pairs,
    /// One 32-bit float per sub-block; then the minima: those of opened panels, whose codes are whole bytes that were looked up.
    Floats,
}

/// See [`Form::chunk_places`].
#[derive(Clone, Copy, Debug)]
pub struct ChunkPlaces {
    /// Codes of the first chunk of a span; its scales are at 0.
    pub codes: usize,
    /// From the scales of a chunk to those of the next one.
    pub scale_step: usize,
    /// From the codes of a chunk to those of the next one.
    pub code_step: usize,
}

impl Form {
    /// The form of a storage. Codes that no kernel multiplies (groups that 32 does not divide, tables of floats) become the
    /// 16-bit floats that are nearest to what they stand for.
    pub fn of(storage: Storage) -> Form {
        match storage {
            Storage::F32 => Form::F32,
            Storage::F16 => Form::F16,
            Storage::Bf16 => Form::Bf16,
            Storage::Grid(grid) => Codes::of(grid).map_or(Form::F16, Form::Codes),
            Storage::Sparse(sparse) => {
                let pattern = sparse.pattern();
                // Zero must be a code where there are masks; in pairs it has none.
                let even = matches!(sparse.values(), Storage::Grid(Grid::Int { .. }));
                let paired = |codes: Codes| pattern == PAIRS && codes.table.is_some();
                match Form::of(sparse.values()) {
                    Form::Codes(codes) if !codes.minimum && (even || paired(codes)) => {
                        let bits = match codes.bits {
                            7 => 8,
                            bits if pattern == PAIRS => bits,
                            bits => {
                                if bits <= 4 {
                                    4
                                } else {
                                    8
                                }
                            }
                        };
                        Form::Codes(Codes { bits, pattern: Some(pattern), ..codes })
                    }
                    Form::F32 => Form::Sparse(Floats::F32, pattern),
                    Form::Bf16 => Form::Sparse(Floats::Bf16, pattern),
                    _ => Form::Sparse(Floats::F16, pattern),
                }
            }
        }
    }

    /// Are sums of a part of its steps made by themselves?
    pub fn is_cut_into_steps(self) -> bool {
        !matches!(self, Form::Codes(_) | Form::Sparse(..))
    }

    /// Are its values 16-bit floats?
    pub fn is_f16(self) -> bool {
        matches!(self, Form::F16 | Form::Sparse(Floats::F16, _))
    }

    /// How the same values lie where many tokens pass over them: codes as whole bytes, looked up already, beside scales as floats;
    /// without holes.
    pub fn opened(self) -> Form {
        match self {
            Form::Codes(codes) => Form::Codes(Codes { pattern: None, scales: Scales::Floats, ..codes }),
            Form::Sparse(..) => Form::F32,
            other => other,
        }
    }

    /// The pattern of a sparse matrix.
    pub fn pattern(self) -> Option<Pattern> {
        match self {
            Form::Codes(codes) => codes.pattern,
            Form::Sparse(_, pattern) => Some(pattern),
            _ => None,
        }
    }

    /// Chunks of a span.
    pub fn span(self) -> usize {
        match self {
            Form::Codes(Codes { scales: Scales::Group(chunks), .. }) => chunks.into(),
            Form::Codes(Codes { scales: Scales::Steps | Scales::Sixes | Scales::Pairs, .. }) => 4,
            _ => 1,
        }
    }

    /// Bytes of the scales that the chunks of a span share.
    pub fn span_header(self) -> usize {
        match self {
            Form::Codes(Codes { scales: Scales::Group(_) | Scales::Steps | Scales::Pairs, minimum, .. }) => {
                2 * LANES * (1 + usize::from(minimum))
            }
            _ => 0,
        }
    }

    /// From the end of what a span shares to the scales and to the codes of its first chunk, and from chunk to chunk
    /// the steps of both.
    ///
    /// Scales lie before their codes, except where kernels read those of all chunks first: memory is to be read
    /// line after line, which is what prefetchers follow (worth 10 % of the bandwidth).
    pub fn chunk_places(self) -> ChunkPlaces {
        let (header, body) = (self.chunk_header(), self.chunk_body());
        match self {
            Form::Codes(Codes { scales: Scales::Sixes, .. }) => {
                ChunkPlaces { codes: self.span() * header, scale_step: header, code_step: body }
            }
            _ => ChunkPlaces { codes: header, scale_step: header + body, code_step: header + body },
        }
    }

    /// Bytes of the scales of each chunk.
    pub fn chunk_header(self) -> usize {
        let Form::Codes(c) = self else { return 0 };
        let subs = CHUNK / usize::from(c.sub);
        match c.scales {
            Scales::Halves => 2 * LANES * subs * (1 + usize::from(c.minimum)),
            Scales::Group(_) => 0,
            Scales::Sixes => 4 * LANES,
            Scales::Floats => 4 * LANES * subs * (1 + usize::from(c.minimum)),
            Scales::Steps | Scales::Pairs => LANES * subs,
        }
    }

    /// Bytes of the codes of a chunk; 0 of floats, which have no chunks or chunks that differ in length.
    pub fn chunk_body(self) -> usize {
        match self {
            Form::F32 | Form::Half | Form::F16 | Form::Bf16 | Form::Sparse(..) => 0,
            Form::Codes(c) if c.is_paired() => MASKS + LANES * CHUNK / 2 * usize::from(c.bits) / 8,
            Form::Codes(c) => LANES * CHUNK * usize::from(c.plane_bits()) / 8,
        }
    }

    /// Bytes of a panel of `cols` columns.
    pub fn panel_bytes(self, cols: usize) -> usize {
        if self.is_cut_into_steps() {
            return (self.length(cols) * self.step_bytes()).next_multiple_of(64);
        }
        let chunks = cols.div_ceil(CHUNK);
        let headers = chunks.div_ceil(self.span()) * self.span_header() + chunks * self.chunk_header();
        let pattern = match (self, self.pattern()) {
            (Form::Codes(codes), _) if codes.is_paired() => None,
            (_, pattern) => pattern,
        };
        let Some(pattern) = pattern else { return headers + chunks * self.chunk_body() };
        let kept = LANES * pattern.kept(cols);
        let values = match self {
            Form::Sparse(floats, _) => kept * floats.bytes(),
            // Each step begins with a whole byte.
            Form::Codes(Codes { bits: 4, .. }) => (kept + cols.div_ceil(4)) / 2,
            _ => kept,
        };
        (headers + chunks * MASKS + values + BEYOND).next_multiple_of(64)
    }

    /// Steps of a tile product: chunks of codes, columns of floats or pairs of brain floats.
    pub fn length(self, cols: usize) -> usize {
        match self {
            Form::F32 | Form::F16 | Form::Half => cols,
            Form::Bf16 => cols.div_ceil(2),
            Form::Codes(_) | Form::Sparse(..) => cols.div_ceil(CHUNK),
        }
    }

    /// Bytes of a step of a panel of floats; a panel of codes is not cut into steps, nor is a sparse one.
    pub fn step_bytes(self) -> usize {
        match self {
            Form::F32 | Form::Half | Form::Bf16 => 4 * LANES,
            Form::F16 => 2 * LANES,
            Form::Codes(_) | Form::Sparse(..) => 0,
        }
    }

    /// Bytes of a packed matrix.
    pub fn bytes(self, rows: usize, cols: usize) -> usize {
        rows.div_ceil(LANES) * self.panel_bytes(cols)
    }
}

/// Chunks that share one copy of the scale of a row.
const ROW_SPAN: u8 = 16;

impl Codes {
    /// Do codes lie in pairs, each beside its place among four columns?
    #[inline(always)]
    pub(crate) fn is_paired(self) -> bool {
        self.pattern == Some(PAIRS)
    }

    /// Are panels opened?
    #[inline(always)]
    pub(crate) fn is_opened(self) -> bool {
        self.scales == Scales::Floats
    }

    /// Do codes, or what is looked up for them, take all eight bits?
    #[inline(always)]
    pub(crate) fn is_wide(self) -> bool {
        self.bits == 8 || self.table.is_some()
    }

    /// Bits that a code takes where it lies.
    #[inline(always)]
    pub(crate) fn plane_bits(self) -> u8 {
        if self.is_opened() { 8 } else { self.bits }
    }

    /// The levels of the table plus 128; of no use where there is none.
    #[inline(always)]
    pub(crate) fn levels(&self) -> &[u8; 16] {
        self.table.as_ref().unwrap_or(&[0; 16])
    }

    /// What the scale that a span shares is multiplied by.
    #[inline(always)]
    pub(crate) fn unit(self) -> f32 {
        f32::from_bits((127 - u32::from(self.halvings)) << 23)
    }

    fn of(grid: Grid) -> Option<Codes> {
        let plain = |bits: u8, zero: u8, minimum: bool| Codes {
            bits,
            pattern: None,
            table: None,
            sub: 32,
            minimum,
            point: false,
            zero,
            scales: Scales::Halves,
            halvings: 0,
        };
        let steps = |bits: u8, zero: u8, sub: u8, minimum: bool| Codes {
            sub,
            scales: Scales::Steps,
            ..plain(bits, zero, minimum)
        };
        let by_group = |group: u16| match group {
            0 => Some(Scales::Group(ROW_SPAN)),
            g if g % 64 == 0 => Some(Scales::Group((g / 64) as u8)),
            g if g % 32 == 0 => Some(Scales::Halves),
            _ => None,
        };
        let own = |table: Table| table.bytes().copied();
        Some(match grid {
            Grid::Int { bits, group, zero } => {
                let middle = if zero == Zero::Middle { 1 << (bits - 1) } else { 0 };
                Codes {
                    scales: by_group(group)?,
                    point: zero == Zero::Point,
                    ..plain(bits, middle, zero != Zero::Middle)
                }
            }
            Grid::Levels { table: table @ Table::Own(_), group } => {
                // Codes of one bit lie as those of two, and of more levels than a register looks up the levels lie themselves.
                let bits = if table.bits() > 4 { 8 } else { table.bits().max(2) };
                Codes { table: table.bytes().copied(), scales: by_group(group)?, ..plain(bits, 128, false) }
            }
            // Their levels are no whole numbers of 8 bits.
            Grid::Levels { .. } => return None,
            Grid::Mxfp4 => Codes { table: own(Table::E2m1), ..plain(4, 128, false) },
            Grid::Nvfp4 => Codes { table: own(Table::E2m1), sub: 16, ..plain(4, 128, false) },
            Grid::Tq1 | Grid::Tq2 => Codes { scales: Scales::Group(4), ..plain(2, 1, false) },
            Grid::Iq1S | Grid::Iq1M | Grid::Iq2Xxs | Grid::Iq2Xs | Grid::Iq2S | Grid::Iq3Xxs | Grid::Iq3S => {
                let sub = if matches!(grid, Grid::Iq1M | Grid::Iq2Xs | Grid::Iq2S) { 16 } else { 32 };
                let table = grid.codebook_levels()?;
                Codes { table: own(table), halvings: grid.halvings(), ..steps(table.bits(), 128, sub, false) }
            }
            Grid::Iq4Xs => Codes { table: own(Table::Iq4Nl), ..steps(4, 128, 32, false) },
            Grid::Q4_0 => plain(4, 8, false),
            Grid::Q4_1 => plain(4, 0, true),
            Grid::Q5_0 => plain(5, 16, false),
            Grid::Q5_1 => plain(5, 0, true),
            Grid::Q8_0 => plain(8, 128, false),
            Grid::Iq4Nl => Codes { table: own(Table::Iq4Nl), ..plain(4, 128, false) },
            Grid::Q2K => Codes { scales: Scales::Pairs, ..steps(2, 0, 16, true) },
            Grid::Q3K => steps(3, 4, 16, false),
            Grid::Q4K => Codes { scales: Scales::Sixes, ..steps(4, 0, 32, true) },
            Grid::Q5K => Codes { scales: Scales::Sixes, ..steps(5, 0, 32, true) },
            Grid::Q6K => steps(6, 32, 16, false),
        })
    }
}
