//! The GGUF grids against gguf-py: `golden/grids.py` writes blocks and the values that they stand for.

use tensor::grid::Grid;

/// Takes `n` bytes off the front.
fn take<'a>(bytes: &mut &'a [u8], n: usize) -> &'a [u8] {
    let (head, rest) = bytes.split_at(n);
    *bytes = rest;
    head
}

fn whole_number(bytes: &mut &[u8]) -> usize {
    u32::from_le_bytes(take(bytes, 4).try_into().unwrap()) as usize
}

#[test]
fn every_gguf_grid_decodes_to_the_bits_of_gguf_py() {
    let mut golden: &[u8] = include_bytes!("golden/grids.bin");
    let mut seen = Vec::new();
    while !golden.is_empty() {
        let length = usize::from(take(&mut golden, 1)[0]);
        let grid = Grid::parse(std::str::from_utf8(take(&mut golden, length)).unwrap()).unwrap();
        let [count, size, values] = std::array::from_fn(|_| whole_number(&mut golden));
        assert_eq!(
            (size, values),
            (grid.block_bytes(), grid.block_len()),
            "{}",
            grid.name()
        );
        let blocks = take(&mut golden, count * size);
        let expected = take(&mut golden, count * values * 4);
        let mut decoded = vec![0f32; count * values];
        grid.decode_row(blocks, &mut decoded);
        for (i, (ours, theirs)) in decoded.iter().zip(expected.chunks_exact(4)).enumerate() {
            let theirs = f32::from_le_bytes(theirs.try_into().unwrap());
            assert_eq!(
                ours.to_bits(),
                theirs.to_bits(),
                "{} value {i}: {ours} {theirs}",
                grid.name()
            );
        }
        seen.push(grid);
    }
    seen.sort();
    let mut all = Grid::GGUF.to_vec();
    all.sort();
    assert_eq!(seen, all);
}
