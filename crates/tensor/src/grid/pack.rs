//! The byte layouts: headers and codes of every grid, read and written.

use super::{Grid, Table, Zero, block::Block, spans};

/// A 16-bit float widened by shifts and one exact product: no table, no branch on the machine's features.
#[inline(always)]
pub fn widen(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff);
    let sign = u32::from(bits & 0x8000) << 16;
    // 2^112 moves the exponent's bias from 15 to 127; subnormals become normal on the way.
    let scale = f32::from_bits((127 + 112) << 23);
    let finite = (f32::from_bits(magnitude << 13) * scale).to_bits();
    let infinite = 0x7f80_0000 | (magnitude & 0x3ff) << 13;
    f32::from_bits(sign | if magnitude < 0x7c00 { finite } else { infinite })
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// A number halved so many times.
#[inline(always)]
pub fn halved(x: f32, times: u8) -> f32 {
    x * f32::from_bits((127 - u32::from(times)) << 23)
}

impl Block {
    /// Takes the block's own scale, and its minimum or scale of minima, and derives those of the sub-blocks.
    #[inline(always)]
    pub(super) fn derive(&mut self, grid: Grid) {
        let (d, m) = (widen(self.d), widen(self.m));
        match grid {
            Grid::Q2K | Grid::Q4K | Grid::Q5K => {
                for s in 0..256 / self.sub_len as usize {
                    self.scale[s] = d * f32::from(self.steps[s]);
                    self.offset[s] = -(m * f32::from(self.mins[s]));
                }
            }
            Grid::Q3K | Grid::Q6K | Grid::Iq4Xs => self.set_scales(d),
            _ if self.book.is_some() => self.set_scales(halved(d, grid.halvings())),
            Grid::Nvfp4 => {
                for s in 0..4 {
                    self.scale[s] = half_e4m3(self.steps[s] as u8);
                }
            }
            Grid::Int { zero: Zero::Minimum, .. } | Grid::Q4_1 | Grid::Q5_1 => {
                self.scale[0] = d;
                self.offset[0] = m;
            }
            Grid::Mxfp4 => self.scale[0] = half_power(self.d),
            _ => {
                // The scale of a row is a float of 32 bits, which is there already.
                if !grid.is_by_row() {
                    self.scale[0] = d;
                }
                if matches!(grid, Grid::Int { zero: Zero::Point, .. }) {
                    self.base = -i16::from(self.mins[0]);
                }
            }
        }
    }
}

impl Block {
    /// Scales of sub-blocks that are whole multiples of one.
    #[inline(always)]
    fn set_scales(&mut self, d: f32) {
        for s in 0..256 / self.sub_len as usize {
            self.scale[s] = d * f32::from(self.steps[s]);
        }
    }
}

/// Half of a scale of NVFP4, an E4M3 whose sign does not count; what is no number counts as 0 or, with a sign, as the
/// number that its bits would be, as in ggml.
#[inline(always)]
pub fn half_e4m3(bits: u8) -> f32 {
    match bits {
        0x7f => 0.0,
        0xff => 240.0,
        _ => 0.5 * Table::E4m3.levels()[usize::from(bits & 0x7f)],
    }
}

/// Half of the power of two that an exponent of eight bits stands for (E8M0), 0 being 2^-127.
#[inline(always)]
pub fn half_power(exponent: u16) -> f32 {
    let e = u32::from(exponent & 0xff);
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
}

/// Reads the scales of a block and derives those of its sub-blocks.
#[inline(always)]
pub fn header(grid: Grid, bytes: &[u8]) -> Block {
    let mut b = Block::empty(grid);
    read_scales(grid, bytes, &mut b);
    b.derive(grid);
    b
}

