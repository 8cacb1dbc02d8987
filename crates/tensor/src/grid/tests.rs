//! What holds for every grid.

use super::*;

/// Uniform in -1 to 1, by a fixed generator.
pub(super) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = move || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() + next() * next() * 2.0).collect()
}

pub(super) fn all() -> Vec<Grid> {
    let mut all = Grid::GGUF.to_vec();
    for bits in 2..=8 {
        for group in [8, 32, 128, 1024] {
            all.extend([Zero::Middle, Zero::Minimum, Zero::Point].map(|z| Grid::int(bits, group, z).unwrap()));
        }
        all.extend([Zero::Middle, Zero::Point].map(|z| Grid::int(bits, 0, z).unwrap()));
    }
    for table in [Table::Nf4, Table::E4m3, Table::E5m2] {
        all.extend([0, 32, 64, 128].map(|group| Grid::Levels { table, group }));
    }
    all
}

/// Columns of a row that is one block.
fn one_block(grid: Grid) -> usize {
    if grid.is_by_row() { 88 } else { grid.block_len() }
}

#[test]
fn names_round_trip_and_a_wrong_one_says_what_there_is() {
    for grid in all() {
        assert_eq!(Grid::parse(&grid.name().to_uppercase()), Ok(grid));
    }
    for bad in ["q9_0", "int1g32", "int4g30", "int4g0", "int4g2048", "int4a", "fp8", "nf4g", ""] {
        assert!(Grid::parse(bad).unwrap_err().to_string().contains("iq4_nl"), "{bad}");
    }
}

#[test]
fn a_block_gives_the_values_that_its_bytes_decode_to() {
    for grid in all() {
        for seed in 0..20 {
            let x = noise(one_block(grid), seed);
            let block = grid.fit(&x, None);
            let mut codes = vec![0; x.len()];
            block.round_all(&x, None, &mut codes);
            let mut bytes = vec![0; grid.row_bytes(x.len())];
            grid.encode(&block, &codes, &mut bytes);
            let mut decoded = vec![0.0; x.len()];
            grid.decode_row(&bytes, &mut decoded);
            for i in 0..x.len() {
                assert_eq!(decoded[i], block.value(i, codes[i]), "{} value {i}", grid.name());
            }
        }
    }
}

#[test]
fn rounding_is_to_the_nearest_level() {
    for grid in all() {
        let x = noise(one_block(grid), 3);
        let block = grid.fit(&x, None);
        if block.span() > 1 {
            continue;
        }
        for (i, v) in x.iter().enumerate() {
            let (code, value) = block.round(i, *v);
            for other in [code.wrapping_sub(1), code.wrapping_add(1)] {
                // Codes of an eight-bit float end where numbers do.
                if other <= block.highest() && block.value(i, other).is_finite() {
                    let worse = (block.value(i, other) - v).abs();
                    assert!((value - v).abs() <= worse * 1.0001 + 1e-7, "{} {v} {value}", grid.name());
                }
            }
        }
    }
}

#[test]
fn zeros_stay_zero_and_odd_values_do_no_harm() {
    for grid in all() {
        let n = one_block(grid);
        let mut bytes = vec![0; grid.row_bytes(n)];
        let mut out = vec![1.0; n];
        grid.quantize_row(&vec![0.0; n], None, &mut bytes);
        grid.decode_row(&bytes, &mut out);
        assert!(out.iter().all(|v| *v == 0.0), "{}", grid.name());
        for odd in [f32::NAN, f32::INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-30] {
            let mut x = noise(n, 5);
            x[0] = odd;
            grid.quantize_row(&x, None, &mut bytes);
        }
        for fill in [0x00, 0xff, 0x7f, 0x80, 0xaa] {
            grid.decode_row(&vec![fill; grid.row_bytes(n)], &mut out);
        }
    }
}

