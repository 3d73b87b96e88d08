//! The tokenizer of a model folder: `tokenizer.json`, or built from GGUF metadata.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{CheckpointError, Gguf, ModelFolder, sentencepiece};

/// Longest run of white space that the pre-tokenizer's regex engine is trusted with.
const MAX_BLANK_RUN: usize = 100_000;

/// Turns text into token ids and back.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Option<u32>,
    adds_bos: bool,
}

/// Token ids of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Byte range `(start, end)` of the text behind each token.
    pub offsets: Vec<(usize, usize)>,
}

impl ModelFolder {
    /// Reads the tokenizer.
    ///
    /// # Errors
    /// [`CheckpointError`] where it is missing, malformed or of an unsupported type.
    pub fn tokenizer(&self) -> Result<Tokenizer, CheckpointError> {
        match self {
            Self::Gguf { gguf } => from_gguf(gguf),
            Self::Safetensors { dir } => from_folder(dir),
        }
    }
}

impl Tokenizer {
    /// Encodes text as it stands: special tokens written in it are recognised, none are added.
    ///
    /// # Errors
    /// [`CheckpointError::Text`] for text that cannot be encoded.
    pub fn encode(&self, text: &str) -> Result<Encoding, CheckpointError> {
        let mut run = 0;
        for c in text.chars() {
            run = if c.is_whitespace() { run + 1 } else { 0 };
            if run > MAX_BLANK_RUN {
                return Err(CheckpointError::Text(format!(
                    "a run of more than {MAX_BLANK_RUN} white space characters cannot be tokenised"
                )));
            }
        }
        let encoded = self
            .inner
            .encode(text, false)
            .map_err(|e| CheckpointError::Text(format!("text cannot be tokenised: {e}")))?;
        Ok(Encoding { ids: encoded.get_ids().to_vec(), offsets: encoded.get_offsets().to_vec() })
    }

    /// Text of token ids, special tokens included.
    ///
    /// # Errors
    /// [`CheckpointError::Text`] where the decoder refuses.
    pub fn decode(&self, ids: &[u32]) -> Result<String, CheckpointError> {
        self.inner
            .decode(ids, false)
            .map_err(|e| CheckpointError::Text(format!("tokens cannot be decoded: {e}")))
    }

    /// Id of a token by its text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Id that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Id that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// A `tokenizer.json` of the tokenizer; where texts begin with [`Tokenizer::bos`], its
    /// post-processor puts it there.
    ///
    /// # Errors
    /// [`CheckpointError::Text`] where it cannot be written down.
    pub fn to_json(&self) -> Result<Value, CheckpointError> {
        let fault = |e: &dyn std::fmt::Display| {
            CheckpointError::Text(format!("the tokenizer cannot be written: {e}"))
        };
        let mut json = serde_json::to_value(&self.inner).map_err(|e| fault(&e))?;
        let bos = self.bos.filter(|_| self.adds_bos && json["post_processor"].is_null());
        if let Some((id, text)) = bos.and_then(|id| Some((id, self.inner.id_to_token(id)?))) {
            let (mark, a) = (json!({"SpecialToken": {"id": text, "type_id": 0}}), "A");
            let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
            json["post_processor"] = json!({
                "type": "TemplateProcessing",
                "single": [mark, sequence(a)],
                "pair": [mark, sequence(a), mark, sequence("B")],
                "special_tokens": {&text: {"id": text, "ids": [id], "tokens": [text]}},
            });
        }
        Ok(json)
    }

    /// Whether the model was trained on texts that begin with [`Tokenizer::bos`].
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }
}

/// Reads a JSON file of a model folder; an absent one is null.
pub(crate) fn read_json(path: &Path) -> Result<Value, CheckpointError> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map_err(|e| CheckpointError::content(path, format!("line {}: {e}", e.line()))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(e) => Err(CheckpointError::io(path, e)),
    }
}

/// A token that a configuration gives as text or as `{"content": text}`.
pub(crate) fn token_text(config: &Value, key: &str) -> Option<String> {
    let value = config.get(key)?;
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    text.map(str::to_owned)
}

