//! The shape of a model, from GGUF metadata or `config.json`.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::quantization::Quantization;
use crate::variations::{Gemma2, MAX_LAYERS, Variations};
use crate::{CheckpointError, Gguf, ModelFolder};

/// Model families whose decoders differ only in the fields of [`ModelConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama and SmolLM2.
    Llama,
    /// Qwen2 and Qwen2.5: biases on q, k, v.
    Qwen2,
    /// Gemma-2: see [`Variations`].
    Gemma2,
}

/// Shape of a decoder; field names are those of transformers' `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Epsilon of every norm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Longest context.
    pub max_position_embeddings: usize,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// Where the decoder departs from Llama's.
    pub variations: Variations,
}

/// The fields of `config.json` that matter, of transformers 4 and 5.
#[derive(Deserialize)]
struct HubConfig {
    model_type: String,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    rms_norm_eps: f32,
    rope_theta: Option<f32>,
    rope_parameters: Option<Value>,
    rope_scaling: Option<Value>,
    max_position_embeddings: usize,
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    hidden_act: Option<String>,
    quantization_config: Option<Value>,
}

impl HubConfig {
    /// Gemma-2's variations, whose norms are stored without the 1.
    fn gemma2(&self, text: &[u8]) -> Result<Variations, String> {
        let own: Gemma2 =
            serde_json::from_slice(text).map_err(|e| format!("line {}: {e}", e.line()))?;
        own.check_activation(self.hidden_act.as_deref())?;
        let windows = own.windows(self.num_hidden_layers)?;
        let variations = Variations::gemma2(self.hidden_size, 1.0, &own);
        Ok(Variations { sliding_windows: windows, ..variations })
    }
}

/// Gemma-2's variations from GGUF metadata; llama.cpp stores norm weights with the 1 added.
fn gguf_gemma2(
    gguf: &Gguf,
    (hidden_size, layers, heads, head_dim): (usize, usize, usize, usize),
) -> Result<Variations, CheckpointError> {
    let float = |key: &str| gguf.f32(&format!("gemma2.{key}")).ok();
    let window = gguf.u64("gemma2.attention.sliding_window").ok().map(|w| w as usize);
    let default = Gemma2::default();
    // Not in the metadata: llama.cpp knows the 27B by its 46 layers, and that it alone scales by
    // the width of the model.
    let scalar = if layers == 46 { hidden_size.checked_div(heads).unwrap_or(0) } else { head_dim };
    let own = Gemma2 {
        query_pre_attn_scalar: scalar as f32,
        attn_logit_softcapping: float("attn_logit_softcapping").or(default.attn_logit_softcapping),
        final_logit_softcapping: float("final_logit_softcapping")
            .or(default.final_logit_softcapping),
        sliding_window: window.or(default.sliding_window),
        ..Gemma2::default()
    };
    let windows = own.windows(layers).map_err(|e| CheckpointError::content(gguf.path(), e))?;
    let variations = Variations::gemma2(hidden_size, 0.0, &own);
    Ok(Variations { sliding_windows: windows, ..variations })
}

