//! Keys and values of past positions, in the layout that attention multiplies.
//!
//! Positions are kept in chunks of [`CHUNK`], all chunks of a head one after the other: reading them is one run of
//! memory. Per chunk and head, float formats hold the keys as panels of positions
//! (`[CHUNK / LANES][head_dim][LANES]`, pairs of channels together for brain floats) and the values as panels of
//! channels (`[head_dim / LANES][CHUNK][LANES]`, pairs of positions together). Rounded formats hold position after
//! position in groups of [`GROUP`] channels, and are widened to brain floats chunk by chunk when they are read. Of 4 bits is
//! what comes after the first chunk, and keys less their mean ([`super::mean_key`]); that chunk has 8.

use super::{Rotation, mean_key::MeanKey};
use crate::{
    Tensor,
    bytes::Region,
    grid::{Grid, widen},
    kernels::kernels,
    lines::Lines,
    packed::{Form, brain, form::LANES},
    threads::{self, Shared},
};
use half::f16;
use std::{cell::RefCell, fmt};

/// Positions that are attended together, counted from the first of the text.
pub(super) const CHUNK: usize = 64;
/// Channels that share a scale in the rounded formats.
const GROUP: usize = 32;

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum KeyValue {
    /// 32-bit floats: attention is exact.
    #[default]
    F32,
    /// Brain floats.
    Bf16,
    /// 8 bits in groups of 32 channels.
    Int8,
    /// 4 bits in groups of 32 channels with a minimum; 8 for the first 64 positions.
    Int4,
}

impl KeyValue {
    /// All, by falling size.
    pub const ALL: [KeyValue; 4] = [KeyValue::F32, KeyValue::Bf16, KeyValue::Int8, KeyValue::Int4];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            KeyValue::F32 => "f32",
            KeyValue::Bf16 => "bf16",
            KeyValue::Int8 => "int8",
            KeyValue::Int4 => "int4",
        }
    }

    /// The format in which products with it run.
    pub(super) fn form(self) -> Form {
        if self == KeyValue::F32 { Form::F32 } else { Form::Bf16 }
    }

    /// How a chunk is kept.
    fn of_chunk(self, chunk: usize) -> KeyValue {
        if self == KeyValue::Int4 && chunk == 0 { KeyValue::Int8 } else { self }
    }

    /// Bytes of one position of one head, keys or values.
    fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            KeyValue::F32 | KeyValue::Bf16 => 0,
            KeyValue::Int8 => head_dim + 2 * head_dim.div_ceil(GROUP),
            KeyValue::Int4 => head_dim.div_ceil(2) + 4 * head_dim.div_ceil(GROUP),
        }
    }
}

impl fmt::Display for KeyValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Sizes of the panels of one head and chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panels {
    /// How they are multiplied.
    pub form: Form,
    head_dim: usize,
}

impl Panels {
    /// Bytes of a panel of keys.
    pub fn key_panel(self) -> usize {
        self.key_steps() * 64
    }

    /// Steps of a product with keys: channels, or pairs of them.
    pub fn key_steps(self) -> usize {
        if self.form == Form::F32 { self.head_dim } else { self.head_dim.div_ceil(2) }
    }

    /// Bytes of a panel of values.
    pub fn value_panel(self) -> usize {
        self.value_steps() * 64
    }

    /// Steps of a product with values: positions, or pairs of them.
    pub fn value_steps(self) -> usize {
        if self.form == Form::F32 { CHUNK } else { CHUNK / 2 }
    }

    /// Panels of values.
    pub fn slices(self) -> usize {
        self.head_dim.div_ceil(LANES)
    }

    fn keys(self) -> usize {
        CHUNK / LANES * self.key_panel()
    }

    fn bytes(self) -> usize {
        self.keys() + self.slices() * self.value_panel()
    }