/// Reads the scales of a block as they are stored, over those of another block of the grid.
#[inline(always)]
pub fn read_scales(grid: Grid, bytes: &[u8], b: &mut Block) {
    match grid {
        Grid::Int { .. } | Grid::Levels { .. } => {
            let after = if grid.is_by_row() {
                b.scale[0] = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                4
            } else {
                b.d = u16_at(bytes, 0);
                2
            };
            match grid {
                Grid::Int { zero: Zero::Minimum, .. } => b.m = u16_at(bytes, after),
                Grid::Int { zero: Zero::Point, .. } => b.mins[0] = bytes[after],
                _ => {}
            }
        }
        Grid::Mxfp4 => b.d = bytes[0].into(),
        Grid::Iq4Xs => {
            b.d = u16_at(bytes, 0);
            let high = u16_at(bytes, 2);
            for s in 0..8 {
                let step = bytes[4 + s / 2] >> (4 * (s % 2)) & 15 | ((high >> (2 * s) & 3) as u8) << 4;
                b.steps[s] = step as i8 - 32;
            }
        }
        Grid::Nvfp4 => (0..4).for_each(|s| b.steps[s] = bytes[s] as i8),
        Grid::Q4_0 | Grid::Q5_0 | Grid::Q8_0 | Grid::Iq4Nl => b.d = u16_at(bytes, 0),
        Grid::Tq1 => b.d = u16_at(bytes, 52),
        Grid::Tq2 => b.d = u16_at(bytes, 64),
        Grid::Iq1S | Grid::Iq1M | Grid::Iq2Xxs | Grid::Iq2Xs | Grid::Iq2S | Grid::Iq3Xxs | Grid::Iq3S => {
            spans::steps(grid, bytes, b);
        }
        Grid::Q4_1 | Grid::Q5_1 => (b.d, b.m) = (u16_at(bytes, 0), u16_at(bytes, 2)),
        Grid::Q2K => {
            (b.d, b.m) = (u16_at(bytes, 80), u16_at(bytes, 82));
            for s in 0..16 {
                b.steps[s] = (bytes[s] & 15) as i8;
                b.mins[s] = bytes[s] >> 4;
            }
        }
        Grid::Q3K => {
            b.d = u16_at(bytes, 108);
            let packed = &bytes[96..108];
            for s in 0..16 {
                let low = if s < 8 { packed[s] & 15 } else { packed[s - 8] >> 4 };
                let high = packed[8 + s % 4] >> (2 * (s / 4)) & 3;
                b.steps[s] = (low | high << 4) as i8 - 32;
            }
        }
        Grid::Q4K | Grid::Q5K => {
            (b.d, b.m) = (u16_at(bytes, 0), u16_at(bytes, 2));
            let p = &bytes[4..16];
            for s in 0..4 {
                b.steps[s] = (p[s] & 63) as i8;
                b.mins[s] = p[s + 4] & 63;
                b.steps[s + 4] = (p[s + 8] & 15 | (p[s] >> 6) << 4) as i8;
                b.mins[s + 4] = p[s + 8] >> 4 | (p[s + 4] >> 6) << 4;
            }
        }
        Grid::Q6K => {
            b.d = u16_at(bytes, 208);
            for s in 0..16 {
                b.steps[s] = bytes[192 + s] as i8;
            }
        }
    }
}

