//! The GGUF grids against gguf-py: `golden/grids.py` writes blocks and the values that they stand for.

use tensor::grid::Grid;

/// Takes `n` bytes off the front.
fn take<'a>(bytes: &mut &'a [u8], n: usize) -> &'a [u8] {
    let (head, rest) = bytes.split_at(n);
    *bytes = rest;
    head
}

fn whole_number(bytes: &mut &[u8]) -> usize {
    let at = take(bytes, 4);
    u32::from_le_bytes([at[0], at[1], at[2], at[3]]) as usize
}

#[test]
fn every_gguf_grid_decodes_to_the_bits_of_gguf_py() {
    let mut golden: &[u8] = include_bytes!("golden/grids.bin");
    let mut seen = Vec::new();
    while !golden.is_empty() {
        let length = usize::from(take(&mut golden, 1)[0]);
        let grid = Grid::parse(std::str::from_utf8(take(&mut golden, length)).unwrap()).unwrap();
        let [count, size, values] = std::array::from_fn(|_| whole_number(&mut golden));
        assert_eq!((size, values), (grid.block_bytes_in(values), grid.block_len()), "{}", grid.name());
        let blocks = take(&mut golden, count * size);
        let expected = take(&mut golden, count * values * 4);
        let mut decoded = vec![0f32; count * values];
        grid.decode_row(blocks, &mut decoded);
        for (i, (ours, theirs)) in decoded.iter().zip(expected.chunks_exact(4)).enumerate() {
            let theirs = f32::from_le_bytes(theirs.try_into().unwrap());
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{} value {i}: {ours} {theirs}", grid.name());
        }
        seen.push(grid);
    }
    seen.sort();
    let mut all = Grid::GGUF.to_vec();
    all.sort();
    assert_eq!(seen, all);
}

/// Values of an even spread with a few large ones, by a fixed generator.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..n).map(|_| (0..4).map(|_| uniform() - 0.5).sum::<f32>() * 0.1).collect()
}

fn stored(grid: Grid, x: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let mut bytes = vec![0; grid.row_bytes(x.len())];
    grid.quantize_row(x, importance, &mut bytes);
    bytes
}

fn error(grid: Grid, bytes: &[u8], x: &[f32], importance: &[f32]) -> f64 {
    let mut decoded = vec![0f32; x.len()];
    grid.decode_row(bytes, &mut decoded);
    let squares = x.iter().zip(&decoded).map(|(a, b)| f64::from(a - b).powi(2));
    squares.zip(importance).map(|(e, w)| e * f64::from(*w)).sum()
}

#[test]
fn importance_lowers_the_error_that_it_weighs() {
    let x = values(4096, 1);
    let importance: Vec<f32> = values(4096, 2).iter().map(|v| (v * 40.0).exp()).collect();
    for grid in Grid::GGUF {
        let (with, without) = (stored(*grid, &x, Some(&importance)), stored(*grid, &x, None));
        let (with, without) = (error(*grid, &with, &x, &importance), error(*grid, &without, &x, &importance));
        assert!(with < 0.95 * without, "{} {with} {without}", grid.name());
    }
}

#[test]
fn only_the_proportions_of_importances_matter() {
    let x = values(1024, 3);
    let importance: Vec<f32> = values(1024, 4).iter().map(|v| (v * 20.0).exp()).collect();
    for grid in Grid::GGUF {
        let expected = stored(*grid, &x, Some(&importance));
        for power in [-80, 80] {
            let scaled: Vec<f32> = importance.iter().map(|w| w * 2f32.powi(power)).collect();
            assert_eq!(stored(*grid, &x, Some(&scaled)), expected, "{} 2^{power}", grid.name());
        }
        let plain = stored(*grid, &x, None);
        for none in [0.0, f32::NAN, -1.0] {
            assert_eq!(stored(*grid, &x, Some(&vec![none; x.len()])), plain, "{} {none}", grid.name());
        }
    }
}

#[test]
fn a_fitted_scale_beats_one_that_spans_the_block() {
    let x = values(4096, 5);
    let importance: Vec<f32> = values(4096, 6).iter().map(|v| (v * 40.0).exp()).collect();
    for (grid, levels) in [(Grid::Q4_0, 8.0), (Grid::Q5_0, 16.0), (Grid::Q8_0, 127.0)] {
        let mut spanning = 0.0;
        for (x, w) in x.chunks(32).zip(importance.chunks(32)) {
            let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
            let scale = half::f16::from_f32(largest / levels).to_f32();
            for (x, w) in x.iter().zip(w) {
                let rounded = scale * (x / scale).round().clamp(-levels, levels);
                spanning += f64::from(*w) * f64::from(x - rounded).powi(2);
            }
        }
        let fitted = error(grid, &stored(grid, &x, Some(&importance)), &x, &importance);
        assert!(fitted < 0.97 * spanning, "{} {fitted} {spanning}", grid.name());
    }
}