    /// Writes the key and the value of a position of the chunk.
    fn write(self, out: &mut [u8], position: usize, key: &[f32], value: &[f32]) {
        let (keys, values) = out.split_at_mut(self.keys());
        let (lane, panel) = (position % LANES, position / LANES * self.key_panel());
        if self.form == Form::F32 {
            let words = keys[panel..].as_chunks_mut::<4>().0[lane..].iter_mut().step_by(LANES);
            words.zip(key).for_each(|(o, v)| *o = v.to_le_bytes());
            for (slice, value) in value.chunks(LANES).enumerate() {
                let at = slice * self.value_panel() + 4 * position * LANES;
                let words = values[at..].as_chunks_mut::<4>().0.iter_mut();
                words.zip(value).for_each(|(o, v)| *o = v.to_le_bytes());
            }
            return;
        }
        let words = keys[panel..].as_chunks_mut::<4>().0[lane..].iter_mut().step_by(LANES);
        for (o, pair) in words.zip(key.chunks(2)) {
            let [a, b] = brain(pair[0]).to_le_bytes();
            let [c, d] = pair.get(1).map_or([0, 0], |v| brain(*v).to_le_bytes());
            *o = [a, b, c, d];
        }
        for (slice, value) in value.chunks(LANES).enumerate() {
            let at = slice * self.value_panel() + 4 * (position / 2 * LANES) + 2 * (position % 2);
            let halves = values[at..].as_chunks_mut::<2>().0.iter_mut().step_by(2);
            halves.zip(value).for_each(|(o, v)| *o = brain(*v).to_le_bytes());
        }
    }
}

/// Keys and values of one sequence in one block.
#[derive(Clone, Debug)]
pub struct Memory {
    format: KeyValue,
    kv_heads: usize,
    head_dim: usize,
    len: usize,
    /// Chunks for which there is room.
    room: usize,
    /// `[kv_heads][room]` blocks of [`Memory::block_bytes`].
    data: Region,
    /// What keys of 4 bits are told relative to.
    mean_key: MeanKey,
}

impl Memory {
    /// An empty memory.
    pub fn new(format: KeyValue, kv_heads: usize, head_dim: usize) -> Memory {
        Memory { format, kv_heads, head_dim, len: 0, room: 0, data: Region::default(), mean_key: MeanKey::default() }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Does it hold nothing?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes room for so many positions in all of some memories, so that none is made while they come. They then lie
    /// side by side: in huge pages, which one alone would not fill.
    pub fn reserve(memories: &mut [Memory], positions: usize) {
        let room = positions.div_ceil(CHUNK);
        if memories.iter().all(|m| m.room >= room) {
            return;
        }
        let lens: Vec<usize> = memories.iter().map(|m| m.kv_heads * m.head_bytes(room.max(m.room))).collect();
        for (memory, data) in memories.iter_mut().zip(Region::cut(&lens)) {
            memory.move_to(data, room.max(memory.room));
        }
    }

    /// Moves what is held to zeroed memory for `room` chunks.
    fn move_to(&mut self, mut data: Region, room: usize) {
        let used = self.head_bytes(self.chunks());
        for head in 0..self.kv_heads {
            let (from, to) = (head * self.head_bytes(self.room), head * self.head_bytes(room));
            data[to..to + used].copy_from_slice(&self.data[from..from + used]);
        }
        (self.room, self.data) = (room, data);
    }

    /// Chunks that are in use.
    fn chunks(&self) -> usize {
        self.len.div_ceil(CHUNK)
    }

    /// Forgets every position from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Bytes in use.
    pub fn size_bytes(&self) -> usize {
        self.kv_heads * self.head_bytes(self.chunks())
    }

    pub(super) fn panels(&self) -> Panels {
        Panels { form: self.format.form(), head_dim: self.head_dim }
    }

    /// Bytes of one head in so many chunks from the first on.
    fn head_bytes(&self, chunks: usize) -> usize {
        if chunks == 0 { 0 } else { self.block_bytes(0) + (chunks - 1) * self.block_bytes(1) }
    }

    /// Bytes of one head in one chunk.
    fn block_bytes(&self, chunk: usize) -> usize {
        match self.format.of_chunk(chunk) {
            KeyValue::F32 | KeyValue::Bf16 => self.panels().bytes(),
            rounded => 2 * CHUNK * rounded.row_bytes(self.head_dim),
        }
    }

    /// Appends rows `from..to` of keys and values, both `[tokens, kv_heads * head_dim]`, the keys turned as `rotation` says.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor, rotation: Option<&Rotation>, from: usize, to: usize) {
        let (hd, heads) = (self.head_dim, self.kv_heads);
        let end = self.len + to - from;
        if end > self.room * CHUNK {
            let positions = end.max(self.room * CHUNK * 3 / 2);
            Memory::reserve(std::slice::from_mut(self), positions);
        }
        let (format, panels, len) = (self.format, self.panels(), self.len);
        let mean_width = if format == KeyValue::Int4 { hd } else { 0 };
        if format == KeyValue::Int4 {
            (from..to).for_each(|row| self.mean_key.turns.add(len + row - from, rotation, row, self.room));
            self.mean_key.mean.resize(heads * hd, 0.0);
        }
        let bytes = [self.block_bytes(0), self.block_bytes(1), self.head_bytes(self.room)];
        let MeanKey { turns, mean } = &mut self.mean_key;
        let (turns, mean) = (&*turns, Shared::new(mean));
        let shared = Shared::new(&mut self.data);
        let head = |head: usize| {
            // SAFETY: this task alone has this head's mean, for which there is room where a format has one.
            let mean = unsafe { mean.slice(head * mean_width, mean_width) };
            let mut rooms = ROOMS.take();
            for row in from..to {
                let position = len + row - from;
                let (chunk, p) = (position / CHUNK, position % CHUNK);
                let at = head * bytes[2] + if chunk == 0 { 0 } else { bytes[0] + (chunk - 1) * bytes[1] };
                // SAFETY: there is room for every chunk up to `end`; this task alone writes this head's blocks.
                let out = unsafe { shared.slice(at, bytes[chunk.min(1)]) };
                if p == 0 {
                    // What is not yet there takes part with a weight of zero, which forgotten infinities would survive.
                    out.fill(0);
                }
                let (key, value) = (&keys.row(row)[head * hd..][..hd], &values.row(row)[head * hd..][..hd]);
                if matches!(format, KeyValue::F32 | KeyValue::Bf16) {
                    panels.write(out, p, key, value);
                    continue;
                }
                let kept = format.of_chunk(chunk);
                let (key_rows, value_rows) = out.split_at_mut(out.len() / 2);
                let at = p * kept.row_bytes(hd)..(p + 1) * kept.row_bytes(hd);
                round_row(kept, value, &mut value_rows[at.clone()]);
                if kept == KeyValue::Int4 {
                    round_row(kept, turns.less_mean(key, chunk, p, mean, &mut rooms), &mut key_rows[at]);
                    continue;
                }
                round_row(kept, key, &mut key_rows[at]);
                if format == KeyValue::Int4 && p == CHUNK - 1 {
                    mean.fill(0.0);
                    rooms[0].resize(hd, 0.0);
                    for (p, row) in key_rows.chunks_exact(kept.row_bytes(hd)).enumerate() {
                        widen_row(kept, row, &mut rooms[0]);
                        turns.back(p, &mut rooms[0]);
                        mean.iter_mut().zip(&rooms[0]).for_each(|(m, v)| *m += v / CHUNK as f32);
                    }
                }
            }
            ROOMS.set(rooms);
        };
        if to - from < 8 {
            (0..heads).for_each(head)
        } else {
            threads::each(heads, &head)
        }
        self.len = end;
    }