/// Reads the codes of a block.
#[inline(always)]
pub fn unpack(grid: Grid, bytes: &[u8], codes: &mut [u8]) {
    match grid {
        Grid::Int { bits, .. } => unpack_bits(&bytes[grid.header_bytes()..], bits, codes),
        Grid::Levels { table, .. } => unpack_bits(&bytes[grid.header_bytes()..], table.bits(), codes),
        Grid::Mxfp4 => nibbles(&bytes[1..17], codes),
        Grid::Nvfp4 => bytes[4..36].chunks_exact(8).zip(codes.chunks_exact_mut(16)).for_each(|(b, c)| nibbles(b, c)),
        Grid::Tq1 => {
            spans::trits::<5>(&bytes[..32], &mut codes[..160]);
            spans::trits::<5>(&bytes[32..48], &mut codes[160..240]);
            spans::trits::<4>(&bytes[48..52], &mut codes[240..]);
        }
        Grid::Tq2 => pairs(&bytes[..64], codes),
        Grid::Iq1S | Grid::Iq1M | Grid::Iq2Xxs | Grid::Iq2Xs | Grid::Iq2S | Grid::Iq3Xxs | Grid::Iq3S => {
            spans::unpack(grid, bytes, codes);
        }
        Grid::Iq4Xs => bytes[8..136].chunks_exact(16).zip(codes.chunks_exact_mut(32)).for_each(|(b, c)| nibbles(b, c)),
        Grid::Q4_0 | Grid::Iq4Nl => nibbles(&bytes[2..18], codes),
        Grid::Q4_1 => nibbles(&bytes[4..20], codes),
        Grid::Q5_0 => {
            nibbles(&bytes[6..22], codes);
            fifth_bits(&bytes[2..6], codes);
        }
        Grid::Q5_1 => {
            nibbles(&bytes[8..24], codes);
            fifth_bits(&bytes[4..8], codes);
        }
        Grid::Q8_0 => codes.iter_mut().zip(&bytes[2..34]).for_each(|(c, b)| *c = b ^ 0x80),
        Grid::Q2K => pairs(&bytes[16..80], codes),
        Grid::Q3K => {
            pairs(&bytes[32..96], codes);
            plane(&bytes[..32], codes, 4);
        }
        Grid::Q4K => bytes[16..144].chunks_exact(32).zip(codes.chunks_exact_mut(64)).for_each(|(b, c)| nibbles(b, c)),
        Grid::Q5K => {
            bytes[48..176].chunks_exact(32).zip(codes.chunks_exact_mut(64)).for_each(|(b, c)| nibbles(b, c));
            plane(&bytes[16..48], codes, 16);
        }
        Grid::Q6K => {
            for half in 0..2 {
                let (low, high) = (&bytes[half * 64..half * 64 + 64], &bytes[128 + half * 32..160 + half * 32]);
                let codes = &mut codes[half * 128..half * 128 + 128];
                for i in 0..32 {
                    codes[i] = low[i] & 15 | (high[i] & 3) << 4;
                    codes[i + 32] = low[i + 32] & 15 | (high[i] >> 2 & 3) << 4;
                    codes[i + 64] = low[i] >> 4 | (high[i] >> 4 & 3) << 4;
                    codes[i + 96] = low[i + 32] >> 4 | (high[i] >> 6) << 4;
                }
            }
        }
    }
}

/// Columns that are decoded together.
const TOGETHER: usize = 256;

/// Decodes rows of planish's own groups: the same values as through [`header`] and [`unpack`].
#[inline(always)]
pub fn decode_groups(grid: Grid, bytes: &[u8], out: &mut [f32]) {
    let bits = match grid {
        Grid::Int { bits, .. } => bits,
        Grid::Levels { table, .. } => table.bits(),
        _ => return,
    };
    let (len, size, first) = (grid.block_len_in(out.len()), grid.block_bytes_in(out.len()), grid.header_bytes());
    let mut codes = [0u8; TOGETHER];
    for (bytes, out) in bytes.chunks_exact(size.max(1)).zip(out.chunks_mut(len.max(1))) {
        let block = header(grid, bytes);
        for (i, out) in out.chunks_mut(TOGETHER).enumerate() {
            let codes = &mut codes[..out.len().next_multiple_of(8)];
            unpack_bits(&bytes[first + i * TOGETHER * usize::from(bits) / 8..], bits, codes);
            block.sub_values(0, codes, out);
        }
    }
}

