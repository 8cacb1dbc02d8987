//! Entropy coding of codes: each takes about as many bits as its being there tells, by asymmetric numeral systems (rANS, Duda,
//! arXiv 1311.2540), with the frequencies of the matrix.
//!
//! A coded matrix is, little-endian: how often each code is there, in 4096ths (`u16` each); the length of each run of [`ROWS`] rows in
//! words (`u32` each); what the rows hold beside codes, row by row; then the runs. Four numbers take turns in a run, so that reading
//! does not wait for one: they begin it, and words of 16 bits follow.

use crate::{Bytes, Storage, Stored, Weight, WeightError, grid::Grid};
use rayon::prelude::*;

/// Rows of a run, which is read by itself.
const ROWS: usize = 64;
/// Bits of a frequency.
const BITS: u32 = 12;
/// What all frequencies are together.
const WHOLE: usize = 1 << BITS;
/// Numbers that take turns.
const TURNS: usize = 4;
/// Numbers are at least this, before a word is read or after one is written.
const LEAST: u32 = 1 << 16;
/// A matrix is at most so many times as long as what it is read from: more is no matrix, but an attack.
const MOST: usize = 64;

/// Why bytes are no coded matrix.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum EntropyError {
    /// The storage has no codes of this kind.
    #[error("{0} has no codes to be entropy-coded")]
    Storage(Storage),
    /// They are cut short, or say what cannot be.
    #[error("the entropy-coded bytes are damaged: {0}")]
    Damaged(&'static str),
    /// What came out is no matrix.
    #[error(transparent)]
    Weight(#[from] WeightError),
}

/// The codes of a row, and what else there is.
#[derive(Clone, Copy)]
struct Layout {
    storage: Storage,
    grid: Grid,
    cols: usize,
    /// Bytes that are no codes.
    plain: usize,
    /// Codes, those that fill up included.
    codes: usize,
}

impl Layout {
    fn of(storage: Storage, cols: usize) -> Option<Layout> {
        let (Storage::Grid(grid @ (Grid::Int { .. } | Grid::Levels { .. })), true) =
            (storage.dense(), storage.fits(cols))
        else {
            return None;
        };
        let bits = usize::from(grid.code_bits());
        let codes = match storage {
            Storage::Sparse(sparse) => sparse.pattern().kept(cols).next_multiple_of(8),
            _ => cols.next_multiple_of(grid.block_len_in(cols)),
        };
        Some(Layout { storage, grid, cols, plain: storage.row_bytes(cols) - codes * bits / 8, codes })
    }

    /// Of each block of a row what lies before its codes, the bytes of these, and how many they are.
    fn each<'a>(&self, row: &'a [u8]) -> impl Iterator<Item = (&'a [u8], &'a [u8], usize)> + use<'a> {
        let bits = usize::from(self.grid.code_bits());
        let (header, len) = match self.storage {
            Storage::Sparse(_) => (self.plain, self.codes),
            _ => (self.grid.header_bytes(), self.grid.block_len_in(self.cols)),
        };
        row.chunks_exact((header + len * bits / 8).max(1)).map(move |block| {
            let (plain, codes) = block.split_at(header);
            (plain, codes, len)
        })
    }

    fn split(&self, row: &[u8], plain: &mut Vec<u8>, codes: &mut Vec<u8>) {
        for (header, bytes, len) in self.each(row) {
            plain.extend_from_slice(header);
            let from = codes.len();
            codes.resize(from + len, 0);
            crate::grid::unpack_bits(bytes, self.grid.code_bits(), &mut codes[from..]);
        }
    }

    fn join(&self, mut plain: &[u8], mut codes: &[u8], row: &mut [u8]) {
        let bits = usize::from(self.grid.code_bits());
        let (header, len) = match self.storage {
            Storage::Sparse(_) => (self.plain, self.codes),
            _ => (self.grid.header_bytes(), self.grid.block_len_in(self.cols)),
        };
        for block in row.chunks_exact_mut((header + len * bits / 8).max(1)) {
            let (before, bytes) = block.split_at_mut(header);
            before.copy_from_slice(&plain[..header]);
            plain = &plain[header..];
            match bits {
                8 => bytes.copy_from_slice(&codes[..len]),
                _ => crate::grid::pack_bits(&codes[..len], bits as u8, bytes),
            }
            codes = &codes[len..];
        }
    }
}

