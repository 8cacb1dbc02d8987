//! Numbers on their way between ranks: as 32-bit floats, or rounded to 16-bit ones, half as many bytes.
//!
//! Where a number would be rounded on its way it is rounded where it stays as well, so that no result depends on how many
//! ranks there are.

use crate::{Result, ranks::gone};
use half::f16;
use tensor::ops;

/// How numbers travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// As they are.
    #[default]
    Floats,
    /// As 16-bit floats; what is too large for these is infinite then.
    Halves,
}

impl Wire {
    /// Bytes of a number.
    fn width(self) -> usize {
        match self {
            Wire::Floats => 4,
            Wire::Halves => 2,
        }
    }

    /// Makes of numbers that stay what would come of them on their way.
    pub fn round(self, numbers: &mut [f32]) {
        if self == Wire::Halves {
            ops::round_to_halves(numbers);
        }
    }
}

/// Slices that travel together, so that messages are neither tiny nor huge.
#[derive(Default)]
pub struct Message {
    wire: Wire,
    bytes: Vec<u8>,
    read: usize,
    numbers: Vec<f32>,
}

impl Message {
    /// Numbers of a message at most: what is being sent does not double the memory of a large matrix.
    pub const LONGEST: usize = 1 << 24;

    /// An empty one.
    pub fn new(wire: Wire) -> Message {
        Message { wire, ..Message::default() }
    }

    /// One that came.
    pub fn of(wire: Wire, bytes: Vec<u8>) -> Message {
        Message { wire, bytes, ..Message::default() }
    }

    /// May so many numbers be added?
    pub fn has_room(&self, len: usize) -> bool {
        self.bytes.is_empty() || self.bytes.len() / self.wire.width() + len <= Message::LONGEST
    }

    /// Adds numbers.
    pub fn put(&mut self, numbers: &[f32]) {
        match self.wire {
            Wire::Floats => self.bytes.extend_from_slice(bytemuck::cast_slice(numbers)),
            Wire::Halves => self.bytes.extend(numbers.iter().flat_map(|v| f16::from_f32(*v).to_ne_bytes())),
        }
    }

    /// What is sent; empty from then on.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    /// Was all of it read?
    pub fn is_read(&self) -> bool {
        self.read == self.bytes.len()
    }

    /// The next numbers of one that came.
    ///
    /// # Errors
    /// If it holds fewer: another rank is at another place.
    pub fn next(&mut self, len: usize) -> Result<&[f32]> {
        let from = self.read;
        self.read += len * self.wire.width();
        let bytes = self.bytes.get(from..self.read).ok_or_else(gone)?;
        self.numbers.clear();
        match self.wire {
            Wire::Floats => self.numbers.extend(bytes.as_chunks().0.iter().map(|b| f32::from_ne_bytes(*b))),
            Wire::Halves => self.numbers.extend(bytes.as_chunks().0.iter().map(|b| f16::from_ne_bytes(*b).to_f32())),
        }
        Ok(&self.numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_is_what_travels() {
        let numbers: Vec<f32> = (0..999).map(|i| (i as f32 * 0.7).sin() * 10f32.powi(i % 13 - 8)).collect();
        for (wire, width) in [(Wire::Floats, 4), (Wire::Halves, 2)] {
            let mut message = Message::new(wire);
            message.put(&numbers[..500]);
            message.put(&numbers[500..]);
            let mut stays = numbers.clone();
            wire.round(&mut stays);
            let mut came = Message::of(wire, message.take());
            assert_eq!(came.bytes.len(), width * numbers.len());
            assert_eq!(came.next(300).unwrap(), &stays[..300]);
            assert_eq!(came.next(699).unwrap(), &stays[300..]);
            assert!(came.is_read() && came.next(1).is_err());
            assert_eq!(stays == numbers, wire == Wire::Floats);
        }
        let mut large = [1e6];
        Wire::Halves.round(&mut large);
        assert!(large[0].is_infinite());
    }
}
