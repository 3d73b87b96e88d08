//! Weights by their transformers names, decoded to f32, from GGUF or safetensors.

use std::path::PathBuf;

use half::{bf16, f16};
use safetensors::Dtype;

use crate::nf4::{FloatType, Nf4};
use crate::packed::{is_packed, read_nf4};
use crate::quantization::Quantization;
use crate::shards::{Shards, Stored};
use crate::stored::{HalfMatrix, StoredMatrix};
use crate::{BlockMatrix, Bytes, CheckpointError, Family, Gguf, ModelConfig, ModelFolder, names};

/// The weights of a model folder.
pub struct Weights<'a> {
    path: PathBuf,
    source: Source<'a>,
    config: &'a ModelConfig,
}

enum Source<'a> {
    Gguf(&'a Gguf),
    Safetensors { shards: Shards, quantization: Option<Quantization> },
}

/// The weight `[out, in]` of a linear layer.
#[derive(Clone, Debug, PartialEq)]
pub enum LinearWeight {
    /// Row-major f32.
    Full(Vec<f32>),
    /// Four-bit codes, not decoded.
    Nf4(Nf4),
}

impl LinearWeight {
    /// The weight in row-major f32.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Self::Full(values) => values,
            Self::Nf4(packed) => packed.decode(),
        }
    }
}

impl<'a> Weights<'a> {
    /// Opens the weights of `folder`; nothing is decoded yet.
    ///
    /// # Errors
    /// [`CheckpointError`] for a shard that is missing or malformed, for a tensor that a decoder of
    /// this configuration would leave out, and for a head that is tied in the configuration alone.
    pub fn open(folder: &'a ModelFolder, config: &'a ModelConfig) -> Result<Self, CheckpointError> {
        let source = match folder {
            ModelFolder::Gguf { gguf, .. } => Source::Gguf(gguf),
            ModelFolder::Safetensors { dir, .. } => Source::Safetensors {
                quantization: Quantization::read(dir)?,
                shards: Shards::open(dir)?,
            },
        };
        let weights = Self { path: folder.path().to_owned(), source, config };
        weights.check_names()?;
        weights.check_head()?;
        Ok(weights)
    }

