//! Palettes: tables whose levels a matrix has chosen for itself.
//!
//! Levels are whole numbers of -127 to 127, so kernels look them up as they are. A palette lives as long as the process: there is one
//! of each, however many matrices have it, and a storage that names it stays a plain number.

use super::Table;
use std::{
    cmp::Ordering,
    collections::BTreeMap,
    hash::{Hash, Hasher},
    sync::{Mutex, OnceLock, PoisonError},
};

/// Rising levels, as many as a code has values.
#[derive(Debug)]
pub struct Palette {
    whole: Vec<i8>,
    floats: Vec<f32>,
    bytes: [u8; 16],
}

impl Palette {
    /// The levels.
    pub fn levels(&self) -> &[i8] {
        &self.whole
    }

    pub(super) fn floats(&self) -> &[f32] {
        &self.floats
    }

    /// The levels plus 128, as many as fit.
    pub(super) fn bytes(&self) -> &[u8; 16] {
        &self.bytes
    }

    /// Bits of a code.
    pub(super) fn bits(&self) -> u8 {
        self.whole.len().trailing_zeros() as u8
    }
}

impl PartialEq for Palette {
    fn eq(&self, other: &Palette) -> bool {
        self.whole == other.whole
    }
}

impl Eq for Palette {}

impl Hash for Palette {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.whole.hash(state);
    }
}

impl PartialOrd for Palette {
    fn partial_cmp(&self, other: &Palette) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Palette {
    fn cmp(&self, other: &Palette) -> Ordering {
        self.whole.cmp(&other.whole)
    }
}

static ALL: Mutex<BTreeMap<Vec<i8>, &'static Palette>> = Mutex::new(BTreeMap::new());

impl Table {
    /// The palette of these levels: 2, 4, 8 ... 256 that do not fall, the first below the last.
    pub fn palette(levels: &[i8]) -> Option<Table> {
        let count = levels.len();
        let rising = levels.is_sorted() && levels.first() < levels.last() && !levels.contains(&i8::MIN);
        if !count.is_power_of_two() || !(2..=256).contains(&count) || !rising {
            return None;
        }
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        let palette = all.entry(levels.to_vec()).or_insert_with(|| {
            let floats = levels.iter().map(|l| f32::from(*l)).collect();
            let bytes = std::array::from_fn(|i| levels.get(i).map_or(128, |l| l.cast_unsigned() ^ 0x80));
            Box::leak(Box::new(Palette { whole: levels.to_vec(), floats, bytes }))
        });
        Some(Table::Own(palette))
    }

