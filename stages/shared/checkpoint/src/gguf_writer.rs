//! Writes GGUF version 3, little endian, tensor by tensor: nothing but one tensor is in memory.

use std::io::{self, Write};

use crate::{Family, GgmlType, ModelConfig};

/// Alignment of tensor data: the format's default.
const ALIGNMENT: u64 = 32;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// The head of a GGUF file in the making: metadata and the tensors that will follow.
#[derive(Debug, Default)]
pub struct GgufWriter {
    pairs: u64,
    metadata: Vec<u8>,
    tensors: Vec<(String, GgmlType, Vec<u64>)>,
}

impl GgufWriter {
    /// A file without metadata or tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an unsigned 32-bit integer; keys are unique.
    pub fn u32(&mut self, key: &str, value: u32) {
        self.pair(key, U32, &value.to_le_bytes());
    }

    /// Adds a 32-bit float.
    pub fn f32(&mut self, key: &str, value: f32) {
        self.pair(key, F32, &value.to_le_bytes());
    }

    /// Adds a boolean.
    pub fn bool(&mut self, key: &str, value: bool) {
        self.pair(key, BOOL, &[u8::from(value)]);
    }

    /// Adds text.
    pub fn str(&mut self, key: &str, value: &str) {
        self.pair(key, STRING, &string(value));
    }

    /// Adds an array of texts.
    pub fn strings(&mut self, key: &str, values: &[String]) {
        let items = values.iter().flat_map(|v| string(v));
        self.array(key, STRING, values.len(), items);
    }

    /// Adds an array of signed 32-bit integers.
    pub fn i32s(&mut self, key: &str, values: &[i32]) {
        self.array(key, I32, values.len(), values.iter().flat_map(|v| v.to_le_bytes()));
    }

    /// Adds an array of 32-bit floats.
    pub fn f32s(&mut self, key: &str, values: &[f32]) {
        self.array(key, F32, values.len(), values.iter().flat_map(|v| v.to_le_bytes()));
    }

    fn array(&mut self, key: &str, of: u32, len: usize, items: impl Iterator<Item = u8>) {
        let mut value = of.to_le_bytes().to_vec();
        value.extend((len as u64).to_le_bytes());
        value.extend(items);
        self.pair(key, ARRAY, &value);
    }

    fn pair(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.pairs += 1;
        self.metadata.extend(string(key));
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend(value);
    }

    /// Declares the next tensor, of a row-major `shape` as in [`crate::TensorInfo`]; names are
    /// unique.
    ///
    /// # Errors
    /// Says that the shape does not fit the blocks of the type.
    pub fn tensor(&mut self, name: &str, dtype: GgmlType, shape: &[usize]) -> Result<(), String> {
        let shape: Vec<u64> = shape.iter().map(|d| *d as u64).collect();
        if dtype.tensor_bytes(&shape).is_none() {
            return Err(format!("`{name}` {shape:?} does not fit the blocks of {dtype:?}"));
        }
        self.tensors.push((name.to_owned(), dtype, shape));
        Ok(())
    }

    /// Writes the file; `data` gives the blocks of each declared tensor, in order.
    ///
    /// # Errors
    /// What `data` fails with, or what the disk says, as `E`; data of a wrong length is
    /// [`io::ErrorKind::InvalidData`].
    pub fn write<E: From<io::Error>>(
        &self,
        out: &mut impl Write,
        mut data: impl FnMut(usize) -> Result<Vec<u8>, E>,
    ) -> Result<(), E> {
        let head = self.head();
        out.write_all(&head)?;
        out.write_all(&vec![0; padding(head.len() as u64)])?;
        for (index, (name, dtype, shape)) in self.tensors.iter().enumerate() {
            let bytes = data(index)?;
            if dtype.tensor_bytes(shape) != Some(bytes.len() as u64) {
                let message = format!("`{name}`: {} bytes for {dtype:?} {shape:?}", bytes.len());
                return Err(io::Error::new(io::ErrorKind::InvalidData, message).into());
            }
            out.write_all(&bytes)?;
            out.write_all(&vec![0; padding(bytes.len() as u64)])?;
        }
        Ok(())
    }

