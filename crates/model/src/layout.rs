//! Between stored tensors and sites: cutting, permuting and joining along the outputs.
//!
//! Vectors (norm scales, biases) pass through as matrices of one column.

use crate::families::{Layout, Stored};
use tensor::Weight;

/// Cuts a stored tensor into the parameters of its sites.
///
/// `rows` holds the outputs of each site, `head_dim` the width of a head. `Err` says what is wrong.
pub fn split(stored: &Stored, tensor: Weight, rows: &[usize], head_dim: usize) -> Result<Vec<Weight>, String> {
    let tensor = match stored.layout {
        Layout::Columns => tensor.transposed().ok_or("cannot be transposed: its rows are blocks of codes")?,
        _ => tensor,
    };
    let total: usize = rows.iter().sum();
    if tensor.rows() != total {
        return Err(format!("has {} outputs where the configuration asks for {total}", tensor.rows()));
    }
    match stored.layout {
        Layout::HeadByHead => {
            let parts = rows.len();
            Ok((0..parts).map(|part| tensor.select_rows(&interleaved(part, parts, rows[part], head_dim))).collect())
        }
        Layout::Adjacent => Ok(vec![tensor.select_rows(&adjacent(total, head_dim, Direction::FromFile))]),
        Layout::MinusOne => Ok(vec![shift(&tensor, 1.0)]),
        Layout::Rows | Layout::Columns => {
            let mut from = 0;
            let cut = |n: &usize| {
                from += n;
                tensor.row_range(from - n, from).ok_or_else(|| "is shorter than its shape says".to_string())
            };
            rows.iter().map(cut).collect()
        }
    }
}

/// Joins the parameters of the sites of a stored tensor: the inverse of [`split`].
pub fn join(stored: &Stored, parts: &[Weight], head_dim: usize) -> Result<Weight, String> {
    let joined = Weight::concat_rows(parts).ok_or("the sites that share this tensor are stored in different ways")?;
    match stored.layout {
        Layout::Rows => Ok(joined),
        Layout::Columns => {
            joined.transposed().ok_or_else(|| "cannot be transposed: its rows are blocks of codes".into())
        }
        Layout::MinusOne => Ok(shift(&joined, -1.0)),
        Layout::Adjacent => Ok(joined.select_rows(&adjacent(joined.rows(), head_dim, Direction::ToFile))),
        Layout::HeadByHead => {
            let per = parts[0].rows();
            let (heads, count) = (per / head_dim, parts.len());
            let order: Vec<usize> = (0..heads)
                .flat_map(|h| (0..count).flat_map(move |p| (0..head_dim).map(move |c| p * per + h * head_dim + c)))
                .collect();
            Ok(joined.select_rows(&order))
        }
    }
}

/// Rows of the fused tensor that hold `part`, head by head.
fn interleaved(part: usize, parts: usize, rows: usize, head_dim: usize) -> Vec<usize> {
    (0..rows).map(|r| (r / head_dim * parts + part) * head_dim + r % head_dim).collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Direction {
    FromFile,
    ToFile,
}

/// Row order between halves that rotate together and neighbours that do.
fn adjacent(rows: usize, head_dim: usize, direction: Direction) -> Vec<usize> {
    let half = head_dim / 2;
    let source = |r: usize| {
        let (head, c) = (r / head_dim * head_dim, r % head_dim);
        match direction {
            // Row `c` of the halves lies at `2 (c mod half) + c / half` of the neighbours.
            Direction::FromFile => head + 2 * (c % half) + c / half,
            Direction::ToFile => head + (c % 2) * half + c / 2,
        }
    };
    (0..rows).map(source).collect()
}

fn shift(w: &Weight, by: f32) -> Weight {
    let mut x = w.to_tensor();
    x.as_mut_slice().iter_mut().for_each(|v| *v += by);
    Weight::from_tensor(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::stored::w;
    use tensor::Tensor;

    #[test]
    fn joining_undoes_splitting_in_every_layout() {
        let x = Tensor::from_vec(48, 4, (0..192).map(|i| i as f32).collect());
        for layout in [Layout::Rows, Layout::HeadByHead, Layout::Columns, Layout::Adjacent, Layout::MinusOne] {
            let one = matches!(layout, Layout::Adjacent | Layout::MinusOne);
            let stored = if one { w!(Q, "q") } else { w!(Q K V, "qkv") }.with(layout);
            let rows = if one { vec![48] } else { vec![16; 3] };
            let file = Weight::from_tensor(if layout == Layout::Columns { x.transposed() } else { x.clone() });
            let parts = split(&stored, file.clone(), &rows, 8).unwrap();
            assert_eq!(parts.len(), rows.len());
            let back = join(&stored, &parts, 8).unwrap();
            assert_eq!(back.to_tensor(), file.to_tensor(), "{layout:?}");
        }
    }

    #[test]
    fn neighbours_become_halves() {
        let x = Tensor::from_vec(8, 1, (0..8).map(|i| i as f32).collect());
        let parts = split(&w!(Q, "q").with(Layout::Adjacent), Weight::from_tensor(x), &[8], 8).unwrap();
        assert_eq!(parts[0].to_tensor().as_slice(), [0.0, 2.0, 4.0, 6.0, 1.0, 3.0, 5.0, 7.0]);
    }
}
