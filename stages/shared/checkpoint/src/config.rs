//! The shape of a model, from GGUF metadata or `config.json`.

use std::path::Path;

use crate::variations::{Gemma2, MAX_LAYERS, Variations};
use crate::{CheckpointError, Gguf, ModelFolder, hub_config};

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

/// Follows the name of what is not one of them.
pub(crate) const SUPPORTED: &str =
    "(supported: llama, qwen2, gemma2): choose a model of one of these families";
/// Ends a refusal of scaled rotary frequencies.
pub(crate) const CHOOSE_UNSCALED: &str =
    "its rotary frequencies differ from those computed here, so choose a model without it";

impl Family {
    /// The family of that name in transformers and llama.cpp.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "llama" => Self::Llama,
            "qwen2" => Self::Qwen2,
            "gemma2" => Self::Gemma2,
            _ => return None,
        })
    }
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

/// What the metadata ask for and the decoder would not do.
fn gguf_refusal(gguf: &Gguf, family: Family, arch: &str, head_dim: usize) -> Option<String> {
    let text = |key: &str| gguf.str(&format!("{arch}.{key}")).ok();
    let number = |key: &str| gguf.u64(&format!("{arch}.{key}")).ok();
    if let Some(kind) = text("rope.scaling.type").filter(|kind| *kind != "none") {
        return Some(format!("rope scaling `{kind}` is not supported: {CHOOSE_UNSCALED}"));
    }
    // The second is the key of files from before `rope.scaling`.
    for key in ["rope.scaling.factor", "rope.scale_linear"] {
        let factor = gguf.f32(&format!("{arch}.{key}")).ok();
        if let Some(factor) = factor.filter(|factor| factor.total_cmp(&1.0).is_ne()) {
            return Some(format!("`{arch}.{key}` is {factor}, not 1: {CHOOSE_UNSCALED}"));
        }
    }
    if let Some(experts) = number("expert_count").filter(|experts| *experts > 0) {
        return Some(format!("a mixture of {experts} experts is not supported {SUPPORTED}"));
    }
    let window = number("attention.sliding_window").filter(|window| *window > 0);
    if let (Family::Llama | Family::Qwen2, Some(window)) = (family, window) {
        return Some(format!("a sliding window of {window} is supported for gemma2 alone"));
    }
    for (key, what) in [
        ("rope.dimension_count", "rotary embeddings of a part of each head are"),
        ("attention.value_length", "values of another width than keys are"),
    ] {
        if let Some(width) = number(key).filter(|width| *width != head_dim as u64) {
            return Some(format!("`{arch}.{key}` is {width} of {head_dim}: {what} not supported"));
        }
    }
    None
}

impl ModelConfig {
    /// `(in, out)` features of the linear layer of that index in [`crate::LINEAR`].
    pub fn linear_shape(&self, linear: usize) -> (usize, usize) {
        let (hidden, ffn) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        [
            (hidden, q),
            (hidden, kv),
            (hidden, kv),
            (q, hidden),
            (hidden, ffn),
            (hidden, ffn),
            (ffn, hidden),
        ][linear]
    }

    /// Reads the shape of the model in `folder`.
    ///
    /// # Errors
    /// [`CheckpointError`] naming what is missing, or the feature that is not supported.
    pub fn read(folder: &ModelFolder) -> Result<Self, CheckpointError> {
        let config = match folder {
            ModelFolder::Gguf { gguf, .. } => Self::from_gguf(gguf)?,
            ModelFolder::Safetensors { dir, .. } => hub_config::read(&dir.join("config.json"))?,
        };
        config.check(folder.path())?;
        Ok(config)
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self, CheckpointError> {
        let refuse = |what: String| Err(CheckpointError::content(gguf.path(), what));
        let arch = gguf.str("general.architecture")?;
        let Some(family) = Family::from_name(arch) else {
            return refuse(format!("architecture `{arch}` is not supported {SUPPORTED}"));
        };
        let number = |key: &str| gguf.u64(&format!("{arch}.{key}")).map(|v| v as usize);
        let float = |key: &str| gguf.f32(&format!("{arch}.{key}"));
        let heads = number("attention.head_count")?;
        let hidden_size = number("embedding_length")?;
        let head_dim =
            number("attention.key_length").unwrap_or(hidden_size.checked_div(heads).unwrap_or(0));
        if let Some(what) = gguf_refusal(gguf, family, arch, head_dim) {
            return refuse(what);
        }
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::{GgmlType, GgufWriter};

    /// A GGUF file of a Llama with more metadata.
    fn read(more: impl Fn(&mut GgufWriter)) -> Result<ModelConfig, String> {
        let mut writer = GgufWriter::new();
        writer.str("general.architecture", "llama");
        for (key, value) in [
            ("block_count", 1),
            ("context_length", 64),
            ("embedding_length", 64),
            ("feed_forward_length", 64),
            ("attention.head_count", 2),
            ("attention.key_length", 32),
        ] {
            writer.u32(&format!("llama.{key}"), value);
        }
        writer.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
        more(&mut writer);
        writer.tensor("token_embd.weight", GgmlType::F32, &[4, 64]).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let data = |_| Ok::<_, std::io::Error>(vec![0; 4 * 64 * 4]);
        writer.write(&mut file.as_file(), data).unwrap();
        let gguf = Gguf::open(file.path()).unwrap();
        ModelConfig::read(&ModelFolder::Gguf { gguf }).map_err(|e| e.to_string())
    }

    #[test]
    fn gguf_that_asks_for_more_is_refused() {
        read(|_| {}).unwrap();
        read(|w| w.str("llama.rope.scaling.type", "none")).unwrap();
        let refused = |message: &str, more: &dyn Fn(&mut GgufWriter)| {
            let error = read(more).unwrap_err();
            assert!(error.contains(message), "{error}");
        };
        refused("rope scaling `yarn`", &|w| w.str("llama.rope.scaling.type", "yarn"));
        refused("is 4, not 1", &|w| w.f32("llama.rope.scaling.factor", 4.0));
        refused("is 2, not 1", &|w| w.f32("llama.rope.scale_linear", 2.0));
        refused("mixture of 8 experts", &|w| w.u32("llama.expert_count", 8));
        refused("window of 4096", &|w| w.u32("llama.attention.sliding_window", 4096));
        refused("16 of 32: rotary", &|w| w.u32("llama.rope.dimension_count", 16));
        refused("64 of 32: values", &|w| w.u32("llama.attention.value_length", 64));
    }
}
