//! Weights by their transformers names, decoded to f32, from GGUF or safetensors.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::{CheckpointError, Family, Gguf, ModelConfig, ModelFolder, ggml};

/// The weights of a model folder.
pub struct Weights<'a> {
    path: PathBuf,
    source: Source<'a>,
    config: &'a ModelConfig,
}

enum Source<'a> {
    Gguf(&'a Gguf),
    Safetensors { shards: Vec<Shard>, of: BTreeMap<String, usize> },
}

struct Shard {
    path: PathBuf,
    map: Mmap,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl<'a> Weights<'a> {
    /// Opens the weights of `folder`; nothing is decoded yet.
    ///
    /// # Errors
    /// [`CheckpointError`] for a shard that is missing or malformed.
    pub fn open(folder: &'a ModelFolder, config: &'a ModelConfig) -> Result<Self, CheckpointError> {
        let source = match folder {
            ModelFolder::Gguf { gguf, .. } => Source::Gguf(gguf),
            ModelFolder::Safetensors { dir, .. } => open_shards(dir)?,
        };
        Ok(Self { path: folder.path().to_owned(), source, config })
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Gguf(gguf) => gguf_name(name).is_some_and(|n| gguf.tensor(&n).is_some()),
            Source::Safetensors { of, .. } => of.contains_key(name),
        }
    }

    /// Decodes a tensor of exactly that shape to row-major f32.
    ///
    /// # Errors
    /// [`CheckpointError`] where it is missing, misshapen or of a type that is not supported.
    pub fn load(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        match &self.source {
            Source::Gguf(gguf) => self.load_gguf(gguf, name, shape),
            Source::Safetensors { shards, of } => {
                let missing =
                    || CheckpointError::content(&self.path, format!("tensor `{name}` is missing"));
                let shard = &shards[*of.get(name).ok_or_else(missing)?];
                let fault = |message| CheckpointError::content(&shard.path, message);
                let file =
                    SafeTensors::deserialize(&shard.map).map_err(|e| fault(e.to_string()))?;
                let view = file.tensor(name).map_err(|e| fault(format!("{name}: {e}")))?;
                if view.shape() != shape {
                    let found = view.shape();
                    return Err(fault(format!("{name} is {found:?}, expected {shape:?}")));
                }
                to_f32(view.dtype(), view.data())
                    .ok_or_else(|| fault(format!("{name} has unsupported type {:?}", view.dtype())))
            }
        }
    }

    fn load_gguf(
        &self,
        gguf: &Gguf,
        name: &str,
        shape: &[usize],
    ) -> Result<Vec<f32>, CheckpointError> {
        let fault = |what: String| CheckpointError::content(gguf.path(), what);
        let missing = || fault(format!("tensor `{name}` is missing"));
        let stored = gguf_name(name).ok_or_else(missing)?;
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

fn open_shards(dir: &Path) -> Result<Source<'static>, CheckpointError> {
    let index = dir.join("model.safetensors.index.json");
    let files: Vec<PathBuf> = if index.exists() {
        let text = std::fs::read(&index).map_err(|e| CheckpointError::io(&index, e))?;
        let parsed: Index = serde_json::from_slice(&text)
            .map_err(|e| CheckpointError::content(&index, e.to_string()))?;
        let names: std::collections::BTreeSet<_> = parsed.weight_map.into_values().collect();
        if let Some(name) = names.iter().find(|n| n.contains(['/', '\\'])) {
            return Err(CheckpointError::content(&index, format!("shard name `{name}`")));
        }
        names.iter().map(|n| dir.join(n)).collect()
    } else {
        vec![dir.join("model.safetensors")]
    };
    let (mut shards, mut of) = (Vec::new(), BTreeMap::new());
    for path in files {
        let map = map_file(&path)?;
        let file = SafeTensors::deserialize(&map)
            .map_err(|e| CheckpointError::content(&path, e.to_string()))?;
        of.extend(file.names().into_iter().map(|name| (name.to_owned(), shards.len())));
        shards.push(Shard { path, map });
    }
    Ok(Source::Safetensors { shards, of })
}

#[expect(unsafe_code, reason = "mapping a file has no safe form")]
fn map_file(path: &Path) -> Result<Mmap, CheckpointError> {
    let file = File::open(path).map_err(|e| CheckpointError::io(path, e))?;
    // SAFETY: inputs of a stage are read-only objects that nobody truncates while it runs.
    unsafe { Mmap::map(&file) }.map_err(|e| CheckpointError::io(path, e))
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

fn floats(data: &[u8]) -> Vec<f32> {
    data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// llama.cpp's name of a transformers tensor.
fn gguf_name(name: &str) -> Option<String> {
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