    /// Shape of the model.
    pub fn config(&self) -> &ModelConfig {
        self.config
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Gguf(gguf) => {
                names::gguf_name(self.config, name).is_some_and(|n| gguf.tensor(&n).is_some())
            }
            Source::Safetensors { shards, .. } => shards.get(name).is_some(),
        }
    }

    /// Decodes a tensor of exactly that shape to row-major f32.
    ///
    /// # Errors
    /// [`CheckpointError`] where it is missing, misshapen or of a type that is not supported.
    pub fn load(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        match &self.source {
            Source::Gguf(gguf) => Ok(self.gguf_matrix(gguf, name, shape)?.decode()),
            Source::Safetensors { shards, quantization } => {
                let weight = self.stored(shards, name)?;
                if let [outputs, inputs] = *shape
                    && is_packed(shards, name, weight.dtype)
                {
                    let shape = [outputs, inputs];
                    return Ok(
                        load_nf4(shards, quantization.as_ref(), name, &weight, shape)?.decode()
                    );
                }
                plain(name, &weight, shape)
            }
        }
    }

    /// Reads the weight `[out, in]` of a linear layer; four-bit codes are not decoded. In a
    /// quantised checkpoint only the layers that its configuration names may be stored in full.
    ///
    /// # Errors
    /// As [`Weights::load`]; also where the layer is stored other than the configuration says.
    pub fn load_linear(
        &self,
        name: &str,
        shape: [usize; 2],
    ) -> Result<LinearWeight, CheckpointError> {
        let Source::Safetensors { shards, quantization } = &self.source else {
            return self.load(name, &shape).map(LinearWeight::Full);
        };
        let weight = self.stored(shards, name)?;
        if is_packed(shards, name, weight.dtype) {
            let packed = load_nf4(shards, quantization.as_ref(), name, &weight, shape)?;
            return Ok(LinearWeight::Nf4(packed));
        }
        self.check_unquantised(name, &weight)?;
        plain(name, &weight, &shape).map(LinearWeight::Full)
    }

    /// Reads a matrix `[rows, columns]` as it is stored, where that is smaller than f32: NF4, bf16
    /// and f16 of safetensors, every block type of GGUF. Its codes stay in the mapped file.
    /// `None` for every other format.
    ///
    /// # Errors
    /// As [`Weights::load`], or [`Weights::load_linear`] where it is `linear`.
    pub fn load_stored(
        &self,
        name: &str,
        shape: [usize; 2],
        linear: bool,
    ) -> Result<Option<StoredMatrix>, CheckpointError> {
        let shards = match &self.source {
            Source::Safetensors { shards, .. } => shards,
            Source::Gguf(gguf) => {
                let matrix = self.gguf_matrix(gguf, name, &shape)?;
                return Ok((!matrix.is_f32()).then_some(StoredMatrix::Blocks(matrix)));
            }
        };
        if is_packed(shards, name, self.stored(shards, name)?.dtype) {
            return Ok(match self.load_linear(name, shape)? {
                LinearWeight::Nf4(packed) => Some(StoredMatrix::Nf4(packed)),
                LinearWeight::Full(_) => None,
            });
        }
        let half = |(dtype, data)| HalfMatrix::new(shape, dtype, data);
        Ok(self.load_plain(name, shape, linear)?.and_then(half).map(StoredMatrix::Half))
    }

    /// The bytes of a matrix `[rows, columns]` that is stored as floats, row after row: little-endian,
    /// in the mapped file. `None` for every other format, and where the rows have another order.
    ///
    /// # Errors
    /// As [`Weights::load_stored`].
    pub fn load_plain(
        &self,
        name: &str,
        shape: [usize; 2],
        linear: bool,
    ) -> Result<Option<(FloatType, Bytes)>, CheckpointError> {
        let shards = match &self.source {
            Source::Safetensors { shards, .. } => shards,
            Source::Gguf(gguf) => return Ok(self.gguf_matrix(gguf, name, &shape)?.plain()),
        };
        let weight = self.stored(shards, name)?;
        let dtype = match weight.dtype {
            _ if is_packed(shards, name, weight.dtype) => return Ok(None),
            Dtype::F32 => FloatType::F32,
            Dtype::BF16 => FloatType::Bf16,
            Dtype::F16 => FloatType::F16,
            _ => return Ok(None),
        };
        if linear {
            self.check_unquantised(name, &weight)?;
        }
        check_shape(name, &weight, &shape)?;
        Ok(Some((dtype, weight.bytes())))
    }

    fn check_names(&self) -> Result<(), CheckpointError> {
        let refused = match &self.source {
            Source::Gguf(gguf) => {
                names::refusal_of_gguf(self.config, gguf.tensors().map(|t| t.name.as_str()))
            }
            Source::Safetensors { shards, .. } => names::refusal(self.config, shards.names("")),
        };
        refused.map_or(Ok(()), |what| Err(CheckpointError::content(&self.path, what)))
    }

    /// The head is the embedding, or has a tensor of its own.
    fn check_head(&self) -> Result<(), CheckpointError> {
        let Source::Safetensors { shards, .. } = &self.source else { return Ok(()) };
        let refuse = |what: &str| Err(CheckpointError::content(&self.path, what));
        let head = shards.get("lm_head.weight");
        if !self.config.tie_word_embeddings {
            return match head {
                Some(_) => Ok(()),
                None => refuse(
                    "`lm_head.weight` is missing, and config.json does not tie the head to the \
                     embedding: set `tie_word_embeddings` if it should",
                ),
            };
        }
        let (Some(head), Some(embedding)) = (head, shards.get("model.embed_tokens.weight")) else {
            return Ok(());
        };
        if head.dtype == embedding.dtype && head.data == embedding.data {
            return Ok(());
        }
        refuse(
            "`lm_head.weight` is another matrix than the embedding, and config.json ties the two: \
             set `tie_word_embeddings` to false if the head should count",
        )
    }

    /// Refuses a linear layer stored in full that the configuration does not name as such.
    fn check_unquantised(&self, name: &str, weight: &Stored<'_>) -> Result<(), CheckpointError> {
        let Source::Safetensors { quantization: Some(quantization), .. } = &self.source else {
            return Ok(());
        };
        if quantization.skips(module_of(name)) {
            return Ok(());
        }
        let message = format!(
            "`{name}` is stored as {:?}, but config.json says that it is quantised \
             (llm_int8_skip_modules does not name it)",
            weight.dtype
        );
        Err(CheckpointError::content(weight.path, message))
    }

    fn stored<'s>(&self, shards: &'s Shards, name: &str) -> Result<Stored<'s>, CheckpointError> {
        shards.get(name).ok_or_else(|| {
            CheckpointError::content(&self.path, format!("tensor `{name}` is missing"))
        })
    }

    /// A tensor of that shape; a vector is a matrix of one row.
    fn gguf_matrix(
        &self,
        gguf: &Gguf,
        name: &str,
        shape: &[usize],
    ) -> Result<BlockMatrix, CheckpointError> {
        let fault = |what: String| CheckpointError::content(gguf.path(), what);
        let missing = || fault(format!("tensor `{name}` is missing"));
        let stored = names::gguf_name(self.config, name).ok_or_else(missing)?;
        let info = gguf.tensor(&stored).ok_or_else(missing)?;
        if !info.shape.iter().map(|s| *s as usize).eq(shape.iter().copied()) {
            let found = &info.shape;
            return Err(fault(format!("GGUF tensor `{stored}` is {found:?}, expected {shape:?}")));
        }
        let data = gguf.tensor_data(&stored)?;
        // llama.cpp interleaves the halves of the heads of q and k in the family llama alone.
        let rotated = matches!(stored.rsplit('.').nth(1), Some("attn_q" | "attn_k"));
        let interleaved = rotated && self.config.family == Family::Llama;
        let heads = interleaved.then_some(self.config.head_dim);
        let matrix = match *shape {
            [columns] => BlockMatrix::new([1, columns], info.dtype, data, None),
            [rows, columns] => BlockMatrix::new([rows, columns], info.dtype, data, heads),
            _ => Err("is no matrix".to_owned()),
        };
        matrix.map_err(|e| fault(format!("GGUF tensor `{stored}` {e}")))
    }
}

