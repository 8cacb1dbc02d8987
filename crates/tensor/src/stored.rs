//! `Stored`: rows of bytes with the storage that gives them meaning.
//!
//! Rows may lie in another order than they are counted in: a file's order of a matrix need not be ours, and to sort a
//! mapped file would be to copy it.

use crate::{Bytes, Storage, Tensor};
use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

/// A matrix as it was read or made.
#[derive(Clone, Debug)]
pub struct Stored {
    storage: Storage,
    rows: usize,
    cols: usize,
    bytes: Bytes,
    /// Where the rows lie, unless one after the other.
    order: Option<Arc<Order>>,
}

#[derive(Debug)]
struct Order {
    /// Place of each row.
    places: Vec<usize>,
    /// The rows one after the other, from when they are first asked for.
    sorted: OnceLock<Bytes>,
}

impl Stored {
    /// `rows` rows of `cols` values one after the other; the caller checked the length.
    pub(crate) fn new(storage: Storage, rows: usize, cols: usize, bytes: Bytes) -> Stored {
        Stored { storage, rows, cols, bytes, order: None }
    }

    /// Takes other values in the same memory; false where that cannot be.
    pub(crate) fn set_floats(&mut self, values: &Tensor) -> bool {
        let fits = self.storage == Storage::F32 && [self.rows, self.cols] == [values.rows(), values.cols()];
        if !fits || self.order.is_some() {
            return false;
        }
        let Some(bytes) = self.bytes.as_mut_slice() else { return false };
        bytes.copy_from_slice(bytemuck::cast_slice(values.as_slice()));
        true
    }

    /// How each row is stored.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of a row.
    fn width(&self) -> usize {
        self.storage.row_bytes(self.cols)
    }

    /// Where row `row` lies.
    fn place(&self, row: usize) -> usize {
        self.order.as_ref().map_or(row, |order| order.places[row])
    }

    /// The bytes of one row.
    pub fn row(&self, row: usize) -> &[u8] {
        let (place, width) = (self.place(row), self.width());
        &self.bytes[place * width..(place + 1) * width]
    }

    /// All rows, one after the other; they are copied at the first call if they lie otherwise.
    pub fn bytes(&self) -> &Bytes {
        match &self.order {
            None => &self.bytes,
            Some(order) => order.sorted.get_or_init(|| {
                let mut sorted = Vec::new();
                self.copy(0..self.rows, &mut sorted);
                Bytes::from_vec(sorted)
            }),
        }
    }

    /// Copies some rows to `out`, one after the other; what it held is gone.
    pub fn copy(&self, rows: Range<usize>, out: &mut Vec<u8>) {
        out.clear();
        match self.order {
            None => out.extend_from_slice(&self.bytes[rows.start * self.width()..rows.end * self.width()]),
            Some(_) => rows.for_each(|row| out.extend_from_slice(self.row(row))),
        }
    }

    /// Rows `from..to` without a copy; `None` where there are not so many.
    pub fn range(&self, from: usize, to: usize) -> Option<Stored> {
        if to > self.rows || from > to {
            return None;
        }
        if self.order.is_some() {
            return Some(self.select(&(from..to).collect::<Vec<usize>>()));
        }
        let bytes = self.bytes.slice(from * self.width()..to * self.width())?;
        Some(Stored { rows: to - from, bytes, ..self.clone() })
    }

    /// The listed rows, without a copy.
    pub fn select(&self, rows: &[usize]) -> Stored {
        let places = rows.iter().map(|row| self.place(*row)).collect();
        let order = Some(Arc::new(Order { places, sorted: OnceLock::new() }));
        Stored { rows: rows.len(), order, ..self.clone() }
    }

    /// Do they lie in a mapped file rather than in memory of our own?
    pub fn is_mapped(&self) -> bool {
        self.bytes.is_mapped()
    }

    /// Says that some rows are read next, as [`Bytes::will_need`].
    pub fn will_need(&self, rows: Range<usize>) {
        self.bytes.will_need(self.around(rows));
    }

    /// Says that some rows are not read again soon, as [`Bytes::release`].
    pub fn release(&self, rows: Range<usize>) {
        self.bytes.release(self.around(rows));
    }

    /// The bytes from the first to the last of some rows.
    fn around(&self, rows: Range<usize>) -> Range<usize> {
        let places = || rows.clone().map(|row| self.place(row));
        let (first, last) = (places().min().unwrap_or(0), places().max().map_or(0, |last| last + 1));
        first * self.width()..last * self.width()
    }
}
