//! Where the decoder of a family departs from Llama's.

use serde::Deserialize;

use crate::ModelConfig;

/// Most layers of a model that is believed.
pub(crate) const MAX_LAYERS: usize = 1 << 12;

/// Activation of the gate of the feed-forward block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    #[default]
    Silu,
    /// GELU by its approximation with tanh (Hendrycks and Gimpel, 2016, arXiv:1606.08415).
    GeluTanh,
}

/// What differs from Llama; the default is Llama.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Variations {
    /// The outputs of attention and of the feed-forward block are normalised too, before they join
    /// the residual stream: four norms a layer.
    pub output_norms: bool,
    /// Added to norm weights as they are stored: 1 for `(1 + w)` norms, unless the file holds the
    /// sum already.
    pub norm_offset: f32,
    /// Activation of the gate.
    pub activation: Activation,
    /// Factor on the embeddings.
    pub embedding_scale: Option<f32>,
    /// Attention scores are scaled by the square root of its inverse; the width of a head where it
    /// is not given.
    pub query_pre_attn_scalar: Option<f32>,
    /// Attention scores `s` become `c * tanh(s / c)`.
    pub attn_logit_softcapping: Option<f32>,
    /// Logits `l` become `c * tanh(l / c)`.
    pub final_logit_softcapping: Option<f32>,
    /// Positions that a query sees, its own among them, by layer; `None`, and layers beyond the end,
    /// see everything before.
    pub sliding_windows: Vec<Option<usize>>,
}

impl Variations {
    /// Gemma-2's (Gemma Team, 2024, arXiv:2408.00118), with the values of transformers'
    /// `Gemma2Config` where a number is not the model's own choice.
    pub(crate) fn gemma2(hidden_size: usize, norm_offset: f32, own: &Gemma2) -> Self {
        Self {
            output_norms: true,
            norm_offset,
            activation: Activation::GeluTanh,
            embedding_scale: Some((hidden_size as f64).sqrt() as f32),
            query_pre_attn_scalar: Some(own.query_pre_attn_scalar),
            attn_logit_softcapping: own.attn_logit_softcapping,
            final_logit_softcapping: own.final_logit_softcapping,
            sliding_windows: Vec::new(),
        }
    }

    /// Whether every number can be computed with.
    pub(crate) fn sane(&self) -> bool {
        let factors = [
            self.embedding_scale,
            self.query_pre_attn_scalar,
            self.attn_logit_softcapping,
            self.final_logit_softcapping,
        ];
        factors.iter().flatten().all(|f| f.is_finite() && *f > 0.0)
            && self.sliding_windows.iter().flatten().all(|window| *window > 0)
    }
}

/// The numbers of `Gemma2Config` in `config.json`, with the defaults of transformers.
#[derive(Deserialize)]
#[serde(default)]
pub(crate) struct Gemma2 {
    pub(crate) query_pre_attn_scalar: f32,
    pub(crate) attn_logit_softcapping: Option<f32>,
    pub(crate) final_logit_softcapping: Option<f32>,
    pub(crate) sliding_window: Option<usize>,
    /// Transformers 5; before, even layers slide.
    pub(crate) layer_types: Option<Vec<String>>,
    pub(crate) hidden_activation: Option<String>,
    pub(crate) use_bidirectional_attention: Option<bool>,
}

impl Default for Gemma2 {
    fn default() -> Self {
        Self {
            query_pre_attn_scalar: 256.0,
            attn_logit_softcapping: Some(50.0),
            final_logit_softcapping: Some(30.0),
            sliding_window: Some(4096),
            layer_types: None,
            hidden_activation: None,
            use_bidirectional_attention: None,
        }
    }
}

impl Gemma2 {
    /// The window of every layer.
    ///
    /// # Errors
    /// Says which field is not supported.
    pub(crate) fn windows(&self, layers: usize) -> Result<Vec<Option<usize>>, String> {
        if self.use_bidirectional_attention == Some(true) {
            return Err("`use_bidirectional_attention` is not supported".to_owned());
        }
        if layers > MAX_LAYERS {
            return Err(format!("{layers} layers make no sense"));
        }
        let Some(types) = &self.layer_types else {
            let even = |layer: usize| layer.is_multiple_of(2);
            return Ok((0..layers).map(|l| self.sliding_window.filter(|_| even(l))).collect());
        };
        if types.len() != layers {
            return Err(format!("`layer_types` names {} of {layers} layers", types.len()));
        }
        let window = |kind: &String| match (kind.as_str(), self.sliding_window) {
            ("full_attention", _) => Ok(None),
            ("sliding_attention", Some(window)) => Ok(Some(window)),
            ("sliding_attention", None) => Err("`sliding_window` is missing".to_owned()),
            (other, _) => Err(format!("layer type `{other}` is not supported")),
        };
        types.iter().map(window).collect()
    }

