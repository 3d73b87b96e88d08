//! GGUF files, versions 2 and 3, little endian, mapped into memory.
//!
//! Every length and offset is checked against the file before use: a cut or malicious file gives
//! [`CheckpointError::Gguf`] with the byte offset, never a panic and never a huge allocation.
//! Format: `docs/gguf.md` of ggml.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use crate::bytes::{Bytes, map_file};
use crate::{CheckpointError, GgmlType};

/// Alignment of tensor data where the file does not say otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
/// ggml's own limit on dimensions.
const MAX_DIMS: u32 = 4;
/// Arrays of arrays deeper than this are refused: no known writer nests at all.
const MAX_DEPTH: u32 = 4;
/// Array elements of all metadata together: a value takes 32 bytes of memory for as little as one
/// byte of file. The largest tokenizers have about a million tokens and merges.
const MAX_ELEMENTS: u64 = 1 << 24;

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

/// Version, metadata and tensors of a file.
type Header = (u32, BTreeMap<String, Metadata>, Vec<TensorInfo>);

/// Reads values one after the other, each checked against the end of the file.
struct Cursor<'a> {
    data: &'a [u8],
    at: usize,
    path: &'a Path,
    elements: u64,
}

impl<'a> Cursor<'a> {
    fn new(data: &'a [u8], path: &'a Path) -> Self {
        Self { data, at: 0, path, elements: 0 }
    }

    fn fault(&self, offset: usize, message: impl Into<String>) -> CheckpointError {
        CheckpointError::Gguf {
            path: self.path.to_owned(),
            offset: offset as u64,
            message: message.into(),
        }
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], CheckpointError> {
        let left = self.data.len() - self.at;
        let len = usize::try_from(len).ok().filter(|len| *len <= left).ok_or_else(|| {
            self.fault(self.at, format!("{what} needs {len} bytes, the file has {left} left"))
        })?;
        let bytes = &self.data[self.at..self.at + len];
        self.at += len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], CheckpointError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, CheckpointError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, CheckpointError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `each` bytes: bounded by what is left of the file.
    fn count(&mut self, each: u64, what: &str) -> Result<u64, CheckpointError> {
        let start = self.at;
        let count = self.u64(what)?;
        let left = (self.data.len() - self.at) as u64;
        if count.checked_mul(each).is_none_or(|bytes| bytes > left) {
            let message = format!("{what} is {count}, more than the {left} bytes left can hold");
            return Err(self.fault(start, message));
        }
        Ok(count)
    }