impl ModelConfig {
    /// Reads the shape of the model in `folder`.
    ///
    /// # Errors
    /// [`CheckpointError`] naming what is missing, or the feature that is not supported.
    pub fn read(folder: &ModelFolder) -> Result<Self, CheckpointError> {
        let config = match folder {
            ModelFolder::Gguf { gguf, .. } => Self::from_gguf(gguf)?,
            ModelFolder::Safetensors { dir, .. } => Self::from_json(&dir.join("config.json"))?,
        };
        config.check(folder.path())?;
        Ok(config)
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self, CheckpointError> {
        let refuse = |what: String| Err(CheckpointError::content(gguf.path(), what));
        let arch = gguf.str("general.architecture")?;
        let family = match arch {
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "gemma2" => Family::Gemma2,
            other => {
                return refuse(format!(
                    "architecture `{other}` is not supported (supported: llama, qwen2, gemma2)"
                ));
            }
        };
        let number = |key: &str| gguf.u64(&format!("{arch}.{key}")).map(|v| v as usize);
        let float = |key: &str| gguf.f32(&format!("{arch}.{key}"));
        if let Ok(kind) = gguf.str(&format!("{arch}.rope.scaling.type"))
            && kind != "none"
        {
            return refuse(format!("rope scaling `{kind}` is not supported"));
        }
        let heads = number("attention.head_count")?;
        let hidden_size = number("embedding_length")?;
        let head_dim =
            number("attention.key_length").unwrap_or(hidden_size.checked_div(heads).unwrap_or(0));
        let layers = number("block_count")?;
        let variations = match family {
            Family::Gemma2 => gguf_gemma2(gguf, (hidden_size, layers, heads, head_dim))?,
            _ => Variations::default(),
        };
        let Some(rows) = gguf.tensor("token_embd.weight").and_then(|t| t.shape.first().copied())
        else {
            return refuse("tensor `token_embd.weight` is missing".to_owned());
        };
        Ok(Self {
            family,
            hidden_size,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: number("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            intermediate_size: number("feed_forward_length")?,
            vocab_size: rows as usize,
            rms_norm_eps: float("attention.layer_norm_rms_epsilon")?,
            rope_theta: float("rope.freq_base").unwrap_or(10_000.0),
            max_position_embeddings: number("context_length")?,
            tie_word_embeddings: gguf.tensor("output.weight").is_none(),
            qkv_bias: family == Family::Qwen2,
            variations,
        })
    }

    fn from_json(path: &Path) -> Result<Self, CheckpointError> {
        let text = std::fs::read(path).map_err(|e| CheckpointError::io(path, e))?;
        let hub: HubConfig = serde_json::from_slice(&text)
            .map_err(|e| CheckpointError::content(path, format!("line {}: {e}", e.line())))?;
        let refuse = |what: String| Err(CheckpointError::content(path, what));
        let family = match hub.model_type.as_str() {
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "gemma2" => Family::Gemma2,
            other => {
                return refuse(format!(
                    "model type `{other}` is not supported (supported: llama, qwen2, gemma2)"
                ));
            }
        };
        let rope = hub.rope_parameters.as_ref().or(hub.rope_scaling.as_ref());
        let kind = rope
            .and_then(|r| r.get("rope_type").or_else(|| r.get("type")))
            .and_then(Value::as_str)
            .unwrap_or("default");
        if kind != "default" {
            return refuse(format!("rope scaling `{kind}` is not supported"));
        }
        if hub.mlp_bias || (hub.attention_bias && family != Family::Qwen2) {
            return refuse("biases on attention or feed-forward layers are not supported".into());
        }
        if hub.use_sliding_window {
            return refuse("a sliding window is not supported".to_owned());
        }
        let variations = match family {
            Family::Gemma2 => hub.gemma2(&text).map_err(|e| CheckpointError::content(path, e))?,
            _ => Variations::default(),
        };
        if let (Family::Llama | Family::Qwen2, Some(activation)) = (family, &hub.hidden_act)
            && activation != "silu"
        {
            return refuse(format!("activation `{activation}` is not supported"));
        }
        if let Some(section) = &hub.quantization_config {
            Quantization::parse(section).map_err(|e| CheckpointError::content(path, e))?;
        }
        let theta = rope.and_then(|r| r.get("rope_theta")).and_then(Value::as_f64);
        Ok(Self {
            family,
            hidden_size: hub.hidden_size,
            num_hidden_layers: hub.num_hidden_layers,
            num_attention_heads: hub.num_attention_heads,
            num_key_value_heads: hub.num_key_value_heads.unwrap_or(hub.num_attention_heads),
            head_dim: hub.head_dim.unwrap_or(match family {
                Family::Gemma2 => 256,
                _ => hub.hidden_size.checked_div(hub.num_attention_heads).unwrap_or(0),
            }),
            intermediate_size: hub.intermediate_size,
            vocab_size: hub.vocab_size,
            rms_norm_eps: hub.rms_norm_eps,
            rope_theta: hub.rope_theta.or(theta.map(|t| t as f32)).unwrap_or(10_000.0),
            max_position_embeddings: hub.max_position_embeddings,
            tie_word_embeddings: hub.tie_word_embeddings.unwrap_or(family == Family::Gemma2),
            qkv_bias: family == Family::Qwen2,
            variations,
        })
    }

    /// Sizes that the decoder relies on.
    fn check(&self, path: &Path) -> Result<(), CheckpointError> {
        let sizes = [
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.intermediate_size,
            self.vocab_size,
            self.max_position_embeddings,
        ];
        let sane = sizes.iter().all(|s| (1..=1 << 24).contains(s))
            && self.num_hidden_layers <= MAX_LAYERS
            && self.num_attention_heads.is_multiple_of(self.num_key_value_heads)
            && self.head_dim.is_multiple_of(2)
            && self.variations.sane();
        if sane {
            Ok(())
        } else {
            Err(CheckpointError::content(path, format!("model sizes make no sense: {self:?}")))
        }
    }
}