    /// The activation, under its newer or older name (`hidden_act`).
    ///
    /// # Errors
    /// Names the activation that is not supported.
    pub(crate) fn check_activation(&self, hidden_act: Option<&str>) -> Result<(), String> {
        match self.hidden_activation.as_deref().or(hidden_act) {
            // transformers takes plain `gelu` for the approximation where only `hidden_act` is set.
            None | Some("gelu_pytorch_tanh") => Ok(()),
            Some("gelu") if self.hidden_activation.is_none() => Ok(()),
            Some(other) => Err(format!("activation `{other}` is not supported")),
        }
    }
}

impl ModelConfig {
    /// Factor on attention scores.
    pub fn attention_scale(&self) -> f32 {
        let scalar = self.variations.query_pre_attn_scalar;
        1.0 / scalar.unwrap_or(self.head_dim as f32).sqrt()
    }

    /// Positions that a query of `layer` sees, its own among them, where that is limited.
    pub fn sliding_window(&self, layer: usize) -> Option<usize> {
        self.variations.sliding_windows.get(layer).copied().flatten()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn parse(text: &str) -> Gemma2 {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn even_layers_slide_where_no_types_are_given() {
        let own = parse(r#"{"sliding_window": 16}"#);
        assert_eq!(own.windows(3).unwrap(), [Some(16), None, Some(16)]);
        let own = parse(
            r#"{"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}"#,
        );
        assert_eq!(own.windows(2).unwrap(), [None, Some(16)]);
        assert_eq!(own.windows(3).unwrap_err(), "`layer_types` names 2 of 3 layers");
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let own = parse(r#"{"layer_types": ["chunked_attention"]}"#);
        assert_eq!(own.windows(1).unwrap_err(), "layer type `chunked_attention` is not supported");
        let own = parse(r#"{"use_bidirectional_attention": true}"#);
        assert!(own.windows(1).unwrap_err().contains("use_bidirectional_attention"));
        let own = parse(r#"{"hidden_activation": "relu"}"#);
        assert_eq!(
            own.check_activation(Some("gelu_pytorch_tanh")).unwrap_err(),
            "activation `relu` is not supported"
        );
    }

    #[test]
    fn a_null_softcap_is_none_and_a_missing_one_the_default() {
        let own = parse(r#"{"attn_logit_softcapping": null}"#);
        assert_eq!((own.attn_logit_softcapping, own.final_logit_softcapping), (None, Some(30.0)));
    }

    const HUB: &str = r#"{"model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "intermediate_size": 9216, "vocab_size": 256000, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0}"#;

    fn read(json: &str) -> Result<ModelConfig, crate::CheckpointError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), json).unwrap();
        ModelConfig::read(&crate::ModelFolder::Safetensors { dir: dir.path().to_owned() })
    }

    #[test]
    fn a_config_of_transformers_4_is_read_with_its_defaults() {
        let config = read(HUB).unwrap();
        assert!(config.tie_word_embeddings && !config.qkv_bias);
        let scale = config.attention_scale();
        assert_eq!((config.head_dim, scale.to_bits()), (256, 0.0625f32.to_bits()));
        assert_eq!((config.sliding_window(0), config.sliding_window(1)), (Some(4096), None));
        let found = config.variations;
        assert_eq!((found.embedding_scale, found.norm_offset), (Some(48.0), 1.0));
        assert_eq!(found.final_logit_softcapping, Some(30.0));
    }

    #[test]
    fn numbers_that_cannot_be_computed_with_are_refused() {
        for (from, to) in [
            ("\"sliding_window\": 4096", "\"sliding_window\": 0"),
            ("\"attn_logit_softcapping\": 50.0", "\"attn_logit_softcapping\": 0"),
            ("\"query_pre_attn_scalar\": 256", "\"query_pre_attn_scalar\": -1"),
            ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 9000000000"),
        ] {
            let error = read(&HUB.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains("make no sense"), "{to}: {error}");
        }
    }
}
