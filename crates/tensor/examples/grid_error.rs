//! What each GGUF grid costs on given rows: the weighted squared error of its fit and its speed.
//!
//! `grid_error VALUES.f32 COLS [IMPORTANCE.f32]`; both files are little-endian floats, the second one as long as
//! a row. One line a grid: name, error, million values a second on one thread.

use std::time::Instant;
use tensor::grid::Grid;

fn floats(path: &str) -> std::io::Result<Vec<f32>> {
    let bytes = std::fs::read(path)?;
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [values, cols, importance @ ..] = arguments.as_slice() else {
        return Err("grid_error VALUES.f32 COLS [IMPORTANCE.f32]".into());
    };
    let (values, cols) = (floats(values)?, cols.parse::<usize>()?);
    let importance = importance.first().map(|path| floats(path)).transpose()?;
    for grid in Grid::GGUF.iter().filter(|g| g.fits(cols)) {
        let (mut bytes, mut decoded) = (vec![0; grid.row_bytes(cols)], vec![0f32; cols]);
        let (mut error, mut seconds) = (0f64, 0f64);
        for row in values.chunks_exact(cols) {
            let start = Instant::now();
            grid.quantize_row(row, importance.as_deref(), &mut bytes);
            seconds += start.elapsed().as_secs_f64();
            grid.decode_row(&bytes, &mut decoded);
            for i in 0..cols {
                let weight = importance.as_ref().map_or(1.0, |w| f64::from(w[i]));
                error += weight * (f64::from(row[i]) - f64::from(decoded[i])).powi(2);
            }
        }
        println!("{} {error:e} {:.2}", grid.name(), values.len() as f64 / seconds / 1e6);
    }
    Ok(())
}