    /// The stored bytes of one head in one chunk.
    fn block(&self, chunk: usize, head: usize) -> &[u8] {
        &self.data[head * self.head_bytes(self.room) + self.head_bytes(chunk)..][..self.block_bytes(chunk)]
    }

    /// The panels of one head in one chunk: keys, then values. `room` holds them where they must be widened.
    pub(super) fn chunk<'a>(&'a self, chunk: usize, head: usize, room: &'a mut Widened) -> (&'a [u8], &'a [u8]) {
        let data = self.block(chunk, head);
        let panels = self.panels();
        let kept = self.format.of_chunk(chunk);
        let grid = match kept {
            KeyValue::F32 | KeyValue::Bf16 => return data.split_at(panels.keys()),
            KeyValue::Int8 => Grid::Q8_0,
            KeyValue::Int4 => Grid::Q4_1,
        };
        let (hd, rows) = (self.head_dim, CHUNK.min(self.len - chunk * CHUNK));
        let (keys, values) = data.split_at(data.len() / 2);
        room.panels.resize(panels.bytes() / 4);
        let (key_words, value_words) = room.panels.split_at_mut(panels.keys() / 4);
        if hd.is_multiple_of(GROUP) {
            decode_chunk(grid, keys, hd, rows, &mut room.rows);
            self.add_mean(&mut room.rows[..rows * hd], chunk, 0, head, &mut room.mean);
            let (steps, panel) = (panels.key_steps(), LANES * panels.key_steps());
            room.words.resize(CHUNK * steps);
            (kernels().brain_pairs)(&room.rows, &mut room.words);
            for (words, out) in room.words.chunks_exact(panel).zip(key_words.chunks_exact_mut(panel)) {
                (kernels().codes.pack_words)(words, steps, LANES, out);
            }
            decode_chunk(grid, values, hd, rows, &mut room.rows);
            room.slices.resize(CHUNK * hd);
            for (slice, out) in room.slices.as_chunks_mut::<{ CHUNK * LANES }>().0.iter_mut().enumerate() {
                for (out, row) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(room.rows.chunks_exact(hd)) {
                    out.copy_from_slice(&row[slice * LANES..][..LANES]);
                }
            }
            (kernels().brain_weave)(&room.slices, value_words);
        } else {
            room.panels.fill(0);
            let width = kept.row_bytes(hd);
            room.rows.resize(2 * hd);
            let (key, value) = room.rows.split_at_mut(hd);
            for p in 0..rows {
                widen_row(kept, &keys[p * width..(p + 1) * width], key);
                self.add_mean(key, chunk, p, head, &mut room.mean);
                widen_row(kept, &values[p * width..(p + 1) * width], value);
                panels.write(bytemuck::cast_slice_mut(&mut room.panels), p, key, value);
            }
        }
        bytemuck::cast_slice(&room.panels).split_at(panels.keys())
    }

    /// Adds a head's mean key to rows of a chunk, from its position `first` on, where keys are told relative to it.
    fn add_mean(&self, rows: &mut [f32], chunk: usize, first: usize, head: usize, room: &mut Vec<f32>) {
        if self.format == KeyValue::Int4 && chunk > 0 {
            let mean = &self.mean_key.mean[head * self.head_dim..][..self.head_dim];
            self.mean_key.turns.add_mean(rows, chunk, first, mean, room);
        }
    }
}

