//! The header of a GGUF file: version, metadata and the list of tensors.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Metadata, TensorInfo};
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

/// Version, metadata and tensors of a file.
pub(super) type Header = (u32, BTreeMap<String, Metadata>, Vec<TensorInfo>);

/// Reads values one after the other, each checked against the end of the file.
pub(super) struct Cursor<'a> {
    data: &'a [u8],
    at: usize,
    path: &'a Path,
    elements: u64,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(data: &'a [u8], path: &'a Path) -> Self {
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

    pub(super) fn header(mut self) -> Result<Header, CheckpointError> {
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
