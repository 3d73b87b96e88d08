//! The merged model as a folder of bf16 safetensors, as transformers writes one.

use std::path::Path;

use checkpoint::{
    ChatTemplate, Family, ModelConfig, ModelFolder, Tokenizer, plan_shards, shard_index, write_bf16,
};
use contract::{Reporter, StageError};
use half::bf16;
use serde_json::{Map, Value, json};

use crate::merged::{Merged, architecture};
use crate::out::{self, Fault, Written};

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
/// Files that belong to a model beside its weights and `config.json`.
const COMPANIONS: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
];

/// Writes weights, configuration and tokenizer into `folder`. The configuration is that of `base`,
/// whose weights these are; tokenizer and template are those of `model`, which was trained.
///
/// # Errors
/// What cannot be read, merged or written.
pub(crate) fn write(
    merged: &Merged<'_>,
    (model, base): (&ModelFolder, &ModelFolder),
    max_shard_bytes: u64,
    folder: &Path,
    reporter: &mut Reporter,
) -> Result<Written, StageError> {
    let tensors = merged.tensors();
    let shards = plan_shards(&tensors, max_shard_bytes);
    let mut written = Written::default();
    let total = tensors.len() as u64;
    for shard in &shards {
        let bytes = out::file(folder, &shard.file, |file| {
            write_bf16::<Fault>(file, shard, |name, shape| {
                let values = merged.values(name, shape)?;
                written.tensor(&values, values.iter().map(|v| bf16::from_f32(*v).to_f32()));
                reporter.advance(written.tensors, total, "tensors", name);
                Ok(values)
            })
        })?;
        written.bytes += bytes;
        written.files.push(shard.file.clone());
    }
    if shards.len() > 1 {
        json_file(folder, INDEX, &shard_index(&shards))?;
    }
    let config = match base {
        ModelFolder::Safetensors { dir } => copied_config(&dir.join(CONFIG))?,
        ModelFolder::Gguf { .. } => config_of(merged.config),
    };
    json_file(folder, CONFIG, &config)?;
    match model {
        ModelFolder::Safetensors { dir } => copy_companions(dir, folder)?,
        ModelFolder::Gguf { .. } => write_companions(model, folder)?,
    }
    Ok(written)
}

/// A `config.json` without what it said of quantisation.
fn copied_config(path: &Path) -> Result<Value, StageError> {
    let text = std::fs::read(path).map_err(|e| StageError::io("read", path, &e))?;
    let mut config: Map<String, Value> = serde_json::from_slice(&text)
        .map_err(|e| StageError::input(format!("{}: {e}", path.display())))?;
    config.remove("quantization_config");
    // transformers 5 has `dtype`, earlier ones `torch_dtype`.
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(key.to_owned(), json!("bfloat16"));
    Ok(Value::Object(config))
}

/// A `config.json` for a model that came as GGUF.
fn config_of(c: &ModelConfig) -> Value {
    let (model_type, class) = architecture(c.family);
    let mut config = json!({
        "architectures": [class],
        "model_type": model_type,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    });
    if c.family == Family::Gemma2 {
        let v = &c.variations;
        let kind = |layer| match c.sliding_window(layer) {
            Some(_) => "sliding_attention",
            None => "full_attention",
        };
        config["hidden_act"] = json!("gelu_pytorch_tanh");
        config["hidden_activation"] = json!("gelu_pytorch_tanh");
        config["query_pre_attn_scalar"] = json!(v.query_pre_attn_scalar);
        config["attn_logit_softcapping"] = json!(v.attn_logit_softcapping);
        config["final_logit_softcapping"] = json!(v.final_logit_softcapping);
        config["sliding_window"] = json!(v.sliding_windows.iter().flatten().next());
        config["layer_types"] = (0..c.num_hidden_layers).map(kind).collect();
    }
    config
}

fn copy_companions(from: &Path, folder: &Path) -> Result<(), StageError> {
    for name in COMPANIONS {
        let path = from.join(name);
        match std::fs::read(&path) {
            Ok(content) => out::bytes(folder, name, &content)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(StageError::io("read", &path, &e)),
        }
    }
    Ok(())
}

/// Tokenizer and template files for a model that came as GGUF.
fn write_companions(model: &ModelFolder, folder: &Path) -> Result<(), StageError> {
    let tokenizer = model.tokenizer()?;
    json_file(folder, "tokenizer.json", &tokenizer.to_json()?)?;
    let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast"});
    for (key, id) in [("bos_token", tokenizer.bos()), ("eos_token", tokenizer.eos())] {
        if let Some(token) = id.map(|id| token_of(&tokenizer, id)).transpose()? {
            config[key] = json!(token);
        }
    }
    if let Ok(ChatTemplate { source, tool_source, .. }) = model.chat_template() {
        match tool_source {
            // Only the older place has room for two.
            Some(tools) => {
                config["chat_template"] = json!([
                    {"name": "default", "template": source},
                    {"name": "tool_use", "template": tools},
                ]);
            }
            None => out::bytes(folder, "chat_template.jinja", source.as_bytes())?,
        }
    }
    json_file(folder, "tokenizer_config.json", &config)
}

fn token_of(tokenizer: &Tokenizer, id: u32) -> Result<String, StageError> {
    Ok(tokenizer.decode(&[id])?)
}

fn json_file(folder: &Path, name: &str, value: &Value) -> Result<(), StageError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(StageError::internal)?;
    text.push(b'\n');
    out::bytes(folder, name, &text)
}