    fn string(&mut self, what: &str) -> Result<String, CheckpointError> {
        let len = self.count(1, what)?;
        let start = self.at;
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(e) => Err(self.fault(start + e.valid_up_to(), format!("{what} is not UTF-8"))),
        }
    }

    fn header(mut self) -> Result<Header, CheckpointError> {
        if self.array::<4>("the magic number")? != *b"GGUF" {
            return Err(self.fault(0, "it does not start with `GGUF`"));
        }
        let version = self.u32("the version")?;
        if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
            return Err(self.fault(4, "it is big endian, which is not supported"));
        }
        if !(2..=3).contains(&version) {
            return Err(self.fault(4, format!("version {version} is not 2 or 3")));
        }
        // A tensor's entry takes at least 24 bytes, a metadata pair at least 13.
        let tensors = self.count(24, "the number of tensors")?;
        let pairs = self.count(13, "the number of metadata values")?;
        let metadata = self.metadata(pairs)?;
        let tensors = self.tensors(tensors, &metadata)?;
        Ok((version, metadata, tensors))
    }

    fn metadata(&mut self, pairs: u64) -> Result<BTreeMap<String, Metadata>, CheckpointError> {
        let mut metadata = BTreeMap::new();
        for _ in 0..pairs {
            let start = self.at;
            let key = self.string("a metadata key")?;
            let kind = self.u32("a metadata type")?;
            let value = self.value(kind, &format!("metadata `{key}`"), 0)?;
            if metadata.contains_key(&key) {
                return Err(self.fault(start, format!("metadata `{key}` is given twice")));
            }
            metadata.insert(key, value);
        }
        Ok(metadata)
    }

    fn value(&mut self, kind: u32, what: &str, depth: u32) -> Result<Metadata, CheckpointError> {
        let start = self.at;
        Ok(match kind {
            0 => Metadata::U64(self.array::<1>(what)?[0].into()),
            1 => Metadata::I64(i8::from_le_bytes(self.array(what)?).into()),
            2 => Metadata::U64(u16::from_le_bytes(self.array(what)?).into()),
            3 => Metadata::I64(i16::from_le_bytes(self.array(what)?).into()),
            4 => Metadata::U64(self.u32(what)?.into()),
            5 => Metadata::I64(i32::from_le_bytes(self.array(what)?).into()),
            6 => Metadata::F32(f32::from_le_bytes(self.array(what)?)),
            7 => match self.array::<1>(what)?[0] {
                flag @ (0 | 1) => Metadata::Bool(flag == 1),
                other => return Err(self.fault(start, format!("{what} is {other}, not 0 or 1"))),
            },
            8 => Metadata::Str(self.string(what)?),
            9 if depth < MAX_DEPTH => {
                let of = self.u32(what)?;
                let each = match of {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    9 => 12,
                    _ => 8,
                };
                let len = self.count(each, what)?;
                self.elements += len;
                if self.elements > MAX_ELEMENTS {
                    let message = format!("{what} brings the array elements over {MAX_ELEMENTS}");
                    return Err(self.fault(start, message));
                }
                let values = (0..len).map(|_| self.value(of, what, depth + 1));
                Metadata::Array(values.collect::<Result<_, _>>()?)
            }
            10 => Metadata::U64(self.u64(what)?),
            11 => Metadata::I64(i64::from_le_bytes(self.array(what)?)),
            12 => Metadata::F64(f64::from_le_bytes(self.array(what)?)),
            _ => return Err(self.fault(start, format!("{what} has the unknown type {kind}"))),
        })
    }

    fn tensors(
        &mut self,
        count: u64,
        metadata: &BTreeMap<String, Metadata>,
    ) -> Result<Vec<TensorInfo>, CheckpointError> {
        let mut tensors = Vec::new();
        let mut starts = Vec::new();
        for _ in 0..count {
            starts.push(self.at);
            tensors.push(self.tensor()?);
        }
        let alignment = match metadata.get("general.alignment").map(Metadata::as_u64) {
            None => DEFAULT_ALIGNMENT,
            Some(Some(a)) if a.is_power_of_two() && a <= 1 << 20 => a,
            Some(_) => return Err(self.fault(self.at, "`general.alignment` is not a power of two")),
        };
        let base = (self.at as u64).next_multiple_of(alignment);
        let mut seen = std::collections::BTreeSet::new();
        for (tensor, start) in tensors.iter_mut().zip(starts) {
            let name = &tensor.name;
            if !seen.insert(name.clone()) {
                return Err(self.fault(start, format!("tensor `{name}` is listed twice")));
            }
            if !tensor.offset.is_multiple_of(alignment) {
                return Err(self.fault(start, format!("tensor `{name}` is not aligned")));
            }
            let end = base.checked_add(tensor.offset).and_then(|o| o.checked_add(tensor.bytes));
            if end.is_none_or(|end| end > self.data.len() as u64) {
                let (bytes, len) = (tensor.bytes, self.data.len());
                let message = format!(
                    "tensor `{name}` ({bytes} bytes) runs past the end of the file of {len} bytes"
                );
                return Err(self.fault(start, message));
            }
            tensor.offset += base;
        }
        Ok(tensors)
    }

    fn tensor(&mut self) -> Result<TensorInfo, CheckpointError> {
        let start = self.at;
        let name = self.string("a tensor name")?;
        let dims = self.u32("a number of dimensions")?;
        if dims > MAX_DIMS {
            return Err(self.fault(start, format!("tensor `{name}` has {dims} dimensions")));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            shape.push(self.u64("a dimension")?);
        }
        shape.reverse();
        let id = self.u32("a tensor type")?;
        let offset = self.u64("a tensor offset")?;
        let dtype = GgmlType::from_id(id).ok_or_else(|| {
            self.fault(start, format!("tensor `{name}` has the unsupported ggml type {id}"))
        })?;
        let bytes = dtype.tensor_bytes(&shape).ok_or_else(|| {
            let message =
                format!("tensor `{name}` has shape {shape:?}, which {dtype:?} cannot hold");
            self.fault(start, message)
        })?;
        Ok(TensorInfo { name, dtype, shape, offset, bytes })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn string(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    /// One metadata text, one array, one F32 tensor `[2, 3]` and one Q8_0 tensor `[1, 32]`.
    fn sample() -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend(2_u64.to_le_bytes());
        out.extend(2_u64.to_le_bytes());
        string(&mut out, "general.architecture");
        out.extend(8_u32.to_le_bytes());
        string(&mut out, "llama");
        string(&mut out, "tokenizer.ggml.token_type");
        out.extend(9_u32.to_le_bytes());
        out.extend(5_u32.to_le_bytes());
        out.extend(2_u64.to_le_bytes());
        out.extend(1_i32.to_le_bytes());
        out.extend((-3_i32).to_le_bytes());
        for (name, ne, kind, offset) in [("a", [3_u64, 2], 0_u32, 0_u64), ("b", [32, 1], 8, 32)] {
            string(&mut out, name);
            out.extend(2_u32.to_le_bytes());
            for d in ne {
                out.extend(d.to_le_bytes());
            }
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32), 0);
        for value in 0..6 {
            out.extend((value as f32).to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend([7; 34]);
        out
    }

    fn open(bytes: &[u8]) -> Result<Gguf, CheckpointError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        Gguf::open(file.path())
    }

    #[test]
    fn shapes_are_row_major_and_data_is_found() {
        let gguf = open(&sample()).unwrap();
        assert_eq!(gguf.str("general.architecture").unwrap(), "llama");
        assert_eq!(gguf.integers("tokenizer.ggml.token_type").unwrap(), [1, -3]);
        assert_eq!(gguf.tensor("a").unwrap().shape, [2, 3]);
        assert_eq!(gguf.tensor_data("a").unwrap()[20..], 5_f32.to_le_bytes());
        assert_eq!(*gguf.tensor_data("b").unwrap(), [7; 34]);
        assert!(gguf.u64("general.architecture").unwrap_err().to_string().contains("not an uns"));
    }

    #[test]
    fn file_cut_anywhere_is_an_error_with_an_offset() {
        let whole = sample();
        for len in 0..whole.len() {
            let error = open(&whole[..len]).unwrap_err().to_string();
            assert!(error.contains("byte"), "cut at {len}: {error}");
        }
    }

    #[test]
    fn huge_count_does_not_allocate() {
        let mut bytes = sample();
        bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        let error = open(&bytes).unwrap_err().to_string();
        assert!(error.contains("number of tensors") && error.ends_with("at byte 8"), "{error}");
    }

    proptest! {
        #[test]
        fn any_flipped_bytes_never_panic(
            flips in prop::collection::vec((0_usize..400, any::<u8>()), 1..8)
        ) {
            let mut bytes = sample();
            for (at, value) in flips {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            if let Ok(gguf) = open(&bytes) {
                for tensor in gguf.tensors() {
                    let data = gguf.tensor_data(&tensor.name).unwrap();
                    prop_assert_eq!(data.len() as u64, tensor.bytes);
                }
            }
        }
    }
}