/// Codes a matrix; `None` where its storage has no codes of this kind, or it would gain nothing.
pub fn pack(weight: &Weight) -> Option<Vec<u8>> {
    let (stored, layout) = (weight.stored()?, Layout::of(weight.storage(), weight.cols())?);
    let runs: Vec<(Vec<u8>, Vec<u8>)> = runs(stored)
        .map(|rows| {
            let (mut plain, mut codes) = (Vec::new(), Vec::new());
            rows.for_each(|row| layout.split(stored.row(row), &mut plain, &mut codes));
            (plain, codes)
        })
        .collect();
    let mut counts = vec![0u64; 1 << layout.grid.code_bits()];
    runs.iter().for_each(|(_, codes)| codes.iter().for_each(|c| counts[usize::from(*c)] += 1));
    let frequencies = shares(&counts);
    let starts = starts(&frequencies);
    let streams: Vec<Vec<u16>> = runs.par_iter().map(|(_, codes)| write(codes, &frequencies, &starts)).collect();
    let mut out: Vec<u8> = frequencies.iter().flat_map(|f| f.to_le_bytes()).collect();
    out.extend(streams.iter().flat_map(|s| (s.len() as u32).to_le_bytes()));
    runs.iter().for_each(|(plain, _)| out.extend_from_slice(plain));
    streams.iter().flatten().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
    let whole = weight.size_bytes();
    (out.len() < whole && whole <= MOST * out.len()).then_some(out)
}

/// Reads a matrix back.
///
/// # Errors
/// If the bytes are no matrix of that shape.
pub fn unpack(storage: Storage, rows: usize, cols: usize, bytes: &[u8]) -> Result<Weight, EntropyError> {
    let layout = Layout::of(storage, cols).ok_or(EntropyError::Storage(storage))?;
    let width = storage.row_bytes(cols);
    let damaged = EntropyError::Damaged;
    if width.checked_mul(rows).is_none_or(|whole| whole > MOST * bytes.len()) {
        return Err(damaged("they are too few for so large a matrix"));
    }
    let symbols = 1usize << layout.grid.code_bits();
    let (head, rest) = bytes.split_at_checked(2 * symbols).ok_or(damaged("the frequencies are cut short"))?;
    let frequencies: Vec<u16> = head.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
    if frequencies.iter().map(|f| usize::from(*f)).sum::<usize>() != WHOLE {
        return Err(damaged("the frequencies are not a whole"));
    }
    let table = Table::of(&frequencies);
    let short = || damaged("the runs are cut short");
    let (lengths, rest) = rest.split_at_checked(4 * rows.div_ceil(ROWS)).ok_or_else(short)?;
    let (plain, mut rest) = rest.split_at_checked(layout.plain * rows).ok_or_else(short)?;
    let mut streams = Vec::new();
    for length in lengths.as_chunks::<4>().0 {
        let length = (u32::from_le_bytes(*length) as usize).checked_mul(2).ok_or_else(short)?;
        let (stream, after) = rest.split_at_checked(length).ok_or_else(short)?;
        streams.push(stream);
        rest = after;
    }
    if !rest.is_empty() {
        return Err(damaged("something follows the last run"));
    }
    let mut out = vec![0u8; rows * width];
    let whole = out.par_chunks_mut((ROWS * width).max(1)).zip(streams).enumerate().map(|(run, (out, stream))| {
        let count = out.len() / width.max(1);
        let codes = read(stream, &table, count * layout.codes)?;
        let plain = &plain[run * ROWS * layout.plain..][..count * layout.plain];
        for (r, row) in out.chunks_exact_mut(width).enumerate() {
            let own = &plain[r * layout.plain..(r + 1) * layout.plain];
            layout.join(own, &codes[r * layout.codes..(r + 1) * layout.codes], row);
        }
        Some(())
    });
    if whole.collect::<Vec<_>>().contains(&None) {
        return Err(damaged("a run does not end where it should"));
    }
    Ok(Weight::new(storage, rows, cols, Bytes::from_vec(out))?)
}

fn runs(stored: &Stored) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
    (0..stored.rows()).step_by(ROWS).map(|first| first..stored.rows().min(first + ROWS))
}

/// Counts in 4096ths: what is there at all has one at least.
fn shares(counts: &[u64]) -> Vec<u16> {
    let all = counts.iter().sum::<u64>().max(1);
    let mut shares: Vec<u16> = counts
        .iter()
        .map(|c| if *c == 0 { 0 } else { ((*c as u128 * WHOLE as u128 / u128::from(all)) as u16).max(1) })
        .collect();
    if counts.iter().all(|c| *c == 0) {
        shares[0] = 1;
    }
    // What is left over, or too much, goes to the most frequent, where it matters least.
    loop {
        let sum: usize = shares.iter().map(|s| usize::from(*s)).sum();
        let most = (0..shares.len()).max_by_key(|i| (shares[*i], usize::MAX - i)).unwrap_or(0);
        match sum.cmp(&WHOLE) {
            std::cmp::Ordering::Equal => return shares,
            std::cmp::Ordering::Less => shares[most] += (WHOLE - sum) as u16,
            std::cmp::Ordering::Greater => shares[most] -= 1,
        }
    }
}

/// Where each code's share begins.
fn starts(frequencies: &[u16]) -> Vec<u32> {
    let mut sum = 0;
    let next = |f: &u16| {
        sum += u32::from(*f);
        sum - u32::from(*f)
    };
    frequencies.iter().map(next).collect()
}

