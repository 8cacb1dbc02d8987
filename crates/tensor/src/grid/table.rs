//! Tables: levels that do not lie evenly, by code, in units of a block's scale.

use super::Palette;

/// A table of levels.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Table {
    /// The sixteen levels of IQ4_NL and IQ4_XS.
    Iq4Nl,
    /// Twice the values of the 4-bit float with two bits of exponent (OCP MX specification 1.0), as ggml keeps them.
    E2m1,
    /// The sixteen quantiles of a normal distribution of QLoRA (arXiv 2305.14314), from -1 to 1.
    Nf4,
    /// The 8-bit float with four bits of exponent, finite up to 448 (arXiv 2209.05433).
    E4m3,
    /// The 8-bit float with five bits of exponent, finite up to 57344.
    E5m2,
    /// Eight times -1, 0 and 1, each less and more one.
    Iq1,
    /// The magnitudes of the IQ2 types with both signs.
    Iq2,
    /// The magnitudes of IQ3_XXS with both signs.
    Iq3Xxs,
    /// The magnitudes of IQ3_S with both signs.
    Iq3S,
    /// Levels of a matrix's own.
    Own(&'static Palette),
}

/// The levels of IQ4_NL in units of the scale.
pub const IQ4_NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the values of E2M1: the sign is the highest bit.
pub const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

const IQ1: [i8; 16] = [-9, -7, -1, 1, 7, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const IQ2: [i8; 16] = [-43, -25, -8, 8, 25, 43, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const IQ3_XXS: [i8; 16] = [-62, -52, -44, -36, -28, -20, -12, -4, 4, 12, 20, 28, 36, 44, 52, 62];
const IQ3_S: [i8; 16] = [-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15];

static IQ1_LEVELS: [f32; 16] = floats(IQ1);
static IQ2_LEVELS: [f32; 16] = floats(IQ2);
static IQ3_XXS_LEVELS: [f32; 16] = floats(IQ3_XXS);
static IQ3_S_LEVELS: [f32; 16] = floats(IQ3_S);
static IQ1_BYTES: [u8; 16] = bytes(IQ1);
static IQ2_BYTES: [u8; 16] = bytes(IQ2);
static IQ3_XXS_BYTES: [u8; 16] = bytes(IQ3_XXS);
static IQ3_S_BYTES: [u8; 16] = bytes(IQ3_S);
static IQ4_NL_LEVELS: [f32; 16] = floats(IQ4_NL);
static E2M1_LEVELS: [f32; 16] = floats(E2M1);
static NF4_LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
static E4M3_LEVELS: [f32; 256] = small_floats(4, 3);
static E5M2_LEVELS: [f32; 256] = small_floats(5, 2);
static IQ4_NL_BYTES: [u8; 16] = bytes(IQ4_NL);
static E2M1_BYTES: [u8; 16] = bytes(E2M1);

const fn floats(levels: [i8; 16]) -> [f32; 16] {
    let mut out = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = levels[i] as f32;
        i += 1;
    }
    out
}

const fn bytes(levels: [i8; 16]) -> [u8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = (levels[i] as i16 + 128) as u8;
        i += 1;
    }
    out
}

/// All values of an 8-bit float. E4M3 has no infinities: its highest exponent holds values but for the last, which is no
/// number; E5M2 is as IEEE says.
const fn small_floats(exponent: u32, mantissa: u32) -> [f32; 256] {
    let mut out = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (e, m) = (code as u32 >> mantissa & ((1 << exponent) - 1), code as u32 & ((1 << mantissa) - 1));
        let bias = (1i32 << (exponent - 1)) - 1;
        let value = if e == 0 {
            m as f32 * pow2(1 - bias - mantissa as i32)
        } else {
            (m + (1 << mantissa)) as f32 * pow2(e as i32 - bias - mantissa as i32)
        };
        let value = if exponent == 5 && e == 31 {
            if m == 0 { f32::INFINITY } else { f32::NAN }
        } else if exponent == 4 && code & 0x7f == 0x7f {
            f32::NAN
        } else {
            value
        };
        out[code] = if code >= 128 { -value } else { value };
        code += 1;
    }
    out
}

/// A power of two by its bits, which is known when this is compiled.
const fn pow2(power: i32) -> f32 {
    f32::from_bits(((power + 127) as u32) << 23)
}

impl Table {
    /// Bits of a code.
    pub fn bits(self) -> u8 {
        match self {
            Table::E4m3 | Table::E5m2 => 8,
            Table::Iq1 | Table::Iq2 => 3,
            Table::Own(palette) => palette.bits(),
            _ => 4,
        }
    }

