//! Weights by their transformers names, decoded to f32, from GGUF or safetensors.

use std::path::PathBuf;

use half::{bf16, f16};
use safetensors::Dtype;

use crate::nf4::{FloatType, Nf4};
use crate::packed::{is_packed, read_nf4};
use crate::quantization::Quantization;
use crate::shards::{Shards, Stored};
use crate::stored::{HalfMatrix, StoredMatrix};
use crate::{CheckpointError, Family, Gguf, ModelConfig, ModelFolder, ggml};

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
    /// [`CheckpointError`] for a shard that is missing or malformed.
    pub fn open(folder: &'a ModelFolder, config: &'a ModelConfig) -> Result<Self, CheckpointError> {
        let source = match folder {
            ModelFolder::Gguf { gguf, .. } => Source::Gguf(gguf),
            ModelFolder::Safetensors { dir, .. } => Source::Safetensors {
                quantization: Quantization::read(dir)?,
                shards: Shards::open(dir)?,
            },
        };
        Ok(Self { path: folder.path().to_owned(), source, config })
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Gguf(gguf) => self.gguf_name(name).is_some_and(|n| gguf.tensor(&n).is_some()),
            Source::Safetensors { shards, .. } => shards.get(name).is_some(),
        }
    }

    /// Decodes a tensor of exactly that shape to row-major f32.
    ///
    /// # Errors
    /// [`CheckpointError`] where it is missing, misshapen or of a type that is not supported.
    pub fn load(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        match &self.source {
            Source::Gguf(gguf) => self.load_gguf(gguf, name, shape),
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

    /// Reads a matrix `[rows, columns]` as it is stored, where that is smaller than f32 and decodes
    /// fast: safetensors in NF4, bf16 or f16. `None` for every other format.
    ///
    /// # Errors
    /// As [`Weights::load`], or [`Weights::load_linear`] where it is `linear`.
    pub fn load_stored(
        &self,
        name: &str,
        shape: [usize; 2],
        linear: bool,
    ) -> Result<Option<StoredMatrix>, CheckpointError> {
        let Source::Safetensors { shards, .. } = &self.source else { return Ok(None) };
        let weight = self.stored(shards, name)?;
        let dtype = match weight.dtype {
            _ if is_packed(shards, name, weight.dtype) && linear => {
                return Ok(match self.load_linear(name, shape)? {
                    LinearWeight::Nf4(packed) => Some(StoredMatrix::Nf4(packed)),
                    LinearWeight::Full(_) => None,
                });
            }
            Dtype::BF16 => FloatType::Bf16,
            Dtype::F16 => FloatType::F16,
            _ => return Ok(None),
        };
        if linear {
            self.check_unquantised(name, &weight)?;
        }
        check_shape(name, &weight, &shape)?;
        Ok(HalfMatrix::new(shape, dtype, weight.data).map(StoredMatrix::Half))
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
            let other = shards.get(&format!("{}.qweight", module_of(name))).map_or(
                "",
                |_| " (there is a `qweight`: GPTQ and AWQ checkpoints are not supported)",
            );
            CheckpointError::content(&self.path, format!("tensor `{name}` is missing{other}"))
        })
    }

    /// llama.cpp's name of a tensor of this model: Gemma-2 names its four norms otherwise.
    fn gguf_name(&self, name: &str) -> Option<String> {
        let gemma_norm = || {
            let (layer, norm) = name.strip_prefix("model.layers.")?.split_once('.')?;
            let norm = match norm {
                "post_attention_layernorm.weight" => "post_attention_norm",
                "pre_feedforward_layernorm.weight" => "ffn_norm",
                "post_feedforward_layernorm.weight" => "post_ffw_norm",
                _ => return None,
            };
            Some(format!("blk.{layer}.{norm}.weight"))
        };
        let own = (self.config.family == Family::Gemma2).then(gemma_norm).flatten();
        own.or_else(|| gguf_name(name))
    }

    fn load_gguf(
        &self,
        gguf: &Gguf,
        name: &str,
        shape: &[usize],
    ) -> Result<Vec<f32>, CheckpointError> {
        let fault = |what: String| CheckpointError::content(gguf.path(), what);
        let missing = || fault(format!("tensor `{name}` is missing"));
        let stored = self.gguf_name(name).ok_or_else(missing)?;
        let info = gguf.tensor(&stored).ok_or_else(missing)?;
        if !info.shape.iter().map(|s| *s as usize).eq(shape.iter().copied()) {
            let found = &info.shape;
            return Err(fault(format!("GGUF tensor `{stored}` is {found:?}, expected {shape:?}")));
        }
        let data = gguf.tensor_data(&stored)?;
        let values = ggml::decode(info.dtype, data, shape.iter().product()).ok_or_else(|| {
            fault(format!(
                "GGUF tensor `{stored}` has type {:?}, which is not supported (supported: {}): \
                 requantise it",
                info.dtype,
                ggml::DECODED
            ))
        })?;
        // llama.cpp stores the rows of q and k of the family llama in pairs; Qwen2's as they are.
        let heads = match stored.rsplit('.').nth(1) {
            Some("attn_q") => Some(self.config.num_attention_heads),
            Some("attn_k") => Some(self.config.num_key_value_heads),
            _ => None,
        };
        match heads {
            Some(heads) if self.config.family == Family::Llama => {
                Ok(unpermute(&values, heads, shape.get(1).copied().unwrap_or(1)))
            }
            _ => Ok(values),
        }
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

/// Undoes llama.cpp's row order: row `2i + j` of a head is row `j * d/2 + i` in transformers.
fn unpermute(values: &[f32], heads: usize, width: usize) -> Vec<f32> {
    let d = values.len() / width / heads;
    let mut out = vec![0.0; values.len()];
    for (row, source) in values.chunks_exact(width).enumerate() {
        let (head, r) = (row / d, row % d);
        let target = head * d + (r % 2) * (d / 2) + r / 2;
        out[target * width..(target + 1) * width].copy_from_slice(source);
    }
    out
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

/// llama.cpp's name of a transformers tensor.
pub fn gguf_name(name: &str) -> Option<String> {
    let fixed = match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        _ => "",
    };
    if !fixed.is_empty() {
        return Some(fixed.to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let module = match module {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        _ => return None,
    };
    Some(format!("blk.{layer}.{module}.{kind}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_come_back_in_halves() {
        // One head of four rows; llama.cpp interleaves the halves: 0, 2, 1, 3.
        let stored = [0.0, 0.0, 2.0, 2.0, 1.0, 1.0, 3.0, 3.0];
        assert_eq!(unpermute(&stored, 1, 2), [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]);
    }

    #[test]
    fn names_of_layers_translate() {
        let name = gguf_name("model.layers.12.self_attn.q_proj.weight").unwrap();
        assert_eq!(name, "blk.12.attn_q.weight");
        assert_eq!(gguf_name("model.layers.0.other.weight"), None);
    }
}
