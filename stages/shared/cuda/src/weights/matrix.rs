//! Matrices of a checkpoint on their way to the device: as they are where they have the device's type,
//! else decoded and encoded by all threads, in parts, so that the host never holds a matrix twice.

use std::ops::Range;

use checkpoint::{Bytes, CheckpointError, FloatType, StoredMatrix, Weights};
use rayon::prelude::*;

use crate::device::{Buffer, Device};
use crate::{CudaError, Dtype};

/// A matrix as its file has it.
pub(crate) enum Matrix {
    /// Floats, row after row.
    Plain(Dtype, Bytes),
    /// Codes, or rows in an order of their own.
    Stored(StoredMatrix),
}

/// Values that a thread takes at a time.
const CHUNK: usize = 1 << 16;
/// Bytes that are ready before they are copied to the device.
const PART: usize = 32 << 20;

impl Matrix {
    /// Finds the matrix `name`, which is the weight of a linear layer or not.
    pub(super) fn read(
        weights: &Weights<'_>,
        name: &str,
        shape: [usize; 2],
        is_linear: bool,
    ) -> Result<Self, CheckpointError> {
        if let Some((own, bytes)) = weights.load_plain(name, shape, is_linear)? {
            let own = match own {
                FloatType::F32 => Dtype::F32,
                FloatType::Bf16 => Dtype::Bf16,
                FloatType::F16 => Dtype::F16,
            };
            return Ok(Self::Plain(own, bytes));
        }
        if let Some(stored) = weights.load_stored(name, shape, is_linear)? {
            return Ok(Self::Stored(stored));
        }
        // In f32 with rows in another order, or of a type that is refused here.
        let values = weights.load(name, &shape)?;
        Ok(Self::Plain(Dtype::F32, Dtype::F32.encode(&values).into()))
    }

    /// The matrix on the device, in the device's type.
    pub(super) fn upload(&self, device: &Device, shape: [usize; 2]) -> Result<Buffer, CudaError> {
        let buffer = device.elements(shape[0] * shape[1])?;
        self.encode(device.dtype, shape, |offset, bytes| {
            device.write(buffer.ptr() + offset, bytes)
        })?;
        Ok(buffer)
    }

    /// Hands on the bytes of the matrix in `dtype`, part by part, each with its offset.
    fn encode<E>(
        &self,
        dtype: Dtype,
        shape: [usize; 2],
        mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            Self::Plain(own, bytes) if *own == dtype => each(0, bytes),
            Self::Plain(own, bytes) => {
                let row = shape[1] * own.size() as usize;
                let decode = |rows: Range<usize>, out: &mut [f32]| {
                    out.copy_from_slice(&own.decode(&bytes[rows.start * row..rows.end * row]));
                };
                encode_rows(dtype, shape, decode, each)
            }
            Self::Stored(matrix) => {
                let decode = |rows: Range<usize>, out: &mut [f32]| matrix.decode_rows(rows, out);
                encode_rows(dtype, shape, decode, each)
            }
        }
    }
}

