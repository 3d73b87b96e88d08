//! Safetensors files of a folder: one, or several with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};

use crate::CheckpointError;
use crate::bytes::{Bytes, map_file};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The mapped files of a folder and where each tensor lies in them.
pub(crate) struct Shards {
    files: Vec<(PathBuf, Arc<Mmap>)>,
    tensors: BTreeMap<String, Place>,
}

struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// One stored tensor.
pub(crate) struct Stored<'a> {
    /// The file that holds it.
    pub(crate) path: &'a Path,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
    /// Little-endian, row-major.
    pub(crate) data: &'a [u8],
    map: &'a Arc<Mmap>,
    range: &'a Range<usize>,
}

impl Stored<'_> {
    /// The data, which stay mapped for as long as they are held.
    pub(crate) fn bytes(&self) -> Bytes {
        Bytes::mapped(self.map, self.range.clone())
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// Maps `model.safetensors`, or else the shards that `model.safetensors.index.json` names:
    /// transformers' order of preference.
    ///
    /// # Errors
    /// [`CheckpointError`] for a file that is missing or malformed, a tensor that is there twice,
    /// or one that is not in the shard that the index names.
    pub(crate) fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let mut shards = Self { files: Vec::new(), tensors: BTreeMap::new() };
        let index = dir.join(INDEX);
        let single = dir.join(SINGLE);
        if single.exists() {
            shards.add(single)?;
        } else if index.exists() {
            shards.add_indexed(dir, &index)?;
        } else {
            let message = format!("no weights here: expected `{SINGLE}` or `{INDEX}`");
            return Err(CheckpointError::content(dir, message));
        }
        Ok(shards)
    }

    /// The tensor called `name`.
    pub(crate) fn get(&self, name: &str) -> Option<Stored<'_>> {
        let place = self.tensors.get(name)?;
        let (path, map) = &self.files[place.file];
        let Place { dtype, shape, bytes: range, .. } = place;
        let data = &map[range.clone()];
        Some(Stored { path, dtype: *dtype, shape, data, map, range })
    }

    /// Names that start with `prefix`, sorted.
    pub(crate) fn names<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        let from = self
            .tensors
            .range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        from.map(|(name, _)| name.as_str()).take_while(move |name| name.starts_with(prefix))
    }

    fn add_indexed(&mut self, dir: &Path, path: &Path) -> Result<(), CheckpointError> {
        let fault = |message: String| CheckpointError::content(path, message);
        let text = std::fs::read(path).map_err(|e| CheckpointError::io(path, e))?;
        let index: Index = serde_json::from_slice(&text).map_err(|e| fault(e.to_string()))?;
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        let mut number = BTreeMap::new();
        for name in names {
            if name.contains(['/', '\\']) || !name.ends_with(".safetensors") {
                return Err(fault(format!("`{name}` is not the name of a shard")));
            }
            let shard = dir.join(name);
            if !shard.is_file() {
                return Err(fault(format!("the shard `{name}` is missing: download it")));
            }
            number.insert(name.as_str(), self.files.len());
            self.add(shard)?;
        }
        for (tensor, shard) in &index.weight_map {
            if self.tensors.get(tensor).is_none_or(|place| place.file != number[shard.as_str()]) {
                return Err(fault(format!(
                    "tensor `{tensor}` is not in the shard `{shard}` that the index names"
                )));
            }
        }
        Ok(())
    }

    fn add(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let map = map_file(&path)?;
        let fault = |message: String| CheckpointError::content(&path, message);
        let broken = |e: String| fault(format!("not a valid safetensors file: {e}"));
        // Checks that the tensors fill the file without gaps or overlaps.
        SafeTensors::deserialize(&map).map_err(|e| broken(e.to_string()))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| broken(e.to_string()))?;
        let start = size_of::<u64>() + header;
        serde_json::from_slice::<UniqueKeys>(&map[size_of::<u64>()..start])
            .map_err(|e| broken(e.to_string()))?;
        for (name, info) in metadata.tensors() {
            let (from, to) = info.data_offsets;
            let place = Place {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes: start + from..start + to,
            };
            if let Some(first) = self.tensors.insert(name.clone(), place) {
                let (first, _) = &self.files[first.file];
                return Err(fault(format!("tensor `{name}` is also in {}", first.display())));
            }
        }
        self.files.push((path, map));
        Ok(())
    }
}

/// A JSON object whose keys differ: of equal ones, most readers silently keep the last.
struct UniqueKeys;

impl<'de> Deserialize<'de> for UniqueKeys {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueKeysVisitor)
    }
}

struct UniqueKeysVisitor;

impl<'de> Visitor<'de> for UniqueKeysVisitor {
    type Value = UniqueKeys;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueKeys, A::Error> {
        let mut seen = BTreeSet::new();
        while let Some((key, IgnoredAny)) = map.next_entry::<String, _>()? {
            if let Some(key) = seen.replace(key) {
                return Err(A::Error::custom(format!("tensor `{key}` is listed twice")));
            }
        }
        Ok(UniqueKeys)
    }
}
