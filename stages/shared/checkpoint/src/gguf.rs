//! GGUF files, versions 2 and 3, little endian, mapped into memory.
//!
//! Every length and offset is checked against the file before use: a cut or malicious file gives
//! [`CheckpointError::Gguf`] with the byte offset, never a panic and never a huge allocation.
//! Format: `docs/gguf.md` of ggml.

mod header;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use self::header::Cursor;
use crate::bytes::{Bytes, map_file};
use crate::{CheckpointError, GgmlType};

/// A mapped GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Arc<Mmap>,
    version: u32,
    metadata: BTreeMap<String, Metadata>,
    tensors: Vec<TensorInfo>,
    index: BTreeMap<String, usize>,
}

/// One metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Metadata {
    /// Unsigned integer of any width.
    U64(u64),
    /// Signed integer of any width.
    I64(i64),
    /// 32-bit float.
    F32(f32),
    /// 64-bit float.
    F64(f64),
    /// Boolean.
    Bool(bool),
    /// UTF-8 text.
    Str(String),
    /// Values of one type.
    Array(Vec<Metadata>),
}

/// Name, type, shape and place of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Storage type.
    pub dtype: GgmlType,
    /// Row-major shape, slowest dimension first: ggml's `ne` reversed, so `[out, in]` of a linear.
    pub shape: Vec<u64>,
    /// Byte offset inside the file.
    pub offset: u64,
    /// Bytes of data.
    pub bytes: u64,
}

impl Metadata {
    /// The value as an unsigned integer.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::U64(v) => Some(*v),
            Self::I64(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// The value as a 32-bit float.
    pub fn as_f32(&self) -> Option<f32> {
        match self {
            Self::F32(v) => Some(*v),
            Self::F64(v) => Some(*v as f32),
            _ => None,
        }
    }

    /// The value as a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(v) = self { Some(*v) } else { None }
    }

    /// The value as text.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Str(v) = self { Some(v) } else { None }
    }

    /// The value as an array.
    pub fn as_array(&self) -> Option<&[Metadata]> {
        if let Self::Array(v) = self { Some(v) } else { None }
    }
}

impl Gguf {
    /// Maps and checks the file at `path`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] or [`CheckpointError::Gguf`].
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let map = map_file(path)?;
        let (version, metadata, tensors) = Cursor::new(&map, path).header()?;
        let index = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Self { path: path.to_owned(), map, version, metadata, tensors, index })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The metadata value under `key`.
    pub fn metadata(&self, key: &str) -> Option<&Metadata> {
        self.metadata.get(key)
    }

    /// Every metadata value, by key.
    pub fn all_metadata(&self) -> &BTreeMap<String, Metadata> {
        &self.metadata
    }

    /// The unsigned integer under `key`.
    ///
    /// # Errors
    /// [`CheckpointError::Content`] where the key is missing or has another type.
    pub fn u64(&self, key: &str) -> Result<u64, CheckpointError> {
        self.typed(key, "an unsigned integer", Metadata::as_u64)
    }

    /// The float under `key`.
    ///
    /// # Errors
    /// As [`Gguf::u64`].
    pub fn f32(&self, key: &str) -> Result<f32, CheckpointError> {
        self.typed(key, "a float", Metadata::as_f32)
    }

    /// The text under `key`.
    ///
    /// # Errors
    /// As [`Gguf::u64`].
    pub fn str(&self, key: &str) -> Result<&str, CheckpointError> {
        self.typed(key, "text", Metadata::as_str)
    }

    /// The array of texts under `key`.
    ///
    /// # Errors
    /// As [`Gguf::u64`].
    pub fn strings(&self, key: &str) -> Result<Vec<&str>, CheckpointError> {
        self.typed(key, "an array of text", |v| {
            v.as_array()?.iter().map(Metadata::as_str).collect()
        })
    }

    /// The array of integers under `key`.
    ///
    /// # Errors
    /// As [`Gguf::u64`].
    pub fn integers(&self, key: &str) -> Result<Vec<i64>, CheckpointError> {
        self.typed(key, "an array of integers", |v| {
            let integer = |v: &Metadata| match v {
                Metadata::I64(v) => Some(*v),
                Metadata::U64(v) => i64::try_from(*v).ok(),
                _ => None,
            };
            v.as_array()?.iter().map(integer).collect()
        })
    }

    /// Every tensor, in file order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|i| &self.tensors[*i])
    }

    /// The raw blocks of the tensor called `name`.
    ///
    /// # Errors
    /// [`CheckpointError::Content`] where there is none.
    pub fn tensor_data(&self, name: &str) -> Result<Bytes, CheckpointError> {
        let tensor = self.tensor(name).ok_or_else(|| {
            CheckpointError::content(&self.path, format!("has no tensor `{name}`"))
        })?;
        // Bounds were checked when the header was read.
        let end = tensor.offset + tensor.bytes;
        Ok(Bytes::mapped(&self.map, tensor.offset as usize..end as usize))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        get: impl Fn(&'a Metadata) -> Option<T>,
    ) -> Result<T, CheckpointError> {
        let value = self.metadata.get(key).ok_or_else(|| {
            CheckpointError::content(&self.path, format!("has no metadata `{key}`"))
        })?;
        get(value).ok_or_else(|| {
            CheckpointError::content(&self.path, format!("metadata `{key}` is not {wanted}"))
        })
    }
}