thread_local! {
    /// A key and its head's mean, used again from position to position.
    static ROOMS: RefCell<[Vec<f32>; 2]> = RefCell::default();
}

/// Where a chunk of a rounded format is widened, used again from chunk to chunk.
#[derive(Default)]
pub(super) struct Widened {
    /// Keys, then values, as [`Panels`] lays them out.
    panels: Lines<u32>,
    /// `[CHUNK][head_dim]`, as floats and as pairs of brain floats.
    rows: Lines<f32>,
    words: Lines<u32>,
    /// `[head_dim / LANES][CHUNK][LANES]`.
    slices: Lines<f32>,
    /// A mean key at the beginning of the chunk.
    mean: Vec<f32>,
}

/// Decodes the first rows of a chunk of whole groups; the others are zeros.
fn decode_chunk(grid: Grid, bytes: &[u8], head_dim: usize, rows: usize, out: &mut Lines<f32>) {
    out.resize(CHUNK * head_dim);
    let (held, missing) = out.split_at_mut(rows * head_dim);
    (kernels().decode_row)(grid, &bytes[..grid.row_bytes(held.len())], held);
    missing.fill(0.0);
}

/// Rounds a row to groups: the scale (and the minimum) as 16-bit floats, then the codes.
fn round_row(format: KeyValue, x: &[f32], out: &mut [u8]) {
    let wide = format == KeyValue::Int8;
    let mut at = 0;
    for x in x.chunks(GROUP) {
        let low = x.iter().fold(f32::INFINITY, |a, b| a.min(*b));
        let high = x.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let (scale, base) = if wide { (high.max(-low) / 127.0, 0.0) } else { ((high - low) / 15.0, low) };
        let (scale, base) = (f16::from_f32(scale), f16::from_f32(base));
        out[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        at += 2;
        let scale = scale.to_f32();
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        if wide {
            for (o, v) in out[at..].iter_mut().zip(x) {
                *o = (v * inverse).round_ties_even() as i8 as u8;
            }
            at += x.len();
        } else {
            out[at..at + 2].copy_from_slice(&base.to_le_bytes());
            at += 2;
            let code = |v: f32| ((v - base.to_f32()) * inverse).round_ties_even().clamp(0.0, 15.0) as u8;
            let (low, high) = x.split_at(x.len().div_ceil(2));
            for (i, (o, v)) in out[at..].iter_mut().zip(low).enumerate() {
                *o = code(*v) | high.get(i).map_or(0, |v| code(*v)) << 4;
            }
            at += low.len();
        }
    }
}

/// Reads a row back.
fn widen_row(format: KeyValue, bytes: &[u8], out: &mut [f32]) {
    let half = |at: usize| widen(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let mut at = 0;
    for out in out.chunks_mut(GROUP) {
        let scale = half(at);
        if format == KeyValue::Int8 {
            for (o, b) in out.iter_mut().zip(&bytes[at + 2..]) {
                *o = scale * f32::from(*b as i8);
            }
            at += 2 + out.len();
        } else {
            let base = half(at + 2);
            let half = out.len().div_ceil(2);
            for (i, o) in out.iter_mut().enumerate() {
                *o = scale * f32::from(bytes[at + 4 + i % half] >> (4 * (i / half)) & 15) + base;
            }
            at += 4 + half;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_groups_are_widened_as_row_after_row() {
        let mut room = Widened::default();
        for format in [KeyValue::Int8, KeyValue::Int4] {
            for (hd, len) in [(32, 1), (64, 63), (64, 130), (96, 64)] {
                let wave = |step: f32| {
                    let values = (0..len * 2 * hd).map(|i| (i as f32 * step).sin() * (1.0 + i as f32)).collect();
                    Tensor::from_vec(len, 2 * hd, values)
                };
                let mut memory = Memory::new(format, 2, hd);
                memory.append(&wave(0.37), &wave(0.71), None, 0, len);
                for (chunk, head) in (0..len.div_ceil(CHUNK)).flat_map(|chunk| [(chunk, 0), (chunk, 1)]) {
                    let panels = memory.panels();
                    let mut want = vec![0u8; panels.bytes()];
                    let (keys, values) = memory.block(chunk, head).split_at(memory.block_bytes(chunk) / 2);
                    let kept = format.of_chunk(chunk);
                    let width = kept.row_bytes(hd);
                    let (mut key, mut value) = (vec![0.0; hd], vec![0.0; hd]);
                    for p in 0..CHUNK.min(len - chunk * CHUNK) {
                        widen_row(kept, &keys[p * width..], &mut key);
                        memory.add_mean(&mut key, chunk, p, head, &mut Vec::new());
                        widen_row(kept, &values[p * width..], &mut value);
                        panels.write(&mut want, p, &key, &value);
                    }
                    let (keys, values) = memory.chunk(chunk, head, &mut room);
                    assert!([keys, values].concat() == want, "{format}, {hd} channels, {len} positions, chunk {chunk}");
                }
            }
        }
    }

    #[test]
    fn what_keys_have_in_common_costs_no_bits() {
        for (hd, half) in [(64, 32), (64, 16), (32, 0), (16, 8)] {
            let len = 200;
            let frequencies: Vec<f32> = (0..half).map(|i| 0.1f32.powf(i as f32 / half as f32)).collect();
            let mut rotation = Rotation::default();
            rotation.reset(len, half);
            (0..len).for_each(|t| rotation.turn(t, t, &frequencies, 1.2));
            // The same for all positions, ten times what each says.
            let shared = |c: usize| 10.0 * (c as f32 * 2.3).sin();
            let said = (0..len * hd).map(|i| shared(i % hd) + (i as f32 * 0.7).sin()).collect();
            let mut keys = Tensor::from_vec(len, hd, said);
            crate::ops::rope(&mut keys, hd, &rotation);
            let kept = |memory: &Memory| -> Vec<f32> {
                let mut all = Vec::new();
                for position in 0..len {
                    let (chunk, p, kept) =
                        (position / CHUNK, position % CHUNK, memory.format.of_chunk(position / CHUNK));
                    let mut key = vec![0.0; hd];
                    widen_row(kept, &memory.block(chunk, 0)[p * kept.row_bytes(hd)..], &mut key);
                    memory.add_mean(&mut key, chunk, p, 0, &mut Vec::new());
                    all.extend(key);
                }
                all
            };
            let mut memory = Memory::new(KeyValue::Int4, 1, hd);
            memory.append(&keys, &keys, Some(&rotation), 0, len);
            let whole = kept(&memory);
            let mut alone = vec![0.0; hd];
            let (mut error, mut plain) = (0.0, 0.0);
            for (row, kept) in keys.as_slice().chunks(hd).zip(whole.chunks(hd)).skip(CHUNK) {
                let mut bytes = vec![0; KeyValue::Int4.row_bytes(hd)];
                round_row(KeyValue::Int4, row, &mut bytes);
                widen_row(KeyValue::Int4, &bytes, &mut alone);
                let off = |x: &[f32]| row.iter().zip(x).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
                error += off(kept);
                plain += off(&alone);
            }
            assert!(error < plain / 30.0, "{hd} channels, {half} angles: {error} and {plain}");
            // Step by step, and again after some were forgotten, the bytes are the same.
            memory.truncate(40);
            for t in 40..len {
                memory.append(&keys, &keys, Some(&rotation), t, t + 1);
            }
            assert_eq!(kept(&memory), whole);
        }
    }
}
