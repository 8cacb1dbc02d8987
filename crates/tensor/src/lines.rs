//! Memory for numbers that kernels read and write again and again.

use bytemuck::Pod;
use std::ops::{Deref, DerefMut};

/// Bytes of a cache line.
const LINE: usize = 64;

/// Numbers from the beginning of a cache line on: what reads sixteen at a time, or rows of a tile, then reads one line each
/// and not two. They are what was there before until they are written.
#[derive(Debug, Default)]
pub(crate) struct Lines<T> {
    /// Room for the most so far.
    data: Vec<T>,
    /// Where in `data` they begin.
    start: usize,
    len: usize,
}

impl<T: Pod> Lines<T> {
    /// So many, whatever they are.
    pub(crate) fn resize(&mut self, len: usize) {
        if self.start + len > self.data.len() {
            // What was there is not copied, and zeros come from the system without being written.
            self.data = vec![T::zeroed(); len + LINE / size_of::<T>()];
            self.start = self.data.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
        }
        self.len = len;
    }

    /// So many zeros.
    pub(crate) fn zeros(&mut self, len: usize) {
        self.resize(len);
        self.fill(T::zeroed());
    }
}

impl<T: Pod> Clone for Lines<T> {
    fn clone(&self) -> Lines<T> {
        let mut own = Lines { data: Vec::new(), start: 0, len: 0 };
        own.resize(self.len);
        own.copy_from_slice(self);
        own
    }
}

/// Numbers where they are.
impl<T: Pod> From<Vec<T>> for Lines<T> {
    fn from(data: Vec<T>) -> Lines<T> {
        Lines { start: 0, len: data.len(), data }
    }
}

impl<T: Pod> From<Lines<T>> for Vec<T> {
    fn from(mut lines: Lines<T>) -> Vec<T> {
        lines.data.truncate(lines.start + lines.len);
        lines.data.drain(..lines.start);
        lines.data
    }
}

impl<T: Pod> Deref for Lines<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.data[self.start..self.start + self.len]
    }
}

impl<T: Pod> DerefMut for Lines<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begin_with_a_line_whatever_their_length() {
        let mut lines = Lines::<f32>::default();
        assert!(lines.is_empty());
        for len in [1, 17, 40_000, 3] {
            lines.zeros(len);
            assert!(lines.len() == len && lines.iter().all(|v| *v == 0.0));
            lines.fill(1.0);
            for lines in [&lines, &lines.clone()] {
                assert!(lines.len() == len && lines.as_ptr().addr().is_multiple_of(LINE));
            }
        }
    }
}
