//! Names of a decoder's tensors, in transformers and in GGUF, and what other names mean.

use std::collections::BTreeSet;

use crate::quantization::USE_OTHER;
use crate::{Family, ModelConfig};

/// Outside the layers.
const OUTER: [&str; 3] = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"];
/// Linear layers of a decoder layer, as their tensors are named.
pub const LINEAR: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];
/// What bitsandbytes stores beside a weight.
const BESIDE: [&str; 5] =
    ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"];

/// llama.cpp's name of a transformers tensor, in most families.
fn usual_gguf_name(name: &str) -> Option<String> {
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

/// llama.cpp's name of a tensor of this model: Gemma-2 names its four norms otherwise.
pub fn gguf_name(config: &ModelConfig, name: &str) -> Option<String> {
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
    let own = (config.family == Family::Gemma2).then(gemma_norm).flatten();
    own.or_else(|| usual_gguf_name(name))
}

/// transformers' names of every tensor that a decoder has.
fn all(config: &ModelConfig) -> impl Iterator<Item = String> {
    let biased = if config.qkv_bias { 3 } else { 0 };
    let norms: &[&str] = if config.variations.output_norms {
        &[
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ]
    } else {
        &["input_layernorm", "post_attention_layernorm"]
    };
    let layers = (0..config.num_hidden_layers).flat_map(move |layer| {
        let weights = LINEAR.iter().chain(norms).map(|module| (module, "weight"));
        let biases = LINEAR.iter().take(biased).map(|module| (module, "bias"));
        let name = move |(module, kind)| format!("model.layers.{layer}.{module}.{kind}");
        weights.chain(biases).map(name).collect::<Vec<_>>()
    });
    OUTER.into_iter().map(str::to_owned).chain(layers)
}

/// Why a safetensors checkpoint with these tensors cannot be read: one of them would be left out.
/// Names outside the decoder, such as those of a value head, do not matter.
pub(crate) fn refusal<'a>(
    config: &ModelConfig,
    names: impl Iterator<Item = &'a str>,
) -> Option<String> {
    let known: BTreeSet<String> = all(config).collect();
    let is_known = |name: &str| {
        let beside = || {
            let (weight, part) = name.split_once(".weight.")?;
            (BESIDE.contains(&part) && known.contains(&format!("{weight}.weight"))).then_some(())
        };
        // Computed from the configuration; old checkpoints hold it all the same.
        let derived = name.ends_with("rotary_emb.inv_freq");
        known.contains(name) || derived || beside().is_some()
    };
    let ours = |name: &&str| name.starts_with("model.") || name.starts_with("lm_head.");
    names.filter(ours).find(|name| !is_known(name)).map(|name| foreign(config, name))
}

/// As [`refusal`], of GGUF, where every name counts.
pub(crate) fn refusal_of_gguf<'a>(
    config: &ModelConfig,
    mut names: impl Iterator<Item = &'a str>,
) -> Option<String> {
    let known: BTreeSet<String> = all(config).filter_map(|name| gguf_name(config, &name)).collect();
    names.find(|name| !known.contains(*name)).map(|name| foreign(config, name))
}

/// Says what a tensor with that name belongs to.
fn foreign(config: &ModelConfig, name: &str) -> String {
    let last = name.rsplit('.').next().unwrap_or(name);
    let format = match last {
        "qweight" | "qzeros" | "g_idx" => "GPTQ and AWQ are",
        "SCB" | "weight_format" => "bitsandbytes' 8-bit weights are",
        "weight_scale" | "weight_scale_inv" | "input_scale" => "FP8 and other scaled weights are",
        "bitsandbytes__fp4" => "bitsandbytes' fp4 is",
        _ if name.starts_with("rope_freqs") => {
            return format!("tensor `{name}`: scaled rotary frequencies are not supported");
        }
        _ => {
            let (family, layers) = (config.family, config.num_hidden_layers);
            return format!(
                "tensor `{name}` is no part of a {family:?} decoder of {layers} layers as it is \
                 computed here: leaving it out would give another model"
            );
        }
    };
    format!("tensor `{name}`: {format} not supported: {USE_OTHER}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::Variations;

    fn config(family: Family) -> ModelConfig {
        ModelConfig {
            family,
            hidden_size: 64,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 2,
            head_dim: 32,
            intermediate_size: 64,
            vocab_size: 64,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            max_position_embeddings: 64,
            tie_word_embeddings: true,
            qkv_bias: family == Family::Qwen2,
            variations: Variations {
                output_norms: family == Family::Gemma2,
                ..Variations::default()
            },
        }
    }

    #[test]
    fn tensors_that_would_be_left_out_are_named() {
        let llama = config(Family::Llama);
        let refused = |name: &str| refusal(&llama, [name].into_iter());
        for (name, message) in [
            ("model.layers.0.self_attn.q_proj.bias", "no part of a Llama decoder of 2 layers"),
            ("model.layers.2.self_attn.q_proj.weight", "no part of a Llama decoder of 2 layers"),
            ("model.layers.0.self_attn.q_norm.weight", "would give another model"),
            ("model.layers.0.mlp.experts.3.w1.weight", "would give another model"),
            ("model.layers.0.post_feedforward_layernorm.weight", "would give another model"),
            ("lm_head.bias", "would give another model"),
            ("model.layers.0.mlp.up_proj.qweight", "GPTQ and AWQ are not supported"),
            ("model.layers.0.mlp.up_proj.SCB", "8-bit weights are not supported"),
            ("model.layers.0.mlp.up_proj.weight_scale_inv", "FP8 and other scaled"),
            (
                "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__fp4",
                "fp4 is not supported",
            ),
        ] {
            let error = refused(name).unwrap();
            assert!(error.contains(message) && error.contains(name), "{error}");
        }
        for name in [
            "model.layers.1.mlp.down_proj.weight.nested_quant_map",
            "model.layers.1.self_attn.rotary_emb.inv_freq",
            "score.weight",
            "lm_head.weight",
        ] {
            assert_eq!(refused(name), None);
        }
        let qwen = config(Family::Qwen2);
        assert_eq!(refusal(&qwen, ["model.layers.0.self_attn.q_proj.bias"].into_iter()), None);
        assert!(refusal(&qwen, ["model.layers.0.self_attn.o_proj.bias"].into_iter()).is_some());
    }

    #[test]
    fn tensors_of_gguf_that_would_be_left_out_are_named() {
        let refused = |family, name: &str| refusal_of_gguf(&config(family), [name].into_iter());
        let error = refused(Family::Llama, "rope_freqs.weight").unwrap();
        assert!(error.contains("scaled rotary frequencies"), "{error}");
        assert!(refused(Family::Llama, "blk.0.attn_q.bias").is_some());
        assert!(refused(Family::Llama, "blk.0.ffn_gate_exps.weight").is_some());
        assert!(refused(Family::Llama, "blk.0.post_ffw_norm.weight").is_some());
        for (family, name) in [
            (Family::Qwen2, "blk.1.attn_q.bias"),
            (Family::Gemma2, "blk.1.post_ffw_norm.weight"),
            (Family::Gemma2, "blk.1.ffn_norm.weight"),
            (Family::Llama, "output.weight"),
        ] {
            assert_eq!(refused(family, name), None, "{name}");
        }
    }

    #[test]
    fn names_of_layers_translate() {
        let name = usual_gguf_name("model.layers.12.self_attn.q_proj.weight").unwrap();
        assert_eq!(name, "blk.12.attn_q.weight");
        assert_eq!(usual_gguf_name("model.layers.0.other.weight"), None);
    }
}