    /// The level of each code.
    #[inline(always)]
    pub fn levels(self) -> &'static [f32] {
        match self {
            Table::Iq4Nl => &IQ4_NL_LEVELS,
            Table::E2m1 => &E2M1_LEVELS,
            Table::Nf4 => &NF4_LEVELS,
            Table::E4m3 => &E4M3_LEVELS,
            Table::E5m2 => &E5M2_LEVELS,
            Table::Iq1 => &IQ1_LEVELS,
            Table::Iq2 => &IQ2_LEVELS,
            Table::Iq3Xxs => &IQ3_XXS_LEVELS,
            Table::Iq3S => &IQ3_S_LEVELS,
            Table::Own(palette) => palette.floats(),
        }
    }

    /// The levels plus 128, where they are whole numbers.
    pub fn bytes(self) -> Option<&'static [u8; 16]> {
        match self {
            Table::Iq4Nl => Some(&IQ4_NL_BYTES),
            Table::E2m1 => Some(&E2M1_BYTES),
            Table::Iq1 => Some(&IQ1_BYTES),
            Table::Iq2 => Some(&IQ2_BYTES),
            Table::Iq3Xxs => Some(&IQ3_XXS_BYTES),
            Table::Iq3S => Some(&IQ3_S_BYTES),
            Table::Own(palette) if palette.bits() <= 4 => Some(palette.bytes()),
            _ => None,
        }
    }

    /// The outermost levels.
    pub fn ends(self) -> (f32, f32) {
        match self {
            Table::Iq4Nl => (-127.0, 113.0),
            Table::E2m1 => (-12.0, 12.0),
            Table::Nf4 => (-1.0, 1.0),
            Table::E4m3 => (-448.0, 448.0),
            Table::E5m2 => (-57344.0, 57344.0),
            Table::Iq1 => (-9.0, 9.0),
            Table::Iq2 => (-43.0, 43.0),
            Table::Iq3Xxs => (-62.0, 62.0),
            Table::Iq3S => (-15.0, 15.0),
            Table::Own(palette) => (palette.floats()[0], palette.floats()[palette.floats().len() - 1]),
        }
    }

    /// Levels of rising value from the first code on: all of them, or those of the positive sign.
    #[inline(always)]
    pub(super) fn rising(self) -> &'static [f32] {
        match self {
            Table::Iq4Nl | Table::Nf4 | Table::Iq3Xxs | Table::Iq3S | Table::Own(_) => self.levels(),
            Table::Iq1 | Table::Iq2 => &self.levels()[..6],
            Table::E2m1 => &E2M1_LEVELS[..8],
            Table::E4m3 => &E4M3_LEVELS[..127],
            Table::E5m2 => &E5M2_LEVELS[..124],
        }
    }

    /// Is the highest bit of a code a sign, beside levels that rise from 0 on?
    #[inline(always)]
    pub(super) fn is_signed(self) -> bool {
        matches!(self, Table::E2m1 | Table::E4m3 | Table::E5m2)
    }

    /// From the level below `x` to the one above it, in units of the scale; beyond the ends, between the outermost two.
    #[inline(always)]
    pub(super) fn gap(self, x: f32) -> f32 {
        let rising = self.rising();
        let sought = if matches!(self, Table::Iq4Nl | Table::Nf4 | Table::Own(_)) { x } else { x.abs() };
        let above = rising.partition_point(|level| *level < sought).clamp(1, rising.len() - 1);
        rising[above] - rising[above - 1]
    }

    /// The code of the nearest level to `x`, in units of the scale.
    #[inline(always)]
    pub fn nearest(self, x: f32) -> u8 {
        if self == Table::Iq4Nl {
            return nearest_on_iq4_nl(x);
        }
        let rising = self.rising();
        let signed = self.is_signed();
        let sought = if signed { x.abs() } else { x };
        let above = rising.partition_point(|level| *level < sought).min(rising.len() - 1);
        let code = match above {
            0 => 0,
            // Halfway, the even code: that is how floats round.
            _ => {
                let middle = 0.5 * (rising[above - 1] + rising[above]);
                let lower = sought < middle || sought == middle && above % 2 == 1;
                if lower { above - 1 } else { above }
            }
        };
        // There is one zero.
        let negative = signed && x < 0.0 && code > 0;
        code as u8 | if negative { 1 << (self.bits() - 1) } else { 0 }
    }
}

/// The code of the nearest level of IQ4_NL, without a branch.
#[inline(always)]
fn nearest_on_iq4_nl(x: f32) -> u8 {
    let mut code = 0;
    for i in 0..15 {
        // Between two levels the upper one wins from the middle on.
        let middle = 0.5 * (f32::from(IQ4_NL[i]) + f32::from(IQ4_NL[i + 1]));
        code += u8::from(x >= middle);
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Table; 9] = [
        Table::Iq4Nl,
        Table::E2m1,
        Table::Nf4,
        Table::E4m3,
        Table::E5m2,
        Table::Iq1,
        Table::Iq2,
        Table::Iq3Xxs,
        Table::Iq3S,
    ];

    #[test]
    fn every_level_is_the_nearest_to_itself() {
        for table in ALL {
            let codes = if table.bits() == 3 { 6 } else { table.levels().len() };
            for level in table.levels()[..codes].iter().filter(|l| l.is_finite()) {
                let code = table.nearest(*level);
                assert_eq!(table.levels()[usize::from(code)], *level, "{table:?} {level}");
                assert!(*level >= table.ends().0 && *level <= table.ends().1);
            }
            let (low, high) = table.ends();
            for (x, end) in [(f32::NEG_INFINITY, low), (f32::INFINITY, high), (2.0 * low, low), (2.0 * high, high)] {
                assert_eq!(table.levels()[usize::from(table.nearest(x))], end, "{table:?} {x}");
            }
        }
    }

    #[test]
    fn eight_bit_floats_are_those_of_the_papers() {
        let e4m3 = |code: usize| E4M3_LEVELS[code];
        assert_eq!((e4m3(0x01), e4m3(0x08), e4m3(0x38), e4m3(0x7e)), (0.001953125, 0.015625, 1.0, 448.0));
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan() && e4m3(0xb8) == -1.0);
        let e5m2 = |code: usize| E5M2_LEVELS[code];
        assert_eq!((e5m2(0x01), e5m2(0x3c), e5m2(0x7b)), (2f32.powi(-16), 1.0, 57344.0));
        assert!(e5m2(0x7c).is_infinite() && e5m2(0x7d).is_nan());
    }

    #[test]
    fn halfway_goes_to_the_even_code() {
        // Between 1 (0x38) and 1.125 (0x39), and between that and 1.25 (0x3a).
        assert_eq!((Table::E4m3.nearest(1.0625), Table::E4m3.nearest(1.1875)), (0x38, 0x3a));
        assert_eq!(Table::E4m3.nearest(-1.0625), 0xb8);
    }
}