/// The module of a weight.
fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

fn load_nf4(
    shards: &Shards,
    quantization: Option<&Quantization>,
    name: &str,
    weight: &Stored<'_>,
    shape: [usize; 2],
) -> Result<Nf4, CheckpointError> {
    let packed = read_nf4(shards, name, weight, shape)?;
    let reason = match quantization {
        None => "config.json has no quantization_config",
        Some(q) if q.skips(module_of(name)) => "llm_int8_skip_modules names it as stored in full",
        Some(_) => return Ok(packed),
    };
    Err(CheckpointError::content(weight.path, format!("`{name}` is quantised, but {reason}")))
}

/// Decodes a tensor that is stored as floats.
fn plain(name: &str, weight: &Stored<'_>, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
    check_shape(name, weight, shape)?;
    to_f32(weight.dtype, weight.data).ok_or_else(|| {
        let message = format!("{name} has unsupported type {:?}", weight.dtype);
        CheckpointError::content(weight.path, message)
    })
}

fn check_shape(name: &str, weight: &Stored<'_>, shape: &[usize]) -> Result<(), CheckpointError> {
    if weight.shape == shape {
        return Ok(());
    }
    let found = weight.shape;
    let message = format!("{name} is {found:?}, expected {shape:?}");
    Err(CheckpointError::content(weight.path, message))
}

/// Little-endian tensor bytes as f32; `None` for types other than F32, F16 and BF16.
pub fn to_f32(dtype: Dtype, data: &[u8]) -> Option<Vec<f32>> {
    let halves = || data.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    Some(match dtype {
        Dtype::F32 => floats(data),
        Dtype::F16 => halves().map(|b| f16::from_bits(b).to_f32()).collect(),
        Dtype::BF16 => halves().map(|b| bf16::from_bits(b).to_f32()).collect(),
        _ => return None,
    })
}

pub(crate) fn floats(data: &[u8]) -> Vec<f32> {
    data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}
