//! Packed products on every instruction set, held to plain loops over the values that the storage decodes to and
//! the inputs as they are rounded.
#![allow(clippy::unwrap_used, clippy::panic)]

use tensor::{
    Bytes, Storage, Tensor, Weight,
    grid::{Grid, Table, Zero},
    kernels::{self, Kernels, Tile},
    packed::{
        Form, InputKind, Inputs, Packed,
        form::{Floats, LANES},
    },
};

fn storages() -> Vec<Storage> {
    let mut all = vec![Storage::F32, Storage::F16, Storage::Bf16];
    all.extend(Grid::GGUF.iter().map(|g| Storage::Grid(*g)));
    for bits in 2..=8 {
        for group in [32, 64, 96, 128, 1024] {
            all.extend(
                [Zero::Middle, Zero::Minimum, Zero::Point].map(|z| Storage::Grid(Grid::int(bits, group, z).unwrap())),
            );
        }
        all.extend([Zero::Middle, Zero::Point].map(|z| Storage::Grid(Grid::int(bits, 0, z).unwrap())));
        all.push(Storage::Grid(Grid::int(bits, 24, Zero::Middle).unwrap()));
    }
    for table in [Table::Nf4, Table::E4m3, Table::E5m2] {
        all.extend([0, 64].map(|group| Storage::Grid(Grid::Levels { table, group })));
    }
    all.extend(
        ["palette1g32", "palette2", "palette3g96", "palette4g64", "palette4", "palette6g128"]
            .map(|name| Storage::parse(name).unwrap()),
    );
    all.extend(SPARSE.map(|name| Storage::parse(name).unwrap()));
    all
}

const SPARSE: [&str; 19] = [
    "palette2g32@2:4",
    "palette3@2:4",
    "palette4g64@2:4",
    "palette3g32@50%",
    "int2g64@2:4",
    "int3@2:4",
    "int8g64@2:4",
    "f32@50%",
    "f16@62.5%",
    "bf16@2:4",
    "bf16@50%16x1",
    "int4g32@2:4",
    "int4g96@2:4",
    "int4g64@50%",
    "int3g128@75%1x4",
    "int6g64@4:8",
    "int8@93.7%",
    "int4g64z@1:4",
    "nf4@50%",
];

/// Codes that lie packed as the 16-bit floats nearest to what they stand for.
fn is_widened(storage: Storage) -> bool {
    let floats = matches!(Form::of(storage), Form::F16 | Form::Sparse(Floats::F16, _));
    floats && matches!(storage.dense(), Storage::Grid(_))
}

/// Uniform in -1 to 1, by a fixed generator.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Packs rows with the kernels of `k`, with guard bytes that must stay.
fn pack(k: &Kernels, w: &Weight) -> Vec<u8> {
    let form = Form::of(w.storage());
    let (panel, width) = (form.panel_bytes(w.cols()), w.storage().row_bytes(w.cols()));
    let mut out = vec![0xAB; form.bytes(w.rows(), w.cols())];
    for (p, out) in out.chunks_exact_mut(panel).enumerate() {
        let rows = p * LANES * width..w.rows().min((p + 1) * LANES) * width;
        (k.codes.pack_panel)(w.storage(), w.cols(), &w.bytes()[rows], out);
    }
    out
}

/// Tokens for which every table opens panels, unless it never does.
const OPENED: usize = 65;