    fn head(&self) -> Vec<u8> {
        let mut head = b"GGUF".to_vec();
        head.extend(3_u32.to_le_bytes());
        head.extend((self.tensors.len() as u64).to_le_bytes());
        head.extend(self.pairs.to_le_bytes());
        head.extend(&self.metadata);
        let mut offset = 0;
        for (name, dtype, shape) in &self.tensors {
            head.extend(string(name));
            head.extend((shape.len() as u32).to_le_bytes());
            // ggml lists the fastest dimension first.
            head.extend(shape.iter().rev().flat_map(|d| d.to_le_bytes()));
            head.extend(dtype.id().to_le_bytes());
            head.extend(u64::to_le_bytes(offset));
            let bytes = dtype.tensor_bytes(shape).expect("invariant: checked when declared");
            offset += bytes + padding(bytes) as u64;
        }
        head
    }
}

/// Rows in llama.cpp's order, from transformers': in the family Llama, row `j * d/2 + i` of a head of
/// q or k becomes row `2i + j` (`permute` of `convert_hf_to_gguf.py`), elsewhere nothing changes.
/// `name` is the tensor's in GGUF, `width` the length of a row.
pub fn gguf_rows(config: &ModelConfig, name: &str, values: Vec<f32>, width: usize) -> Vec<f32> {
    let heads = match name.rsplit('.').nth(1) {
        Some("attn_q") => config.num_attention_heads,
        Some("attn_k") => config.num_key_value_heads,
        _ => return values,
    };
    if config.family != Family::Llama {
        return values;
    }
    let d = values.len() / width / heads;
    let mut out = Vec::with_capacity(values.len());
    for row in 0..values.len() / width {
        let (head, r) = (row / d, row % d);
        let source = head * d + (r % 2) * (d / 2) + r / 2;
        out.extend_from_slice(&values[source * width..(source + 1) * width]);
    }
    out
}

/// Zeros up to the next multiple of [`ALIGNMENT`].
fn padding(len: u64) -> usize {
    (len.next_multiple_of(ALIGNMENT) - len) as usize
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::{Gguf, Metadata};

    fn write(writer: &GgufWriter, data: &[Vec<u8>]) -> Result<Vec<u8>, io::Error> {
        let mut file = Vec::new();
        writer.write(&mut file, |i| Ok::<_, io::Error>(data[i].clone())).map(|()| file)
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut writer = GgufWriter::new();
        writer.u32("a.count", 7);
        writer.f32("a.float", 1e-5);
        writer.bool("a.flag", true);
        writer.str("a.text", "naïve");
        writer.strings("a.words", &["a".to_owned(), String::new()]);
        writer.i32s("a.kinds", &[1, -3]);
        writer.tensor("first", GgmlType::F16, &[3]).unwrap();
        writer.tensor("second", GgmlType::Q8_0, &[2, 32]).unwrap();
        let data = [vec![1; 6], vec![2; 68]];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        std::fs::write(&path, write(&writer, &data).unwrap()).unwrap();
        let read = Gguf::open(&path).unwrap();
        assert_eq!(read.u64("a.count").unwrap(), 7);
        assert_eq!(read.f32("a.float").unwrap().to_bits(), 1e-5_f32.to_bits());
        assert_eq!(read.metadata("a.flag"), Some(&Metadata::Bool(true)));
        assert_eq!(read.str("a.text").unwrap(), "naïve");
        assert_eq!(read.strings("a.words").unwrap(), ["a", ""]);
        assert_eq!(read.integers("a.kinds").unwrap(), [1, -3]);
        assert_eq!(read.tensor("second").unwrap().shape, [2, 32]);
        assert_eq!(*read.tensor_data("first").unwrap(), data[0]);
        assert_eq!(*read.tensor_data("second").unwrap(), data[1]);
    }

    #[test]
    fn tensors_that_do_not_fit_are_refused() {
        let mut writer = GgufWriter::new();
        let fault = writer.tensor("x", GgmlType::Q4_0, &[2, 48]).unwrap_err();
        assert!(fault.contains("`x` [2, 48]"), "{fault}");
        writer.tensor("y", GgmlType::F32, &[2]).unwrap();
        let fault = write(&writer, &[vec![0; 4]]).unwrap_err();
        assert_eq!(fault.kind(), io::ErrorKind::InvalidData);
    }
}
