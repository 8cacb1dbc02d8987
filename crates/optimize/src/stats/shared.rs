//! Statistics that ranks share out: each sums what some of the matrices read, and the first of them gets all sums. No sum is cut,
//! so their number changes no bit.

use crate::{Error, Result, Stats};
use model::Site;
use std::collections::BTreeMap;
use tensor::ops::{Gram, Squares};
use train::ranks::{self, Ranks};

/// Numbers that travel at once.
const PIECE: usize = 1 << 22;

/// What all ranks summed, on the first one; the others keep what is theirs of `sites` ([`ranks::share`]).
///
/// # Errors
/// If a rank failed, or is at another place.
pub fn collect(mut own: BTreeMap<Site, Stats>, sites: &[Site], ranks: &dyn Ranks) -> Result<BTreeMap<Site, Stats>> {
    if ranks.size() == 1 {
        return Ok(own);
    }
    // From here on nobody fails, so that nobody waits in vain.
    ranks::meet(ranks, &[])?;
    for (tag, site) in sites.iter().enumerate() {
        let owner = ranks::owner(tag, sites.len(), ranks.size());
        if ranks.rank() == 0 && owner != 0 {
            let stats = take(owner, tag, ranks)?;
            if !stats.is_empty() {
                own.insert(*site, stats);
            }
        } else if ranks.rank() == owner && owner != 0 {
            // What is only looked up has no sums, which is said as well.
            give(own.get(site).unwrap_or(&Stats::default()), tag, ranks)?;
        }
    }
    Ok(own)
}

/// Second moments, squares and peaks, each after their count: none where they were not asked for.
fn give(stats: &Stats, tag: usize, ranks: &dyn Ranks) -> Result<()> {
    let gram = stats.gram.as_ref().map(|g| [vec![g.rows() as f64, g.cols() as f64], g.lower()].concat());
    let squares = stats.squares.as_ref().map(|s| [&[s.rows() as f64], s.sums()].concat());
    let peak = stats.peak.as_ref().map(|p| p.iter().map(|v| f64::from(*v)).collect());
    for numbers in [gram, squares, peak].map(Option::unwrap_or_default) {
        ranks.send(0, tag, (numbers.len() as u64).to_ne_bytes().to_vec())?;
        for piece in numbers.chunks(PIECE) {
            ranks.send(0, tag, piece.iter().flat_map(|v| v.to_ne_bytes()).collect())?;
        }
    }
    Ok(())
}

fn take(from: usize, tag: usize, ranks: &dyn Ranks) -> Result<Stats> {
    let part = || -> Result<Vec<f64>> {
        let count = ranks.receive(from, tag)?;
        let count = count.as_chunks().0.first().map_or(0, |b| u64::from_ne_bytes(*b)) as usize;
        let mut numbers = Vec::new();
        while numbers.len() < count {
            let piece = ranks.receive(from, tag)?;
            if piece.len() < size_of::<f64>() {
                return Err(Error::Train(ranks::gone()));
            }
            numbers.extend(piece.as_chunks().0.iter().map(|b| f64::from_ne_bytes(*b)));
        }
        Ok(numbers)
    };
    let [gram, squares, peak] = [part()?, part()?, part()?];
    let gram = match &gram[..] {
        [rows, cols, lower @ ..] => {
            Some(Gram::from_lower(*cols as usize, *rows as usize, lower).ok_or(Error::Train(ranks::gone()))?)
        }
        _ => None,
    };
    let squares = squares.split_first().map(|(rows, sums)| Squares::from_sums(*rows as usize, sums.to_vec()));
    let peak = (!peak.is_empty()).then(|| peak.iter().map(|v| *v as f32).collect());
    Ok(Stats { gram, squares, peak, ..Stats::default() })
}