/// The product of all rows of `x` with packed panels, opened for many tokens.
fn product(k: &'static Kernels, w: &Weight, panels: &[u8], x: &Tensor) -> Tensor {
    let held = Form::of(w.storage());
    let (mut form, mut opened) = (held, Vec::new());
    if k.codes.opens(held, x.rows()) {
        form = held.opened();
        let [from, to] = [held, form].map(|form| form.panel_bytes(w.cols()));
        opened = vec![0u8; w.rows().div_ceil(LANES) * to];
        for (panel, out) in panels.chunks_exact(from).zip(opened.chunks_exact_mut(to)) {
            // SAFETY: a panel, and room for one.
            unsafe { (k.codes.open)(held, w.cols(), panel.as_ptr(), out.as_mut_ptr()) }
        }
    }
    let panels = if opened.is_empty() { panels } else { &opened };
    let mut inputs = Inputs::default();
    inputs.pack(x, InputKind::of(form, k), k);
    let mut y = Tensor::zeros(x.rows(), w.rows());
    let count = w.rows().div_ceil(LANES);
    for span in inputs.spans() {
        let mut out = vec![0f32; count * span.width * LANES];
        let tile = Tile {
            form,
            weights: panels.as_ptr(),
            panel_bytes: form.panel_bytes(w.cols()),
            panels: count,
            length: form.length(w.cols()),
            inputs: inputs.tile(span),
            next: inputs.tile(span),
            width: span.width,
            out: out.as_mut_ptr(),
            steps: Tile::block(span.width),
            add: false,
        };
        // SAFETY: as the function says.
        unsafe { k.tile(&tile) };
        for t in 0..span.width {
            for o in 0..w.rows() {
                y.row_mut(span.first + t)[o] = out[(o / LANES * span.width + t) * LANES + o % LANES];
            }
        }
    }
    y
}

/// What inputs of a form become: brain floats, or whole multiples of a scale per 64.
fn rounded(form: Form, x: &[f32]) -> Vec<f32> {
    match form {
        Form::F32 | Form::F16 | Form::Sparse(..) => x.to_vec(),
        Form::Half => x.iter().map(|v| half::f16::from_f32(*v).to_f32()).collect(),
        Form::Bf16 => x.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect(),
        Form::Codes(_) => x
            .chunks(64)
            .flat_map(|c| {
                let most = c.iter().fold(0f32, |a, b| a.max(b.abs()));
                c.iter().map(
                    move |v| if most > 0.0 { (v * (127.0 / most)).round_ties_even() * (most / 127.0) } else { 0.0 },
                )
            })
            .collect(),
    }
}

/// The largest value of a row, or what its codes alone stand for where each group has a code of zero.
fn reach(w: &Weight, row: usize, values: &[f32]) -> f64 {
    let most = f64::from(values.iter().fold(0f32, |a, b| a.max(b.abs())));
    let Storage::Grid(grid @ Grid::Int { bits, zero: Zero::Point, .. }) = w.storage() else { return most };
    let width = grid.row_bytes(w.cols());
    let blocks = w.bytes()[row * width..(row + 1) * width].chunks_exact(grid.block_bytes_in(w.cols()));
    let scale = |b: &[u8]| match grid.is_by_row() {
        true => f32::from_le_bytes(b[..4].try_into().unwrap()),
        false => half::f16::from_le_bytes(b[..2].try_into().unwrap()).to_f32(),
    };
    blocks.map(|b| f64::from(scale(b).abs()) * f64::from((1u32 << bits) - 1)).fold(most, f64::max)
}

fn check(k: &'static Kernels, w: &Weight, x: &Tensor, what: &str) {
    let y = product(k, w, &pack(k, w), x);
    let form = Form::of(w.storage());
    let dense = w.to_tensor();
    // Codes that become 16-bit floats are rounded once more.
    let widened = is_widened(w.storage());
    // Below the normal ones they are a sixteen-millionth apart.
    let (bound, step) = if widened { (5e-4, 6e-8) } else { (3e-6, 0.0) };
    let bits = |t: usize| y.row(t).iter().map(|v| v.to_bits());
    for t in 0..x.rows() {
        if t > 0 && x.row(t) == x.row(t - 1) {
            assert!(bits(t).eq(bits(t - 1)), "{} {} {what}: token {t} is not its twin", k.isa, w.storage());
            continue;
        }
        let x = rounded(form, x.row(t));
        for o in 0..w.rows() {
            let terms = || x.iter().zip(dense.row(o)).map(|(a, b)| f64::from(*a) * f64::from(*b));
            let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
            let most = x.iter().map(|v| f64::from(v.abs())).sum::<f64>();
            // Minima are subtracted from sums of all inputs, so their size counts too.
            let size = size + most * reach(w, o, dense.row(o));
            let got = f64::from(y.row(t)[o]);
            // Codes of 8-bit floats that are no numbers.
            if want.is_nan() {
                assert!(got.is_nan(), "{} {} {what}: token {t} row {o}: {got}", k.isa, w.storage());
                continue;
            }
            assert!(
                (got - want).abs() <= bound * size + step * most + 1e-30,
                "{} {} {what}: token {t} row {o}: {got} {want}",
                k.isa,
                w.storage()
            );
        }
    }
}