/// Decodes rows of the blocks of 32: the same values as through a [`Block`], whose making would cost more than the
/// codes.
#[inline(always)]
pub fn decode_plain(grid: Grid, bytes: &[u8], out: &mut [f32]) {
    let levels = Block::empty(grid).table.unwrap_or(Table::Iq4Nl).levels();
    for (bytes, out) in bytes.chunks_exact(grid.block_bytes_in(out.len())).zip(out.as_chunks_mut::<32>().0) {
        let d = widen(u16_at(bytes, 0));
        match grid {
            Grid::Q8_0 => {
                let codes = &bytes[2..].as_chunks::<32>().0[0];
                out.iter_mut().zip(codes).for_each(|(o, code)| *o = d * f32::from(*code as i8));
            }
            Grid::Q4_0 => halves(&bytes[2..], out, |c, _| d * (i32::from(c) - 8) as f32),
            Grid::Q4_1 => {
                let m = widen(u16_at(bytes, 2));
                halves(&bytes[4..], out, |c, _| d * f32::from(c) + m);
            }
            Grid::Q5_0 => {
                let high = u32::from_le_bytes([bytes[2], bytes[3], bytes[4], bytes[5]]);
                halves(&bytes[6..], out, |c, i| d * (i32::from(c | fifth(high, i)) - 16) as f32);
            }
            Grid::Q5_1 => {
                let m = widen(u16_at(bytes, 2));
                let high = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
                halves(&bytes[8..], out, |c, i| d * f32::from(c | fifth(high, i)) + m);
            }
            Grid::Mxfp4 => {
                let d = half_power(bytes[0].into());
                halves(&bytes[1..], out, |c, _| d * levels[usize::from(c)]);
            }
            _ => halves(&bytes[2..], out, |c, _| d * levels[usize::from(c)]),
        }
    }
}

/// The fifth bit of code `i`, in its place.
#[inline(always)]
fn fifth(high: u32, i: usize) -> u8 {
    ((high >> i & 1) << 4) as u8
}

/// Low nibbles are values 0 to 15, high ones 16 to 31.
#[inline(always)]
fn halves(bytes: &[u8], out: &mut [f32; 32], value: impl Fn(u8, usize) -> f32) {
    let bytes = &bytes.as_chunks::<16>().0[0];
    for i in 0..16 {
        out[i] = value(bytes[i] & 15, i);
        out[16 + i] = value(bytes[i] >> 4, 16 + i);
    }
}

/// Low nibbles are the first half of the codes, high ones the second.
#[inline(always)]
fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(bytes.len());
    for i in 0..bytes.len() {
        low[i] = bytes[i] & 15;
        high[i] = bytes[i] >> 4;
    }
}

