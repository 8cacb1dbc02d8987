//! What grids are called in recipes, reports and on the command line.

use super::{Grid, Table, Zero, group_fits};

/// A name that no grid has.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[error(
    "no storage is called {0:?}; there are f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, \
     q6_k, iq1_s, iq1_m, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, iq4_nl, iq4_xs, tq1_0, tq2_0, mxfp4, nvfp4, int<2..8>g<group>[a|z] (a: with a minimum, z: with a zero point; int4g32, int3g64a), \
     int<2..8>[z] (a scale per row), nf4[g<group>], fp8_e4m3[g<group>], fp8_e5m2[g<group>] and palette<1..8>[g<group>] (levels of the matrix's own, from `planish cluster`); groups are multiples of \
     8 up to 1024; floats and these groups also with holes: bf16@2:4 (two of every four are kept), int4g128@50% (half of each \
     row), bf16@50%16x1 (in blocks of rows x columns)"
)]
pub struct GridError(pub String);

const FIXED: &[(Grid, &str)] = &[
    (Grid::Q4_0, "q4_0"),
    (Grid::Q4_1, "q4_1"),
    (Grid::Q5_0, "q5_0"),
    (Grid::Q5_1, "q5_1"),
    (Grid::Q8_0, "q8_0"),
    (Grid::Q2K, "q2_k"),
    (Grid::Q3K, "q3_k"),
    (Grid::Q4K, "q4_k"),
    (Grid::Q5K, "q5_k"),
    (Grid::Q6K, "q6_k"),
    (Grid::Iq4Nl, "iq4_nl"),
    (Grid::Iq4Xs, "iq4_xs"),
    (Grid::Mxfp4, "mxfp4"),
    (Grid::Nvfp4, "nvfp4"),
    (Grid::Iq1S, "iq1_s"),
    (Grid::Iq1M, "iq1_m"),
    (Grid::Iq2Xxs, "iq2_xxs"),
    (Grid::Iq2Xs, "iq2_xs"),
    (Grid::Iq2S, "iq2_s"),
    (Grid::Iq3Xxs, "iq3_xxs"),
    (Grid::Iq3S, "iq3_s"),
    (Grid::Tq1, "tq1_0"),
    (Grid::Tq2, "tq2_0"),
];

/// Tables that have grids of their own name, with the group that is meant where none is said.
const TABLES: &[(Table, &str, u16)] =
    &[(Table::Nf4, "nf4", 64), (Table::E4m3, "fp8_e4m3", 0), (Table::E5m2, "fp8_e5m2", 0)];

impl Grid {
    /// Its name in recipes, reports and on the command line.
    pub fn name(self) -> String {
        let of_group = |group: u16| if group == 0 { String::new() } else { format!("g{group}") };
        match self {
            Grid::Int { bits, group, zero } => {
                let zero = match zero {
                    Zero::Middle => "",
                    Zero::Minimum => "a",
                    Zero::Point => "z",
                };
                format!("int{bits}{}{zero}", of_group(group))
            }
            Grid::Levels { table: Table::Own(_), group } => {
                format!("palette{}{}", self.code_bits(), of_group(group))
            }
            Grid::Levels { table, group } => {
                let named = TABLES.iter().find(|(t, ..)| *t == table);
                let (name, usual) = named.map_or(("levels", 0), |(_, name, usual)| (*name, *usual));
                // A scale per row is told where groups are usual.
                let group = match group {
                    g if g == usual => String::new(),
                    0 => "row".into(),
                    g => of_group(g),
                };
                format!("{name}{group}")
            }
            fixed => FIXED.iter().find(|(g, _)| *g == fixed).map_or("", |(_, name)| *name).into(),
        }
    }

    /// Its name with the levels of a palette: what a file says.
    pub fn full_name(self) -> String {
        let Grid::Levels { table: Table::Own(palette), .. } = self else { return self.name() };
        let levels: Vec<String> = palette.levels().iter().map(i8::to_string).collect();
        format!("{}({})", self.name(), levels.join(","))
    }

    /// The grid of that name, in any case.
    ///
    /// # Errors
    /// If nothing has that name; the message lists what there is.
    pub fn parse(name: &str) -> Result<Grid, GridError> {
        let lower = name.to_ascii_lowercase();
        if let Some((grid, _)) = FIXED.iter().find(|(_, n)| *n == lower) {
            return Ok(*grid);
        }
        int(&lower).or_else(|| levels(&lower)).or_else(|| palette(&lower)).ok_or_else(|| GridError(name.into()))
    }
}

fn int(name: &str) -> Option<Grid> {
    let rest = name.strip_prefix("int")?;
    let (rest, zero) = match rest.strip_suffix('a') {
        Some(rest) => (rest, Zero::Minimum),
        None => rest.strip_suffix('z').map_or((rest, Zero::Middle), |rest| (rest, Zero::Point)),
    };
    match rest.split_once('g') {
        Some((bits, group)) => Grid::int(bits.parse().ok()?, group.parse().ok().filter(|g| *g > 0)?, zero),
        None => Grid::int(rest.parse().ok()?, 0, zero),
    }
}

/// `palette4g64`, or with the levels that a matrix chose: `palette1g64(-90,127)`.
fn palette(name: &str) -> Option<Grid> {
    let rest = name.strip_prefix("palette")?;
    let (rest, own) = match rest.split_once('(') {
        Some((rest, levels)) => (rest, Some(levels.strip_suffix(')')?)),
        None => (rest, None),
    };
    let (bits, group) = match rest.split_once('g') {
        Some((bits, group)) => (bits, group.parse().ok().filter(|g| *g > 0)?),
        None => (rest, 0),
    };
    let bits: u8 = bits.parse().ok().filter(|bits| (1..=8).contains(bits))?;
    let table = match own {
        None => Table::normal_palette(bits)?,
        Some(levels) => {
            let levels: Vec<i8> = levels.split(',').map(|l| l.trim().parse().ok()).collect::<Option<_>>()?;
            Table::palette(&levels).filter(|table| table.bits() == bits)?
        }
    };
    group_fits(group).then_some(Grid::Levels { table, group })
}

fn levels(name: &str) -> Option<Grid> {
    let (table, rest, usual) =
        TABLES.iter().find_map(|(table, prefix, usual)| Some((*table, name.strip_prefix(prefix)?, *usual)))?;
    let group = match rest {
        "" => usual,
        "row" => 0,
        rest => rest.strip_prefix('g')?.parse().ok().filter(|g| *g > 0)?,
    };
    group_fits(group).then_some(Grid::Levels { table, group })
}
