//! Shapes of known models.

use checkpoint::{Activation, Family, ModelConfig, Variations};

/// `qwen2.5-3b`, `gemma-2-2b`, else SmolLM2-135M.
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
        "gemma-2-2b" => ModelConfig {
            family: Family::Gemma2,
            variations: Variations {
                output_norms: true,
                norm_offset: 1.0,
                activation: Activation::GeluTanh,
                embedding_scale: Some(48.0),
                query_pre_attn_scalar: Some(256.0),
                attn_logit_softcapping: Some(50.0),
                final_logit_softcapping: Some(30.0),
                sliding_windows: (0..26).map(|layer| (layer % 2 == 0).then_some(4096)).collect(),
            },
            hidden_size: 2304,
            num_hidden_layers: 26,
            num_attention_heads: 8,
            num_key_value_heads: 4,
            head_dim: 256,
            intermediate_size: 9216,
            vocab_size: 256_000,
            rope_theta: 1e4,
            max_position_embeddings: 8192,
            qkv_bias: false,
            ..qwen
        },
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