/// Bit `i` of 32 is the fifth bit of code `i`.
#[inline(always)]
fn fifth_bits(bytes: &[u8], codes: &mut [u8]) {
    for (i, c) in codes.iter_mut().enumerate() {
        *c |= (bytes[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// Two bits each: every 32 bytes hold 128 codes, 32 of them in each pair of bits.
#[inline(always)]
fn pairs(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in bytes.chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
        for (shift, codes) in codes.chunks_exact_mut(32).enumerate() {
            for i in 0..32 {
                codes[i] = bytes[i] >> (2 * shift) & 3;
            }
        }
    }
}

/// Bit `p` of byte `i` adds `value` to code `32 p + i`.
#[inline(always)]
fn plane(bytes: &[u8], codes: &mut [u8], value: u8) {
    for (p, codes) in codes.chunks_exact_mut(32).enumerate() {
        for i in 0..32 {
            codes[i] |= (bytes[i] >> p & 1) * value;
        }
    }
}

/// Codes of `bits` bits, the lowest bits first.
#[inline(always)]
pub fn unpack_bits(bytes: &[u8], bits: u8, codes: &mut [u8]) {
    match bits {
        1 => unpack_width::<1>(bytes, codes),
        2 => unpack_width::<2>(bytes, codes),
        3 => unpack_width::<3>(bytes, codes),
        4 => unpack_width::<4>(bytes, codes),
        5 => unpack_width::<5>(bytes, codes),
        6 => unpack_width::<6>(bytes, codes),
        7 => unpack_width::<7>(bytes, codes),
        _ => codes.copy_from_slice(&bytes[..codes.len()]),
    }
}

/// Eight codes take `BITS` whole bytes.
#[inline(always)]
fn unpack_width<const BITS: usize>(bytes: &[u8], codes: &mut [u8]) {
    let mask = (1u64 << BITS) - 1;
    for (bytes, codes) in bytes.chunks_exact(BITS).zip(codes.chunks_exact_mut(8)) {
        let mut word = 0u64;
        for i in 0..BITS {
            word |= u64::from(bytes[i]) << (8 * i);
        }
        for i in 0..8 {
            codes[i] = (word >> (i * BITS) & mask) as u8;
        }
    }
}

/// Writes a block.
pub fn write(grid: Grid, b: &Block, codes: &[u8], out: &mut [u8]) {
    out.fill(0);
    let (d, m) = (b.d.to_le_bytes(), b.m.to_le_bytes());
    match grid {
        Grid::Int { .. } | Grid::Levels { .. } => {
            let bits = if let Grid::Int { bits, .. } = grid { bits } else { b.table.map_or(8, Table::bits) };
            let after = if grid.is_by_row() {
                out[..4].copy_from_slice(&b.scale[0].to_le_bytes());
                4
            } else {
                out[..2].copy_from_slice(&d);
                2
            };
            match grid {
                Grid::Int { zero: Zero::Minimum, .. } => out[after..after + 2].copy_from_slice(&m),
                Grid::Int { zero: Zero::Point, .. } => out[after] = b.mins[0],
                _ => {}
            }
            pack_bits(codes, bits, &mut out[grid.header_bytes()..]);
        }
        Grid::Mxfp4 => {
            out[0] = b.d as u8;
            pack_nibbles(codes, &mut out[1..]);
        }
        Grid::Iq4Xs => {
            out[..2].copy_from_slice(&d);
            let mut high = 0u16;
            for s in 0..8 {
                let step = (b.steps[s] + 32) as u8;
                out[4 + s / 2] |= (step & 15) << (4 * (s % 2));
                high |= u16::from(step >> 4) << (2 * s);
            }
            out[2..4].copy_from_slice(&high.to_le_bytes());
            codes.chunks_exact(32).zip(out[8..].chunks_exact_mut(16)).for_each(|(c, o)| pack_nibbles(c, o));
        }
        Grid::Nvfp4 => {
            (0..4).for_each(|s| out[s] = b.steps[s] as u8);
            codes.chunks_exact(16).zip(out[4..].chunks_exact_mut(8)).for_each(|(c, o)| pack_nibbles(c, o));
        }
        Grid::Tq1 => {
            spans::pack_trits(&codes[..160], 5, &mut out[..32]);
            spans::pack_trits(&codes[160..240], 5, &mut out[32..48]);
            spans::pack_trits(&codes[240..], 4, &mut out[48..52]);
            out[52..].copy_from_slice(&d);
        }
        Grid::Tq2 => {
            pack_pairs(codes, &mut out[..64]);
            out[64..].copy_from_slice(&d);
        }
        Grid::Iq1S | Grid::Iq1M | Grid::Iq2Xxs | Grid::Iq2Xs | Grid::Iq2S | Grid::Iq3Xxs | Grid::Iq3S => {
            spans::write(grid, b, codes, out);
        }
        Grid::Q4_0 | Grid::Iq4Nl => {
            out[..2].copy_from_slice(&d);
            pack_nibbles(codes, &mut out[2..]);
        }
        Grid::Q4_1 => {
            out[..2].copy_from_slice(&d);
            out[2..4].copy_from_slice(&m);
            pack_nibbles(codes, &mut out[4..]);
        }
        Grid::Q5_0 => {
            out[..2].copy_from_slice(&d);
            pack_nibbles(codes, &mut out[6..]);
            pack_fifth(codes, &mut out[2..6]);
        }
        Grid::Q5_1 => {
            out[..2].copy_from_slice(&d);
            out[2..4].copy_from_slice(&m);
            pack_nibbles(codes, &mut out[8..]);
            pack_fifth(codes, &mut out[4..8]);
        }
        Grid::Q8_0 => {
            out[..2].copy_from_slice(&d);
            out[2..].iter_mut().zip(codes).for_each(|(o, c)| *o = c ^ 0x80);
        }
        Grid::Q2K => {
            for s in 0..16 {
                out[s] = b.steps[s] as u8 | b.mins[s] << 4;
            }
            pack_pairs(codes, &mut out[16..80]);
            out[80..82].copy_from_slice(&d);
            out[82..84].copy_from_slice(&m);
        }
        Grid::Q3K => {
            pack_plane(codes, 4, &mut out[..32]);
            pack_pairs(codes, &mut out[32..96]);
            for s in 0..16 {
                let step = (b.steps[s] + 32) as u8;
                out[96 + s % 8] |= (step & 15) << (4 * (s / 8));
                out[104 + s % 4] |= (step >> 4) << (2 * (s / 4));
            }
            out[108..].copy_from_slice(&d);
        }
        Grid::Q4K | Grid::Q5K => {
            out[..2].copy_from_slice(&d);
            out[2..4].copy_from_slice(&m);
            pack_six_bits(b, &mut out[4..16]);
            let at = if grid == Grid::Q5K { 48 } else { 16 };
            let low: Vec<u8> = codes.iter().map(|c| c & 15).collect();
            low.chunks_exact(64).zip(out[at..].chunks_exact_mut(32)).for_each(|(c, o)| pack_nibbles(c, o));
            if grid == Grid::Q5K {
                pack_plane(codes, 16, &mut out[16..48]);
            }
        }
        Grid::Q6K => {
            pack_q6(codes, out);
            for s in 0..16 {
                out[192 + s] = b.steps[s] as u8;
            }
            out[208..].copy_from_slice(&d);
        }
    }
}

fn pack_nibbles(codes: &[u8], out: &mut [u8]) {
    let half = codes.len() / 2;
    for i in 0..half {
        out[i] = codes[i] & 15 | (codes[half + i] & 15) << 4;
    }
}

fn pack_fifth(codes: &[u8], out: &mut [u8]) {
    for (i, c) in codes.iter().enumerate() {
        out[i / 8] |= (c >> 4 & 1) << (i % 8);
    }
}

fn pack_pairs(codes: &[u8], out: &mut [u8]) {
    for (codes, out) in codes.chunks_exact(128).zip(out.chunks_exact_mut(32)) {
        for (i, c) in codes.iter().enumerate() {
            out[i % 32] |= (c & 3) << (2 * (i / 32));
        }
    }
}

fn pack_plane(codes: &[u8], value: u8, out: &mut [u8]) {
    for (i, c) in codes.iter().enumerate() {
        out[i % 32] |= u8::from(c & value != 0) << (i / 32);
    }
}

fn pack_six_bits(b: &Block, out: &mut [u8]) {
    for s in 0..4 {
        let (low, high) = (b.steps[s] as u8, b.steps[s + 4] as u8);
        out[s] = low | (high >> 4) << 6;
        out[s + 4] = b.mins[s] | (b.mins[s + 4] >> 4) << 6;
        out[s + 8] = high & 15 | (b.mins[s + 4] & 15) << 4;
    }
}

fn pack_q6(codes: &[u8], out: &mut [u8]) {
    for half in 0..2 {
        let codes = &codes[half * 128..half * 128 + 128];
        for i in 0..32 {
            let (a, b, c, d) = (codes[i], codes[i + 32], codes[i + 64], codes[i + 96]);
            out[half * 64 + i] = a & 15 | (c & 15) << 4;
            out[half * 64 + 32 + i] = b & 15 | (d & 15) << 4;
            out[128 + half * 32 + i] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6;
        }
    }
}

pub fn pack_bits(codes: &[u8], bits: u8, out: &mut [u8]) {
    for (codes, out) in codes.chunks_exact(8).zip(out.chunks_exact_mut(bits.into())) {
        let mut word = 0u64;
        for (i, c) in codes.iter().enumerate() {
            word |= u64::from(*c) << (i * usize::from(bits));
        }
        out.copy_from_slice(&word.to_le_bytes()[..bits.into()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_float_widens_as_half_says() {
        for bits in 0..=u16::MAX {
            let (got, want) = (widen(bits), half::f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x} {got} {want}");
        }
    }
}
