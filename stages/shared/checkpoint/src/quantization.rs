//! `quantization_config` of `config.json`: what is supported, and which layers it leaves alone.

use std::path::Path;

use serde_json::Value;

use crate::CheckpointError;

/// Ends the refusal of a quantised checkpoint.
pub(crate) const USE_OTHER: &str = "use the model in 16 bits or in bitsandbytes' NF4";

/// A checkpoint that bitsandbytes quantised to NF4.
#[derive(Debug)]
pub(crate) struct Quantization {
    /// Names of modules whose linear layers are stored unquantised (`llm_int8_skip_modules`).
    skipped: Vec<String>,
}

impl Quantization {
    /// Reads the section of the `config.json` in `dir`; `None` where there is no section or file.
    ///
    /// # Errors
    /// [`CheckpointError`] naming the method or option that is not supported.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>, CheckpointError> {
        let path = dir.join("config.json");
        let text = match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| CheckpointError::io(&path, e))?,
        };
        let config: Value = serde_json::from_slice(&text)
            .map_err(|e| CheckpointError::content(&path, format!("line {}: {e}", e.line())))?;
        let section = config.get("quantization_config").filter(|s| !s.is_null());
        section.map(Self::parse).transpose().map_err(|e| CheckpointError::content(&path, e))
    }

    /// Reads the section.
    ///
    /// # Errors
    /// Names the method or option that is not supported.
    pub(crate) fn parse(section: &Value) -> Result<Self, String> {
        let text = |key: &str| section.get(key).and_then(Value::as_str);
        let flag = |key: &str| section.get(key).and_then(Value::as_bool) == Some(true);
        let refuse = |what: String| Err(format!("quantization_config: {what}: {USE_OTHER}"));
        // Before it had `quant_method`, transformers knew bitsandbytes alone.
        let method = text("quant_method").unwrap_or("bitsandbytes");
        if method != "bitsandbytes" {
            return refuse(format!("method `{method}` is not supported"));
        }
        if flag("load_in_8bit") || flag("_load_in_8bit") {
            return refuse("bitsandbytes' 8-bit weights are not supported".to_owned());
        }
        if !flag("load_in_4bit") && !flag("_load_in_4bit") {
            return refuse("`load_in_4bit` is not true, so the format is unknown".to_owned());
        }
        // Left out, it is fp4 in transformers.
        let kind = text("bnb_4bit_quant_type").unwrap_or("fp4");
        if kind != "nf4" {
            return refuse(format!("4-bit type `{kind}` is not supported"));
        }
        let storage = text("bnb_4bit_quant_storage").unwrap_or("uint8");
        if storage != "uint8" {
            return refuse(format!("codes stored as `{storage}` are not supported, only uint8"));
        }
        let skipped = match section.get("llm_int8_skip_modules") {
            None | Some(Value::Null) => Vec::new(),
            Some(list) => module_names(list)?,
        };
        Ok(Self { skipped })
    }

    /// Whether the linear layer `module` is stored unquantised: a listed name is the module, one
    /// around it, or the end of its name (`should_convert_module` of transformers).
    pub(crate) fn skips(&self, module: &str) -> bool {
        self.skipped.iter().any(|name| {
            module.ends_with(name)
                || module
                    .strip_prefix(name.as_str())
                    .is_some_and(|rest| name.ends_with('.') || rest.starts_with('.'))
        })
    }
}

/// Plain module names: transformers takes them as regular expressions, which are refused here.
fn module_names(list: &Value) -> Result<Vec<String>, String> {
    let plain = |name: &str| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    let names = list.as_array().map(Vec::as_slice).unwrap_or_default().iter();
    let names: Option<Vec<String>> =
        names.map(|v| v.as_str().filter(|n| plain(n)).map(str::to_owned)).collect();
    names.filter(|_| list.is_array()).ok_or_else(|| {
        format!("quantization_config: llm_int8_skip_modules is not a list of names: {list}")
    })
}
