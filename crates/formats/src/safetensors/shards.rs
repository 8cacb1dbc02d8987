//! A sharded set: an index that says which file beside it holds each tensor.

use super::{Archive, TensorView, header};
use crate::{Error, Result, json};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

/// Opens every shard that the index names and accounts for every tensor.
pub fn open(directory: &Path, index: &Path) -> Result<Archive> {
    let root = json::read_object(index)?;
    let map = root.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| Error::field(index, "weight_map", "is missing; it maps tensors to shards"))?;
    let mut shards: BTreeMap<&str, BTreeMap<String, TensorView>> = BTreeMap::new();
    let mut files: Vec<PathBuf> = vec![index.into()];
    let mut metadata = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    for (name, shard) in map {
        let field = || format!("weight_map.{name}");
        let shard = shard.as_str().ok_or_else(|| Error::field(index, field(), "is not a file name"))?;
        if !shards.contains_key(shard) {
            let file = inside(directory, shard, index, &field())?;
            let contents = header::read(&file)?;
            files.push(file);
            metadata.extend(contents.metadata);
            shards.insert(shard, contents.tensors);
        }
        let view = shards.get_mut(shard).and_then(|s| s.remove(name));
        let view = view.ok_or_else(|| {
            Error::field(
                index,
                field(),
                format!("names {shard}, which does not hold that tensor; download the set again"),
            )
        })?;
        tensors.insert(name.clone(), view);
    }
    if let Some((shard, name)) = shards.iter().find_map(|(s, left)| left.keys().next().map(|n| (s, n))) {
        let reason =
            format!("does not list {name}, which {shard} holds; index and shards belong to different downloads");
        return Err(Error::field(index, "weight_map", reason));
    }
    Ok(Archive { path: directory.into(), tensors, metadata, files })
}

/// A shard's path, if its name stays inside the directory and it is no link out of it.
fn inside(directory: &Path, shard: &str, index: &Path, field: &str) -> Result<PathBuf> {
    let mut parts = Path::new(shard).components();
    let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
    if !plain || shard.contains(['\0', '\\']) || shard.ends_with('/') {
        return Err(Error::field(index, field, format!("names {shard:?}; a shard lies beside its index")));
    }
    let path = directory.join(shard);
    let missing = |e| Error::Io { path: path.clone(), doing: "open this shard, which the index names", source: e };
    let real = path.canonicalize().map_err(missing)?;
    let home = directory.canonicalize().map_err(Error::io(directory, "open it"))?;
    if real.parent() == Some(&home) || Some(real.parent()) == hub_blobs(&home).as_deref().map(Some) {
        return Ok(path);
    }
    Err(Error::field(
        index,
        field,
        format!("names {shard:?}, a link that leaves the model's folder; copy the file itself there"),
    ))
}

/// Where the hub's cache keeps the content of `MODEL/snapshots/REVISION`: the links there lead to `MODEL/blobs`.
fn hub_blobs(home: &Path) -> Option<PathBuf> {
    let snapshots = home.parent().filter(|p| p.file_name().is_some_and(|n| n == "snapshots"))?;
    Some(snapshots.parent()?.join("blobs"))
}