    /// The palette of so many bits (1 to 8) whose levels are nearest to numbers of a normal distribution, of which the largest
    /// is 127: where no matrix has chosen yet.
    pub fn normal_palette(bits: u8) -> Option<Table> {
        static NORMAL: [OnceLock<Option<Table>>; 9] = [const { OnceLock::new() }; 9];
        let of_bits = |bits: u8| {
            // The largest of a group is some three deviations off.
            let bins: Vec<(f64, f64)> = (-508i32..=508)
                .map(|i| {
                    let x = f64::from(i) / 4.0;
                    (x, (-0.5 * (x / 42.0).powi(2)).exp())
                })
                .collect();
            let mut levels: Vec<i8> = means(&bins, 1 << bits).into_iter().map(|l| l.round() as i8).collect();
            levels.sort_unstable();
            Table::palette(&levels)
        };
        if (1..=8).contains(&bits) { *NORMAL[usize::from(bits)].get_or_init(|| of_bits(bits)) } else { None }
    }
}

/// The `count` means of numbers with weights, given in rising order, from which these are nearest in the mean of squares: the best
/// there are, by dynamic programming over where one cluster ends (Wu, 1991; Wang and Song, 2011). Fewer numbers than means are
/// each their own, the last one often.
pub fn means(numbers: &[(f64, f64)], count: usize) -> Vec<f64> {
    let numbers: Vec<(f64, f64)> = numbers.iter().copied().filter(|(_, weight)| *weight > 0.0).collect();
    if numbers.len() <= count {
        let last = numbers.last().map_or(0.0, |n| n.0);
        return (0..count).map(|i| numbers.get(i).map_or(last, |n| n.0)).collect();
    }
    let n = numbers.len();
    // Sums of weights, of numbers and of their squares up to each place.
    let mut sums = vec![[0f64; 3]; n + 1];
    for (i, (x, w)) in numbers.iter().enumerate() {
        sums[i + 1] = [sums[i][0] + w, sums[i][1] + w * x, sums[i][2] + w * x * x];
    }
    let of = |from: usize, to: usize| -> [f64; 3] { std::array::from_fn(|k| sums[to][k] - sums[from][k]) };
    let cost = |from: usize, to: usize| {
        let [w, x, xx] = of(from, to);
        (xx - x * x / w).max(0.0)
    };
    let mut best: Vec<f64> = (0..=n).map(|to| if to == 0 { 0.0 } else { cost(0, to) }).collect();
    let mut ends = Vec::with_capacity(count);
    for clusters in 2..=count {
        let mut next = vec![f64::INFINITY; n + 1];
        let mut from = vec![0usize; n + 1];
        // Where the last cluster begins does not fall as its end rises, which halves the work again and again.
        let mut open = vec![(clusters, n, clusters - 1, n - 1)];
        while let Some((low, high, least, most)) = open.pop() {
            if low > high {
                continue;
            }
            let to = low.midpoint(high);
            for begin in least..=most.min(to - 1) {
                let whole = best[begin] + cost(begin, to);
                if whole < next[to] {
                    (next[to], from[to]) = (whole, begin);
                }
            }
            open.push((low, to - 1, least, from[to]));
            open.push((to + 1, high, from[to], most));
        }
        best = next;
        ends.push(from);
    }
    let (mut to, mut out) = (n, vec![0.0; count]);
    for k in (0..count).rev() {
        let from = if k == 0 { 0 } else { ends[k - 1][to] };
        let [w, x, _] = of(from, to);
        out[k] = x / w;
        to = from;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Storage, Tensor, Weight, grid::Grid};

    #[test]
    fn the_means_are_the_best_there_are() {
        let numbers: Vec<(f64, f64)> = [-9.0, -8.5, -1.0, 0.0, 0.2, 3.0, 3.1, 8.0]
            .iter()
            .enumerate()
            .map(|(i, x)| (*x, 1.0 + (i % 3) as f64))
            .collect();
        let lost = |means: &[f64]| -> f64 {
            let nearest = |x: f64| means.iter().map(|m| (x - m).powi(2)).fold(f64::INFINITY, f64::min);
            numbers.iter().map(|(x, w)| w * nearest(*x)).sum()
        };
        let found = lost(&means(&numbers, 3));
        // Every way to cut eight numbers in three.
        let mut least = f64::INFINITY;
        for a in 1..7 {
            for b in a + 1..8 {
                let mean = |part: &[(f64, f64)]| {
                    part.iter().map(|(x, w)| w * x).sum::<f64>() / part.iter().map(|p| p.1).sum::<f64>()
                };
                least = least.min(lost(&[mean(&numbers[..a]), mean(&numbers[a..b]), mean(&numbers[b..])]));
            }
        }
        assert!((found - least).abs() < 1e-9, "{found} {least}");
        assert_eq!(means(&numbers[..2], 4), [-9.0, -8.5, -8.5, -8.5]);
    }

    #[test]
    fn palettes_are_storages_like_others() {
        assert!(Table::palette(&[1, 2, 3]).is_none() && Table::palette(&[3, 1]).is_none());
        assert!(Table::palette(&[5, 5]).is_none() && Table::palette(&[-128, 5]).is_none());
        let x = Tensor::from_vec(6, 96, (0..576).map(|i| (i as f32 * 0.7).sin()).collect());
        let mut before = f32::INFINITY;
        for bits in 1..=8 {
            let table = Table::normal_palette(bits).unwrap();
            let storage = Storage::Grid(Grid::Levels { table, group: 32 });
            assert_eq!(Storage::parse(&storage.name()).unwrap(), storage);
            assert_eq!(Storage::parse(&storage.full_name()).unwrap(), storage);
            let y = Weight::encode(&x, storage, None).unwrap().to_tensor();
            let worst = x.as_slice().iter().zip(y.as_slice()).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst < before * if bits > 6 { 1.01 } else { 0.8 }, "{bits} {worst} {before}");
            before = worst;
        }
        let own = Storage::parse("palette2(-127,-3,9,100)").unwrap();
        assert_eq!((own.name(), own.full_name()), ("palette2".into(), "palette2(-127,-3,9,100)".into()));
        for wrong in ["palette9", "palette2(1,2)", "palette1(5,5)", "palette1(a,b)", "palette0"] {
            assert!(Storage::parse(wrong).is_err(), "{wrong}");
        }
    }
}
