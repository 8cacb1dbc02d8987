//! Tables in Parquet files, row by row as JSON: how data sets are published. The `parquet` library reads them; how much a
//! file may unfold is checked before.

use crate::{Error, Result, check_kind};
use parquet::{
    file::{
        metadata::ParquetMetaData,
        reader::{FileReader, SerializedFileReader},
    },
    schema::types::Type,
};
use serde_json::Value;
use std::{
    fs::File,
    io::Read,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
};

/// Times its bytes that a file may unfold to; text comes to five.
const UNFOLDS: u64 = 200;

/// The rows of a table, of whose columns those of `wanted` that it has are read.
///
/// # Errors
/// If the file cannot be read, is damaged, or has none of these columns.
pub fn rows(path: &Path, wanted: &[&str]) -> Result<Vec<Value>> {
    let mut file = File::open(path).map_err(Error::io(path, "read it"))?;
    let mut start = [0u8; 64];
    let len = file.read(&mut start).map_err(Error::io(path, "read it"))?;
    if !start[..len].starts_with(b"PAR1") {
        check_kind(path, &start[..len], "a Parquet file")?;
        return Err(Error::field(path, "the first bytes", "are not those of a Parquet file"));
    }
    let bytes = file.metadata().map_err(Error::io(path, "read it"))?.len();
    match catch_unwind(AssertUnwindSafe(|| read(file, bytes, wanted))) {
        Ok(Ok(rows)) => Ok(rows),
        Ok(Err(reason)) => Err(Error::field(path, "the table", reason)),
        Err(_) => Err(Error::field(path, "the table", "is damaged: the library that reads it stopped")),
    }
}

fn read(file: File, bytes: u64, wanted: &[&str]) -> std::result::Result<Vec<Value>, String> {
    let said = |e: parquet::errors::ParquetError| format!("cannot be read: {e}");
    let reader = SerializedFileReader::new(file).map_err(said)?;
    let about = reader.metadata();
    check_size(about, bytes)?;
    let root = about.file_metadata().schema();
    let columns: Vec<Arc<Type>> = root.get_fields().iter().filter(|f| wanted.contains(&f.name())).cloned().collect();
    if columns.is_empty() {
        let names: Vec<&str> = root.get_fields().iter().map(|f| f.name()).take(20).collect();
        return Err(format!("has the columns {}, and none of {}", names.join(", "), wanted.join(", ")));
    }
    let projection = Type::group_type_builder(root.name()).with_fields(columns).build().map_err(said)?;
    let rows = reader.get_row_iter(Some(projection)).map_err(said)?;
    rows.map(|row| Ok(row.map_err(said)?.to_json_value())).collect()
}

/// Refuses a file whose columns claim to be much larger than it.
fn check_size(about: &ParquetMetaData, bytes: u64) -> std::result::Result<(), String> {
    let columns = about.row_groups().iter().flat_map(|group| group.columns());
    let whole = columns.map(|c| u64::try_from(c.uncompressed_size()).unwrap_or(u64::MAX)).fold(0, u64::saturating_add);
    if whole > bytes.saturating_mul(UNFOLDS).saturating_add(1 << 20) {
        return Err(format!("claims to hold {whole} bytes in a file of {bytes}"));
    }
    Ok(())
}