#[test]
fn every_instruction_set_decodes_to_the_same_bits() {
    for grid in all() {
        let cols = 3 * one_block(grid) - if matches!(grid, Grid::Int { .. } | Grid::Levels { .. }) { 5 } else { 0 };
        let mut bytes = vec![0; grid.row_bytes(cols)];
        for seed in 1..6 {
            grid.quantize_row(&noise(cols, seed), None, &mut bytes);
            let decode = |k: &crate::kernels::Kernels| {
                let mut out = vec![0.0; cols];
                (k.decode_row)(grid, &bytes, &mut out);
                out.iter().map(|v: &f32| v.to_bits()).collect::<Vec<u32>>()
            };
            let tables: Vec<_> = crate::kernels::available().collect();
            for k in &tables {
                assert!(decode(k) == decode(tables[0]), "{} {}", grid.name(), k.isa);
            }
        }
    }
}

#[test]
fn short_last_groups_are_padded() {
    let grid = Grid::int(3, 32, Zero::Middle).unwrap();
    let x = noise(44, 1);
    let mut bytes = vec![0; grid.row_bytes(44)];
    grid.quantize_row(&x, None, &mut bytes);
    let mut out = vec![0.0; 44];
    grid.decode_row(&bytes, &mut out);
    let error: f32 = x.iter().zip(&out).map(|(a, b)| (a - b) * (a - b)).sum();
    assert!(bytes.len() == 28 && error < 0.1 * x.iter().map(|v| v * v).sum::<f32>());
}

#[test]
fn more_bits_cost_less_error() {
    let x = noise(2560, 11);
    let power: f32 = x.iter().map(|v| v * v).sum();
    let error = |grid: Grid| {
        let mut bytes = vec![0; grid.row_bytes(x.len())];
        grid.quantize_row(&x, None, &mut bytes);
        let mut out = vec![0.0; x.len()];
        grid.decode_row(&bytes, &mut out);
        x.iter().zip(&out).map(|(a, b)| (a - b) * (a - b)).sum::<f32>() / power
    };
    let bounds = [
        (Grid::Iq1S, 0.26),
        (Grid::Tq1, 0.32),
        (Grid::Tq2, 0.32),
        (Grid::Iq1M, 0.24),
        (Grid::Iq2Xxs, 0.16),
        (Grid::Iq2Xs, 0.13),
        (Grid::Iq2S, 0.11),
        (Grid::Q2K, 0.09),
        (Grid::Iq3Xxs, 0.045),
        (Grid::Iq3S, 0.03),
        (Grid::Nvfp4, 0.009),
        (Grid::Q3K, 0.023),
        (Grid::Iq4Xs, 0.0065),
        (Grid::Mxfp4, 0.014),
        (Grid::Levels { table: Table::Nf4, group: 64 }, 0.0085),
        (Grid::Levels { table: Table::E4m3, group: 0 }, 0.0008),
        (Grid::Levels { table: Table::E5m2, group: 0 }, 0.003),
        (Grid::Int { bits: 8, group: 0, zero: Zero::Middle }, 0.0001),
        (Grid::Int { bits: 4, group: 64, zero: Zero::Point }, 0.0085),
        (Grid::Q4K, 0.0055),
        (Grid::Q4_0, 0.008),
        (Grid::Iq4Nl, 0.008),
        (Grid::Q4_1, 0.006),
        (Grid::Q5K, 0.0013),
        (Grid::Q5_0, 0.002),
        (Grid::Q5_1, 0.0014),
        (Grid::Q6K, 0.0004),
        (Grid::Q8_0, 0.00003),
    ];
    for (grid, bound) in bounds {
        assert!(error(grid) < bound, "{} {}", grid.name(), error(grid));
    }
    for group in [32, 128] {
        for bits in 3..=8 {
            let (more, less) =
                (Grid::int(bits, group, Zero::Middle).unwrap(), Grid::int(bits - 1, group, Zero::Middle).unwrap());
            assert!(error(more) < 0.4 * error(less), "{}", more.name());
        }
    }
}