/// A run: its words in the order in which they are read.
fn write(codes: &[u8], frequencies: &[u16], starts: &[u32]) -> Vec<u16> {
    let mut numbers = [LEAST; TURNS];
    let mut words = Vec::with_capacity(codes.len() / 4 + 2 * TURNS);
    for (i, code) in codes.iter().enumerate().rev() {
        let number = &mut numbers[i % TURNS];
        let frequency = u32::from(frequencies[usize::from(*code)]);
        // After a code a number is as many times as large as the code is rare.
        if u64::from(*number) >= u64::from(frequency) << (32 - BITS) {
            words.push(*number as u16);
            *number >>= 16;
        }
        *number = ((*number / frequency) << BITS) + *number % frequency + starts[usize::from(*code)];
    }
    for number in numbers.iter().rev() {
        words.push((number >> 16) as u16);
        words.push(*number as u16);
    }
    words.reverse();
    words
}

/// What each place in the whole belongs to.
struct Table {
    code: Vec<u8>,
    frequency: Vec<u16>,
    /// The place in the code's own share.
    place: Vec<u16>,
}

impl Table {
    fn of(frequencies: &[u16]) -> Table {
        let mut table = Table { code: Vec::new(), frequency: Vec::new(), place: Vec::new() };
        for (code, frequency) in frequencies.iter().enumerate() {
            for place in 0..*frequency {
                table.code.push(code as u8);
                table.frequency.push(*frequency);
                table.place.push(place);
            }
        }
        table
    }
}

/// The codes of a run; `None` where it is none.
fn read(stream: &[u8], table: &Table, count: usize) -> Option<Vec<u8>> {
    let mut words = stream.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
    let mut numbers = [0u32; TURNS];
    for number in &mut numbers {
        let (low, high) = (words.next()?, words.next()?);
        *number = u32::from(high) << 16 | u32::from(low);
    }
    let mut codes = vec![0u8; count];
    for codes in codes.chunks_mut(TURNS) {
        for (code, number) in codes.iter_mut().zip(&mut numbers) {
            let at = (*number as usize) % WHOLE;
            *code = table.code[at];
            *number = u32::from(table.frequency[at]) * (*number >> BITS) + u32::from(table.place[at]);
            if *number < LEAST {
                *number = *number << 16 | u32::from(words.next()?);
            }
        }
    }
    (words.next().is_none() && numbers == [LEAST; TURNS]).then_some(codes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tensor;

    fn normal(rows: usize, cols: usize) -> Tensor {
        let mut s = 88172645463325252u64;
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        Tensor::from_vec(rows, cols, (0..rows * cols).map(|_| next() + next() + next() + next()).collect())
    }

    const NAMES: [&str; 7] =
        ["int4g128", "palette4g64", "int8", "int3g32a", "palette4g32@2:4", "palette1g32", "int4g32@62.5%"];

    #[test]
    fn what_is_read_is_what_was_written_near_the_entropy() {
        for name in NAMES {
            let w = Weight::encode(&normal(150, 256), Storage::parse(name).unwrap(), None).unwrap();
            let Some(bytes) = pack(&w) else {
                assert!(name == "palette1g32", "{name}");
                continue;
            };
            let again = unpack(w.storage(), 150, 256, &bytes).unwrap();
            assert!(again.bytes()[..] == w.bytes()[..], "{name}");
            // Without what is beside the codes, and the codes that fill up.
            let layout = Layout::of(w.storage(), 256).unwrap();
            if let (Some(entropy), Storage::Grid(_)) = (w.code_entropy(), w.storage()) {
                let bound = entropy * (150 * 256) as f64 / 8.0 + (150 * layout.plain) as f64;
                println!("{name}: {} bytes, {:.0} at the least, {} whole", bytes.len(), bound, w.size_bytes());
                assert!((bytes.len() as f64) < 1.01 * bound + 600.0, "{name}: {} {bound}", bytes.len());
            }
        }
    }

    #[test]
    fn all_alike_and_damage() {
        let storage = Storage::parse("int4g32").unwrap();
        let w = Weight::encode(&normal(70, 64), storage, None).unwrap();
        let bytes = pack(&w).unwrap();
        for wrong in [0, 10, bytes.len() / 2, bytes.len() - 1] {
            assert!(unpack(storage, 70, 64, &bytes[..wrong]).is_err(), "{wrong}");
        }
        for at in (0..bytes.len()).step_by(37) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x11;
            // Nothing panics; what is beside the codes may be anything.
            let _ = unpack(storage, 70, 64, &damaged);
        }
        assert!(unpack(storage, 1 << 40, 64, &bytes).is_err());
        assert!(unpack(Storage::Bf16, 70, 64, &bytes).is_err());
        // One code alone costs nothing; a storage that is told 64 times as long as its bytes is refused.
        let flat = Weight::encode(&Tensor::zeros(64, 1024), Storage::parse("int8").unwrap(), None).unwrap();
        assert!(pack(&flat).is_none());
    }
}
