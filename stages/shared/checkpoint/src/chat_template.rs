//! The chat template that comes with a model, as text; rendering it is the stage's work.

use std::path::Path;

use serde_json::Value;

use crate::tokenizer::{read_json, token_text};
use crate::{CheckpointError, Gguf, ModelFolder};

/// Template of a model in a file of its own, as transformers writes it.
const OWN_FILE: &str = "chat_template.jinja";

/// Jinja source and the marks that templates refer to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTemplate {
    /// Where it was found, for messages.
    pub origin: String,
    /// Jinja source.
    pub source: String,
    /// Source to use instead where tools are on offer, for models that have two.
    pub tool_source: Option<String>,
    /// Text of the begin mark; empty where there is none.
    pub bos_token: String,
    /// Text of the end mark; empty where there is none.
    pub eos_token: String,
}

impl ModelFolder {
    /// Reads the chat template: `chat_template.jinja` in the model's folder, which is how a user
    /// replaces one, else what the GGUF file or `tokenizer_config.json` holds.
    ///
    /// # Errors
    /// [`CheckpointError`] where the model has none.
    pub fn chat_template(&self) -> Result<ChatTemplate, CheckpointError> {
        match self {
            Self::Gguf { gguf } => from_gguf(gguf),
            Self::Safetensors { dir } => from_folder(dir),
        }
    }
}

/// The file of a template, where there is one.
fn own_file(path: &Path) -> Result<Option<String>, CheckpointError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(CheckpointError::io(path, e)),
    }
}

fn from_gguf(gguf: &Gguf) -> Result<ChatTemplate, CheckpointError> {
    let mark = |key: &str| {
        let id = gguf.u64(key).ok()?;
        let tokens = gguf.strings("tokenizer.ggml.tokens").ok()?;
        tokens.get(id as usize).map(|t| (*t).to_owned())
    };
    let own = own_file(&gguf.path().with_file_name(OWN_FILE))?;
    let (origin, source, tool_source) = match own {
        Some(text) => (OWN_FILE, text, None),
        None => (
            "tokenizer.chat_template",
            gguf.str("tokenizer.chat_template")?.to_owned(),
            gguf.str("tokenizer.chat_template.tool_use").ok().map(str::to_owned),
        ),
    };
    Ok(ChatTemplate {
        origin: origin.to_owned(),
        source,
        tool_source,
        bos_token: mark("tokenizer.ggml.bos_token_id").unwrap_or_default(),
        eos_token: mark("tokenizer.ggml.eos_token_id").unwrap_or_default(),
    })
}

fn from_folder(dir: &Path) -> Result<ChatTemplate, CheckpointError> {
    let config_path = dir.join("tokenizer_config.json");
    let config = read_json(&config_path)?;
    let (origin, source, tool_source) = if let Some(text) = own_file(&dir.join(OWN_FILE))? {
        (OWN_FILE, text, None)
    } else {
        let (source, tools) = of_config(config.get("chat_template")).ok_or_else(|| {
            CheckpointError::content(
                dir,
                "no chat template: neither `chat_template.jinja` nor \
                `chat_template` in `tokenizer_config.json`",
            )
        })?;
        ("tokenizer_config.json", source, tools)
    };
    Ok(ChatTemplate {
        origin: origin.to_owned(),
        source,
        tool_source,
        bos_token: token_text(&config, "bos_token").unwrap_or_default(),
        eos_token: token_text(&config, "eos_token").unwrap_or_default(),
    })
}

/// One text, or a list of `{name, template}` of which `default` and `tool_use` matter.
fn of_config(value: Option<&Value>) -> Option<(String, Option<String>)> {
    match value? {
        Value::String(text) => Some((text.clone(), None)),
        Value::Array(named) => {
            let find = |name: &str| {
                let entry = named.iter().find(|t| t["name"] == name)?;
                entry["template"].as_str().map(str::to_owned)
            };
            Some((find("default")?, find("tool_use")))
        }
        _ => None,
    }
}