/// Hands on the bytes in `dtype` of rows that `decode` writes, part by part, each with its offset.
fn encode_rows<E>(
    dtype: Dtype,
    [rows, columns]: [usize; 2],
    decode: impl Fn(Range<usize>, &mut [f32]) + Sync,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let row = columns * dtype.size() as usize;
    let (of_chunk, of_part) = ((CHUNK / columns).max(1), (PART / row).clamp(1, rows.max(1)));
    let mut part = vec![0; of_part * row];
    for first in (0..rows).step_by(of_part) {
        let part = &mut part[..of_part.min(rows - first) * row];
        let chunks = part.par_chunks_mut(of_chunk * row).enumerate();
        chunks.for_each_init(Vec::<f32>::new, |values, (index, out)| {
            let (start, count) = (first + index * of_chunk, out.len() / row);
            values.resize(count * columns, 0.0);
            decode(start..start + count, values);
            dtype.encode_into(values, out);
        });
        each((first * row) as u64, part)?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::convert::Infallible;
    use std::path::{Path, PathBuf};

    use checkpoint::{GgmlType, GgufWriter, ModelConfig, ModelFolder};
    use safetensors::{Dtype as Stored, tensor::TensorView};

    use super::*;

    const TYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

    fn encoded(matrix: &Matrix, dtype: Dtype, shape: [usize; 2]) -> Vec<u8> {
        let mut all = Vec::new();
        let each = |offset: u64, bytes: &[u8]| {
            assert_eq!(offset, all.len() as u64);
            all.extend(bytes);
            Ok::<_, Infallible>(())
        };
        matrix.encode(dtype, shape, each).unwrap();
        all
    }

    /// Asserts that matrices come in the bits that decoding them as a whole gives.
    fn same_bits(folder: &Path, matrices: &[(&str, [usize; 2])]) {
        let folder = ModelFolder::open(folder).unwrap();
        let config = ModelConfig::read(&folder).unwrap();
        let weights = Weights::open(&folder, &config).unwrap();
        for (name, shape) in matrices {
            let is_linear = name.contains("proj");
            let matrix = Matrix::read(&weights, name, *shape, is_linear).unwrap();
            let values = weights.load(name, shape).unwrap();
            for dtype in TYPES {
                let found = encoded(&matrix, dtype, *shape);
                assert!(found == dtype.encode(&values), "{name} in {dtype:?}");
            }
        }
    }

    fn fixture(folder: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../tests/fixtures").join(folder)
    }

    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    const UP: &str = "model.layers.0.mlp.up_proj.weight";
    const TABLE: &str = "model.embed_tokens.weight";

    #[test]
    fn four_bits_and_floats_come_in_the_bits_of_the_whole() {
        for kind in ["f32", "nf4"] {
            let matrices = [(Q, [128, 128]), (UP, [320, 128]), (TABLE, [512, 128])];
            same_bits(&fixture(&format!("tiny-models/llama/{kind}")), &matrices);
        }
    }

    #[test]
    fn floats_of_every_type_come_in_the_bits_of_the_whole() {
        for (own, stored) in TYPES.into_iter().zip([Stored::F32, Stored::BF16, Stored::F16]) {
            let dir = tempfile::tempdir().unwrap();
            let config = fixture("tiny-models/llama/f32/config.json");
            std::fs::copy(config, dir.path().join("config.json")).unwrap();
            // From small to large, and with signs, in the type's own bits.
            let values: Vec<f32> = (0..512 * 128).map(|i| (i as f32 - 3e4) * 1.7e-3).collect();
            let bytes = own.encode(&values);
            let view = |rows: usize| {
                let end = rows * 128 * own.size() as usize;
                TensorView::new(stored, vec![rows, 128], &bytes[..end]).unwrap()
            };
            let tensors = [(Q, view(128)), (UP, view(320)), (TABLE, view(512))];
            let file = dir.path().join("model.safetensors");
            safetensors::serialize_to_file(tensors, None, &file).unwrap();
            same_bits(dir.path(), &[(Q, [128, 128]), (UP, [320, 128]), (TABLE, [512, 128])]);
        }
    }

    #[test]
    fn blocks_come_in_the_bits_of_the_whole() {
        use GgmlType::{BF16, F16, F32, Q4_0, Q6_K, Q8_0};
        for dtype in [F32, F16, BF16, Q4_0, Q8_0, Q6_K] {
            let mut writer = GgufWriter::new();
            writer.str("general.architecture", "llama");
            for (key, value) in [
                ("block_count", 1),
                ("context_length", 64),
                ("embedding_length", 256),
                ("feed_forward_length", 64),
                ("attention.head_count", 2),
                ("attention.key_length", 32),
            ] {
                writer.u32(&format!("llama.{key}"), value);
            }
            writer.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
            // The heads of q lie in halves.
            let names = ["token_embd.weight", "blk.0.attn_q.weight"];
            for name in names {
                writer.tensor(name, dtype, &[64, 256]).unwrap();
            }
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("model.gguf");
            let file = std::fs::File::create(&path).unwrap();
            let bytes = dtype.tensor_bytes(&[64, 256]).unwrap();
            // No byte makes a scale that is not finite.
            let data = || (0..bytes).map(|i| (i * 29 % 120) as u8).collect::<Vec<u8>>();
            writer.write(&mut &file, |_| Ok::<_, std::io::Error>(data())).unwrap();
            same_bits(dir.path(), &[(TABLE, [64, 256]), (Q, [64, 256])]);
        }
    }

    #[test]
    fn parts_and_chunks_join_without_gaps() {
        // More than a part, rows that no chunk divides, and a last part that is shorter.
        let shape = [PART / 4 / 999 + 77, 999];
        let value = |at: usize| (at % 4093) as f32;
        let decode = |rows: Range<usize>, out: &mut [f32]| {
            out.iter_mut().enumerate().for_each(|(i, o)| *o = value(rows.start * 999 + i));
        };
        let mut parts = 0;
        let each = |offset: u64, bytes: &[u8]| {
            parts += 1;
            let found = Dtype::F32.decode(bytes);
            let first = offset as usize / 4;
            assert!(found.iter().enumerate().all(|(i, v)| v.total_cmp(&value(first + i)).is_eq()));
            Ok::<_, Infallible>(())
        };
        encode_rows(Dtype::F32, shape, decode, each).unwrap();
        assert_eq!(parts, 2);
    }
}
