//! The mean key of a text, which keys of few bits are told relative to.
//!
//! A key is what its head says of every token plus what it says of this one, and the rotary embedding turns both with the
//! position, so that the channels of a turned key range over all that keys have in common. Rounded before the turn (KVQuant,
//! arXiv 2401.18079) and without their mean, keys lose several times less. Here they stay turned, as attention wants them,
//! and the mean turns along. It is that of the first chunk, which is kept in 8 bits: nothing has to be calibrated, and a
//! key's bytes depend on the text up to it alone.

use super::{Rotation, memory::CHUNK};
use crate::kernels::kernels;

/// The mean keys of a text's heads, `[kv_heads][head_dim]`, as if at position 0.
#[derive(Clone, Debug, Default)]
pub(super) struct MeanKey {
    pub turns: Turns,
    pub mean: Vec<f32>,
}

/// How the positions of a text turn: a chunk's first position, then from there as from position 0.
#[derive(Clone, Debug, Default)]
pub(super) struct Turns {
    /// Half of the channels of a head that turn.
    half: usize,
    /// Cosines and sines of the positions of the first chunk, `[CHUNK][2][half]`.
    within: Vec<f32>,
    /// The same of the first position of every chunk, `[chunks][2][half]`.
    starts: Vec<f32>,
}

impl Turns {
    /// Takes in how a position turns, which is row `t` of a rotation; without one nothing turns. There is room for so many
    /// chunks then.
    pub fn add(&mut self, position: usize, rotation: Option<&Rotation>, t: usize, chunks: usize) {
        let Some((cos, sin)) = rotation.map(|r| r.angles(t)) else { return };
        self.half = cos.len();
        let missing = (chunks * 2 * self.half).saturating_sub(self.starts.len());
        self.starts.reserve(missing);
        if position < CHUNK {
            put(&mut self.within, position, cos, sin);
        }
        if position.is_multiple_of(CHUNK) {
            put(&mut self.starts, position / CHUNK, cos, sin);
        }
    }

    /// Adds a head's mean to the rows of its keys in a chunk, `[rows][head_dim]`, from position `first` of the chunk on.
    pub fn add_mean(&self, x: &mut [f32], chunk: usize, first: usize, mean: &[f32], room: &mut Vec<f32>) {
        room.clear();
        room.resize(mean.len(), 0.0);
        let width = 2 * self.half;
        let start = &self.starts[chunk * width..][..width];
        (kernels().add_turned)(room, mean, start, self.half);
        (kernels().add_turned)(x, room, &self.within[first * width..], self.half);
    }

    /// A key at position `p` of a chunk less its head's mean.
    pub fn less_mean<'a>(
        &self,
        key: &[f32],
        chunk: usize,
        p: usize,
        mean: &[f32],
        [rest, room]: &'a mut [Vec<f32>; 2],
    ) -> &'a [f32] {
        rest.clear();
        rest.extend(key.iter().map(|v| -v));
        self.add_mean(rest, chunk, p, mean, room);
        rest.iter_mut().for_each(|v| *v = -*v);
        rest
    }

    /// Turns a key of the first chunk back to position 0.
    pub fn back(&self, position: usize, key: &mut [f32]) {
        let (cos, sin) = self.within[position * 2 * self.half..][..2 * self.half].split_at(self.half);
        let (low, high) = key[..2 * self.half].split_at_mut(self.half);
        for i in 0..self.half {
            let (a, b) = (low[i], high[i]);
            (low[i], high[i]) = (a * cos[i] + b * sin[i], b * cos[i] - a * sin[i]);
        }
    }
}

/// Sets entry `at` of a list of turns. A rotation may lengthen as well (YaRN): that is left to the mean.
fn put(turns: &mut Vec<f32>, at: usize, cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    turns.resize(turns.len().max((at + 1) * 2 * half), 0.0);
    let (c, s) = turns[at * 2 * half..][..2 * half].split_at_mut(half);
    for i in 0..half {
        let length = cos[i].hypot(sin[i]);
        (c[i], s[i]) = (cos[i] / length, sin[i] / length);
    }
}
