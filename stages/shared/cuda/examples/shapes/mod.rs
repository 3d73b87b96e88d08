//! Shapes of known models.

use checkpoint::{Family, ModelConfig, Variations};

/// `qwen2.5-3b`, else SmolLM2-135M.
pub(crate) fn shape(name: &str) -> ModelConfig {
    let qwen = ModelConfig {
        family: Family::Qwen2,
        variations: Variations::default(),
        hidden_size: 2048,
        num_hidden_layers: 36,
        num_attention_heads: 16,
        num_key_value_heads: 2,
        head_dim: 128,
        intermediate_size: 11008,
        vocab_size: 151_936,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        max_position_embeddings: 32768,
        tie_word_embeddings: true,
        qkv_bias: true,
    };
    match name {
        "qwen2.5-3b" => qwen,
        _ => ModelConfig {
            family: Family::Llama,
            hidden_size: 576,
            num_hidden_layers: 30,
            num_attention_heads: 9,
            num_key_value_heads: 3,
            head_dim: 64,
            intermediate_size: 1536,
            vocab_size: 49152,
            qkv_bias: false,
            ..qwen
        },
    }
}