#[test]
fn every_form_on_every_instruction_set_is_its_plain_sum() {
    for storage in storages() {
        let cols = if storage.fits(288) { 288 } else { 512 };
        for (rows, tokens) in [(5, 1), (33, 3), (16, OPENED + 5)] {
            let w = Weight::encode(&Tensor::from_vec(rows, cols, noise(rows * cols, 3)), storage, None).unwrap();
            let x = Tensor::from_vec(tokens, cols, noise(tokens * cols, 5));
            kernels::available().for_each(|k| check(k, &w, &x, "noise"));
        }
    }
}

#[test]
fn odd_widths_are_padded() {
    for storage in [Storage::F32, Storage::F16, Storage::Bf16, Storage::Grid(Grid::int(4, 32, Zero::Minimum).unwrap())]
    {
        for cols in [1, 31, 33, 63, 172] {
            let w = Weight::encode(&Tensor::from_vec(18, cols, noise(18 * cols, 3)), storage, None).unwrap();
            let x = Tensor::from_vec(2, cols, noise(2 * cols, 5));
            kernels::available().for_each(|k| check(k, &w, &x, "odd"));
        }
    }
}

#[test]
fn adversarial_blocks_and_inputs_do_no_harm() {
    // Every byte pattern whose scales are finite: extreme codes and scales, denormal scales, negative scales.
    let scales = [0x0000u16, 0x0001, 0x83ff, 0x0400, 0x3c00, 0xbc00, 0x2c00];
    for storage in storages() {
        let Storage::Grid(grid) = storage else { continue };
        let cols = 2 * grid.block_len().max(256) + if grid.is_by_row() { 40 } else { 0 };
        for (i, scale) in scales.into_iter().enumerate() {
            for fill in [0x00u8, 0xff, 0x80, 0x7f, 0x5a] {
                let rows = 17;
                let mut bytes = vec![fill; rows * grid.row_bytes(cols)];
                for block in bytes.chunks_exact_mut(grid.block_bytes_in(cols)) {
                    let size = block.len();
                    let places: &[usize] = match grid {
                        Grid::Q2K => &[80, 82],
                        Grid::Q3K => &[108],
                        Grid::Tq1 => &[52],
                        Grid::Tq2 => &[64],
                        Grid::Nvfp4 => continue,
                        Grid::Iq1M => {
                            for quarter in 0..4 {
                                let part = (scale >> (4 * quarter)) as u8 & 15;
                                block[49 + 2 * quarter] = block[49 + 2 * quarter] & 15 | part << 4;
                            }
                            continue;
                        }
                        Grid::Q6K => &[208],
                        // Powers of two that 16 bits hold.
                        Grid::Mxfp4 => {
                            block[0] = [104, 110, 120, 127, 128, 130, 140][i];
                            continue;
                        }
                        grid if grid.is_by_row() => {
                            let scale = half::f16::from_bits(scale).to_f32();
                            block[..4].copy_from_slice(&scale.to_le_bytes());
                            continue;
                        }
                        Grid::Int { zero: Zero::Minimum, .. } | Grid::Q4_1 | Grid::Q5_1 | Grid::Q4K | Grid::Q5K => {
                            &[0, 2]
                        }
                        _ => &[0],
                    };
                    assert!(places.iter().all(|p| p + 2 <= size));
                    places.iter().for_each(|p| block[*p..p + 2].copy_from_slice(&scale.to_le_bytes()));
                }
                let w = Weight::new(storage, rows, cols, Bytes::from_vec(bytes)).unwrap();
                let mut x = noise(2 * cols, i as u64);
                (x[0], x[65], x[130]) = (1e30, 1e-30, f32::MIN_POSITIVE / 4.0);
                x[192..256].fill(0.0);
                let few = Tensor::from_vec(2, cols, x.clone());
                // So many tokens that panels are opened, all of the largest inputs that there are.
                x.resize(OPENED * cols, -1.0);
                let many = Tensor::from_vec(OPENED, cols, x);
                for k in kernels::available() {
                    check(k, &w, &few, "adversarial");
                    if i == fill as usize % scales.len() {
                        check(k, &w, &many, "adversarial, opened");
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    let x = Tensor::from_vec(1, 256, (0..256).map(|i| if i >= 77 { f32::NAN } else { 1.0 }).collect());
    for storage in storages().into_iter().filter(|s| s.fits(256)) {
        let w = Weight::encode(&Tensor::from_vec(4, 256, noise(1024, 1)), storage, None).unwrap();
        for k in kernels::available() {
            assert!(product(k, &w, &pack(k, &w), &x).as_slice().iter().all(|v| v.is_nan()), "{storage} {}", k.isa);
        }
    }
}

#[test]
fn a_token_does_not_depend_on_its_neighbours() {
    for storage in storages().into_iter().filter(|s| s.fits(512)) {
        let w = Weight::encode(&Tensor::from_vec(20, 512, noise(20 * 512, 3)), storage, None).unwrap();
        let tokens = OPENED + 5;
        let x = Tensor::from_vec(tokens, 512, noise(tokens * 512, 5));
        for k in kernels::available() {
            let panels = pack(k, &w);
            let all = product(k, &w, &panels, &x);
            for t in [0, 13, tokens - 1] {
                assert_eq!(product(k, &w, &panels, &x.select_rows(&[t])).row(0), all.row(t), "{storage} {}", k.isa);
            }
        }
    }
}

#[test]
fn fused_instruction_sets_agree_to_the_bit() {
    for storage in storages().into_iter().filter(|s| s.fits(512)) {
        // Tiles of AMX add even and odd columns apart.
        let other = |isa: &str| isa == "generic" || isa == "amx" && storage == Storage::Bf16;
        let fused: Vec<_> = kernels::available().filter(|k| !other(k.isa)).collect();
        let w = Weight::encode(&Tensor::from_vec(20, 512, noise(20 * 512, 3)), storage, None).unwrap();
        let x = Tensor::from_vec(37, 512, noise(37 * 512, 5));
        for pair in fused.windows(2) {
            let [a, b] = [pair[0], pair[1]].map(|k| product(k, &w, &pack(k, &w), &x));
            assert_eq!(a, b, "{storage}: {} {}", pair[0].isa, pair[1].isa);
        }
    }
}

#[test]
fn packed_rows_read_back_as_they_were_stored() {
    for storage in storages() {
        let cols = if storage.fits(288) { 288 } else { 512 };
        let w = Weight::encode(&Tensor::from_vec(19, cols, noise(19 * cols, 3)), storage, None).unwrap();
        let packed = Packed::all(vec![w.clone()]).unwrap();
        assert!(matches!(packed[0], Weight::Packed(_)), "{storage}");
        let (got, want) = (packed[0].to_tensor(), w.to_tensor());
        let widened = is_widened(storage);
        let bound = |v: f32| if widened { v.abs() / 2000.0 + 1e-7 } else { 0.0 };
        let same = got.as_slice().iter().zip(want.as_slice()).all(|(a, b)| (a - b).abs() <= bound(*b));
        assert!(same, "{storage}");
        assert_eq!(packed[0].size_bytes(), w.size_bytes(), "{storage}");
    }
}