fn from_folder(dir: &Path) -> Result<Tokenizer, CheckpointError> {
    let path = dir.join("tokenizer.json");
    let text = std::fs::read(&path).map_err(|e| CheckpointError::io(&path, e))?;
    // The library panics where its text is nested too deeply; as a value it has passed that limit.
    let json: Value = serde_json::from_slice(&text)
        .map_err(|e| CheckpointError::content(&path, format!("no tokenizer can be read: {e}")))?;
    // What the post-processor puts in front of a text is what the model expects there.
    let (inner, probe) = guarded(&path, || {
        let inner: tokenizers::Tokenizer =
            serde_json::from_value(json).map_err(|e| e.to_string())?;
        let probe = inner.encode("a", true).ok();
        Ok((inner, probe))
    })?;
    let config = read_json(&dir.join("tokenizer_config.json"))?;
    let id = |key: &str| token_text(&config, key).and_then(|t| inner.token_to_id(&t));
    let (bos, eos) = (id("bos_token"), id("eos_token"));
    let adds_bos = bos.is_some() && probe.and_then(|p| p.get_ids().first().copied()) == bos;
    Ok(Tokenizer { inner, bos, eos, adds_bos })
}

fn from_gguf(gguf: &Gguf) -> Result<Tokenizer, CheckpointError> {
    let (whole, adds_bos) = match gguf.str("tokenizer.ggml.model")? {
        "gpt2" => (bytes_of_gguf(gguf)?, false),
        "llama" => (sentencepiece::from_gguf(gguf)?.to_json(), true),
        model => {
            let what =
                format!("tokenizer model `{model}` is not supported (supported: gpt2, llama)");
            return Err(CheckpointError::content(gguf.path(), what));
        }
    };
    let inner = guarded(gguf.path(), || {
        serde_json::from_value::<tokenizers::Tokenizer>(whole).map_err(|e| e.to_string())
    })?;
    let id = |key: &str| gguf.u64(key).ok().and_then(|id| u32::try_from(id).ok());
    let says = gguf.metadata("tokenizer.ggml.add_bos_token").and_then(crate::Metadata::as_bool);
    Ok(Tokenizer {
        inner,
        bos: id("tokenizer.ggml.bos_token_id"),
        eos: id("tokenizer.ggml.eos_token_id"),
        adds_bos: says.unwrap_or(adds_bos),
    })
}

/// A `tokenizer.json` of byte-level BPE.
fn bytes_of_gguf(gguf: &Gguf) -> Result<Value, CheckpointError> {
    let refuse = |what: String| Err(CheckpointError::content(gguf.path(), what));
    let pre = gguf.str("tokenizer.ggml.pre").unwrap_or("default");
    let Some((normalizer, pre_tokenizer, ignore_merges)) = pre_tokenizer(pre) else {
        return refuse(format!(
            "pre-tokenizer `{pre}` is not supported (supported: default, gpt-2, llama-bpe, qwen2, smollm)"
        ));
    };
    let tokens = gguf.strings("tokenizer.ggml.tokens")?;
    let types = gguf.integers("tokenizer.ggml.token_type").unwrap_or_default();
    let vocab: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, t)| ((*t).to_owned(), json!(id))).collect();
    let merges = gguf.strings("tokenizer.ggml.merges")?;
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in merges {
        match merge.split_once(' ') {
            Some((left, right)) => pairs.push(json!([left, right])),
            None => return refuse(format!("merge `{merge}` is no pair")),
        }
    }
    // Token types 3 (control) and 4 (user defined) are matched before anything else.
    let added: Vec<Value> = tokens
        .iter()
        .zip(&types)
        .enumerate()
        .filter(|(_, (_, kind))| matches!(kind, 3 | 4))
        .map(|(id, (token, kind))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": *kind == 3})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true});
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": ignore_merges, "vocab": vocab, "merges": pairs},
    }))
}

/// Runs a reader of the library `tokenizers`, which panics on some files that it should refuse.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T, String>) -> Result<T, CheckpointError> {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
    outcome
        .unwrap_or_else(|_| Err("it makes no sense to the library `tokenizers`".to_owned()))
        .map_err(|e| CheckpointError::content(path, format!("no tokenizer can be read: {e}")))
}

/// Normaliser, pre-tokenizer and `ignore_merges` behind llama.cpp's name for them, as the models'
/// own `tokenizer.json` files have them.
pub(crate) fn pre_tokenizer(name: &str) -> Option<(Value, Value, bool)> {
    let bytes = |use_regex: bool| {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": use_regex})
    };
    let split = |digits: &str| {
        let regex = format!(
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|{digits}| \
             ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
        );
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
            bytes(false)]})
    };
    Some(match name {
        "default" | "gpt-2" => (Value::Null, bytes(true), false),
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            let both = json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]});
            (Value::Null, both, false)
        }
        "qwen2" => (json!({"type": "NFC"}), split("\\p{N}"), false),
        "llama-bpe" => (Value::Null, split("\\p{N}{1,3}"), true),
        _ => return None,
    })
}
