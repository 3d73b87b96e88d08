//! The shape of a model from transformers' `config.json`, of versions 4 and 5.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::config::{CHOOSE_UNSCALED, SUPPORTED};
use crate::quantization::Quantization;
use crate::variations::{Gemma2, Variations};
use crate::{CheckpointError, Family, ModelConfig};

/// transformers' base where a configuration names none.
const DEFAULT_THETA: f64 = 10_000.0;

/// The fields that say whether the rest can be read.
#[derive(Deserialize)]
struct Kind {
    model_type: String,
    architectures: Option<Vec<String>>,
}

/// The fields that matter.
#[derive(Deserialize)]
struct HubConfig {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_parameters: Option<Map<String, Value>>,
    rope_scaling: Option<Map<String, Value>>,
    partial_rotary_factor: Option<f64>,
    max_position_embeddings: usize,
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    layer_types: Option<Vec<String>>,
    hidden_act: Option<String>,
    quantization_config: Option<Value>,
}

/// Reads the file.
///
/// # Errors
/// [`CheckpointError`] naming the line, or the feature that is not supported.
pub(crate) fn read(path: &Path) -> Result<ModelConfig, CheckpointError> {
    let text = std::fs::read(path).map_err(|e| CheckpointError::io(path, e))?;
    parse(&text).map_err(|e| CheckpointError::content(path, e))
}

fn parse(text: &[u8]) -> Result<ModelConfig, String> {
    let line = |e: serde_json::Error| format!("line {}: {e}", e.line());
    let kind: Kind = serde_json::from_slice(text).map_err(line)?;
    let Some(family) = Family::from_name(&kind.model_type) else {
        return Err(format!("model type `{}` is not supported {SUPPORTED}", kind.model_type));
    };
    let causal = |name: &String| name.ends_with("ForCausalLM");
    if let Some(other) = kind.architectures.as_ref().filter(|all| !all.iter().any(causal)) {
        let other = other.join(", ");
        return Err(format!("`{other}` is no model that generates text (…ForCausalLM)"));
    }
    let hub: HubConfig = serde_json::from_slice(text).map_err(line)?;
    let rope_theta = hub.rope_theta()?;
    hub.refuse_unsupported(family)?;
    let variations = match family {
        Family::Gemma2 => hub.gemma2(text)?,
        _ => Variations::default(),
    };
    if let Some(section) = &hub.quantization_config {
        Quantization::parse(section)?;
    }
    Ok(ModelConfig {
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
        rope_theta: rope_theta as f32,
        max_position_embeddings: hub.max_position_embeddings,
        tie_word_embeddings: hub.tie_word_embeddings.unwrap_or(family == Family::Gemma2),
        qkv_bias: family == Family::Qwen2,
        variations,
    })
}

impl HubConfig {
    /// The base of the rotary frequencies: transformers 5 has it in `rope_parameters`, 4 beside
    /// `rope_scaling`.
    fn rope_theta(&self) -> Result<f64, String> {
        let mut own = None;
        for (name, section) in
            [("rope_parameters", &self.rope_parameters), ("rope_scaling", &self.rope_scaling)]
        {
            let there = section.iter().flatten().filter(|(_, value)| !value.is_null());
            for (key, value) in there {
                match (key.as_str(), value) {
                    ("rope_type" | "type", Value::String(kind)) if kind == "default" => {}
                    ("rope_type" | "type", kind) => {
                        let kind = kind.as_str().unwrap_or("of an unknown kind");
                        return Err(format!(
                            "rope scaling `{kind}` is not supported: {CHOOSE_UNSCALED}"
                        ));
                    }
                    ("rope_theta", value) if value.is_number() => own = own.or(value.as_f64()),
                    ("partial_rotary_factor", value) if value.as_f64() == Some(1.0) => {}
                    _ => return Err(format!("`{name}.{key}` is not supported: {CHOOSE_UNSCALED}")),
                }
            }
        }
        Ok(own.or(self.rope_theta).unwrap_or(DEFAULT_THETA))
    }

    fn refuse_unsupported(&self, family: Family) -> Result<(), String> {
        let refuse = |what: String| Err(format!("{what} not supported"));
        if self.partial_rotary_factor.is_some_and(|factor| factor.total_cmp(&1.0).is_ne()) {
            return refuse("rotary embeddings of a part of each head are".to_owned());
        }
        if self.mlp_bias {
            return refuse("biases on feed-forward layers (`mlp_bias`) are".to_owned());
        }
        // Qwen2 has them on q, k and v whatever this says.
        if self.attention_bias && family != Family::Qwen2 {
            return refuse("biases on attention (`attention_bias`) are".to_owned());
        }
        if family == Family::Gemma2 {
            return Ok(());
        }
        if self.use_sliding_window {
            return refuse("a sliding window (`use_sliding_window`) is".to_owned());
        }
        let full = |kind: &&String| kind.as_str() == "full_attention";
        let mut types = self.layer_types.iter().flatten();
        if let Some(other) = types.find(|kind| !full(kind)) {
            return refuse(format!("layers of the type `{other}` are"));
        }
        match self.hidden_act.as_deref() {
            None | Some("silu") => Ok(()),
            Some(other) => refuse(format!("the activation `{other}` is")),
        }
    }

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
