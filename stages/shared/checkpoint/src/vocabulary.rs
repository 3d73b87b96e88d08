//! A byte-level BPE vocabulary in GGUF's terms, from either kind of model folder.

use serde_json::Value;

use crate::tokenizer::{pre_tokenizer, read_json, token_text};
use crate::{CheckpointError, Gguf, GgufWriter, ModelFolder};

/// llama.cpp's names of the pre-tokenizers that are known here.
const PRE_TOKENIZERS: [&str; 4] = ["gpt-2", "smollm", "qwen2", "llama-bpe"];
/// Most tokens of a vocabulary: four times the largest in use.
const MAX_TOKENS: usize = 1 << 20;

/// ggml's token types.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Tokens, merges and marks of a byte-level BPE tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    /// llama.cpp's name of the pre-tokenizer, such as `qwen2`.
    pub pre: String,
    /// Text of each token by id; ids that no token has are `[PADn]`.
    pub tokens: Vec<String>,
    /// ggml's type of each token.
    pub types: Vec<i32>,
    /// Pairs `left right` in order of preference.
    pub merges: Vec<String>,
    /// Id that begins a text.
    pub bos: Option<u32>,
    /// Id that ends a text.
    pub eos: Option<u32>,
    /// Id of the padding.
    pub padding: Option<u32>,
    /// Id for what has no token.
    pub unknown: Option<u32>,
    /// Texts begin with `bos`.
    pub adds_bos: bool,
}

impl ModelFolder {
    /// Reads the vocabulary of a model whose embedding has `rows` rows.
    ///
    /// # Errors
    /// [`CheckpointError`] where the tokenizer is missing, is not byte-level BPE with one of
    /// llama.cpp's pre-tokenizers, or has tokens beyond the embedding.
    pub fn vocabulary(&self, rows: usize) -> Result<Vocabulary, CheckpointError> {
        let mut vocabulary = match self {
            Self::Gguf { gguf } => from_gguf(gguf)?,
            Self::Safetensors { dir } => {
                let path = dir.join("tokenizer.json");
                let json = read_json(&path)?;
                if json.is_null() {
                    return Err(CheckpointError::content(dir, "there is no `tokenizer.json`"));
                }
                let parts = from_json(&json).map_err(|e| CheckpointError::content(&path, e))?;
                let config = read_json(&dir.join("tokenizer_config.json"))?;
                let id = |key: &str| {
                    let text = token_text(&config, key)?;
                    parts.tokens.iter().position(|t| *t == text).map(|id| id as u32)
                };
                Vocabulary {
                    bos: id("bos_token"),
                    eos: id("eos_token"),
                    padding: id("pad_token"),
                    unknown: id("unk_token"),
                    adds_bos: self.tokenizer()?.adds_bos(),
                    ..parts
                }
            }
        };
        let count = vocabulary.tokens.len();
        if count > rows {
            let message = format!("{count} tokens, but the embedding has {rows} rows");
            return Err(CheckpointError::content(self.path(), message));
        }
        // Embeddings are often padded to a round number of rows; llama.cpp wants a token a row.
        vocabulary.tokens.extend((count..rows).map(|id| format!("[PAD{id}]")));
        vocabulary.types.resize(rows, UNUSED);
        Ok(vocabulary)
    }
}

impl Vocabulary {
    /// Adds the metadata `tokenizer.ggml.*`.
    pub fn write(&self, gguf: &mut GgufWriter) {
        gguf.str("tokenizer.ggml.model", "gpt2");
        gguf.str("tokenizer.ggml.pre", &self.pre);
        gguf.strings("tokenizer.ggml.tokens", &self.tokens);
        gguf.i32s("tokenizer.ggml.token_type", &self.types);
        gguf.strings("tokenizer.ggml.merges", &self.merges);
        for (mark, id) in [
            ("bos", self.bos),
            ("eos", self.eos),
            ("padding", self.padding),
            ("unknown", self.unknown),
        ] {
            if let Some(id) = id {
                gguf.u32(&format!("tokenizer.ggml.{mark}_token_id"), id);
            }
        }
        gguf.bool("tokenizer.ggml.add_bos_token", self.adds_bos);
    }
}

fn from_gguf(gguf: &Gguf) -> Result<Vocabulary, CheckpointError> {
    let refuse = |what: String| Err(CheckpointError::content(gguf.path(), what));
    let model = gguf.str("tokenizer.ggml.model")?;
    if model != "gpt2" {
        return refuse(format!("tokenizer model `{model}` is not supported (supported: gpt2)"));
    }
    let owned = |texts: Vec<&str>| texts.into_iter().map(str::to_owned).collect();
    let tokens: Vec<String> = owned(gguf.strings("tokenizer.ggml.tokens")?);
    let mut types = gguf.integers("tokenizer.ggml.token_type").unwrap_or_default();
    types.resize(tokens.len(), NORMAL.into());
    let id = |mark: &str| {
        let id = gguf.u64(&format!("tokenizer.ggml.{mark}_token_id")).ok()?;
        u32::try_from(id).ok()
    };
    let adds_bos = gguf.metadata("tokenizer.ggml.add_bos_token").and_then(crate::Metadata::as_bool);
    Ok(Vocabulary {
        pre: gguf.str("tokenizer.ggml.pre").unwrap_or("default").to_owned(),
        types: types.into_iter().map(|t| t as i32).collect(),
        merges: owned(gguf.strings("tokenizer.ggml.merges")?),
        bos: id("bos"),
        eos: id("eos"),
        padding: id("padding"),
        unknown: id("unknown"),
        adds_bos: adds_bos.unwrap_or(false),
        tokens,
    })
}

/// Reads a `tokenizer.json`; marks are in another file.
fn from_json(json: &Value) -> Result<Vocabulary, String> {
    let model = &json["model"];
    if model["type"] != "BPE" || model["byte_fallback"] == true {
        return Err(format!("a `{}` tokenizer, not byte-level BPE", model["type"]));
    }
    let ignore_merges = model["ignore_merges"] == true;
    let pre =
        name_of(&json["normalizer"], &json["pre_tokenizer"], ignore_merges).ok_or_else(|| {
            format!(
                "its pre-tokenizer is none of llama.cpp's that are known here ({})",
                PRE_TOKENIZERS.join(", ")
            )
        })?;
    let mut tokens = Table::default();
    for (text, id) in model["vocab"].as_object().into_iter().flatten() {
        tokens.set(id, text, NORMAL)?;
    }
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let text = token["content"].as_str().ok_or("an added token has no content")?;
        let kind = if token["special"] == true { CONTROL } else { USER_DEFINED };
        tokens.set(&token["id"], text, kind)?;
    }
    let merges = model["merges"].as_array().ok_or("it has no merges")?;
    let (tokens, types) = tokens.finish();
    Ok(Vocabulary {
        pre: pre.to_owned(),
        tokens,
        types,
        merges: merges.iter().map(merge).collect::<Option<_>>().ok_or("a merge is no pair")?,
        bos: None,
        eos: None,
        padding: None,
        unknown: None,
        adds_bos: false,
    })
}

/// A merge as `"left right"`, from that or from `["left", "right"]`.
fn merge(value: &Value) -> Option<String> {
    let text = match value.as_array().map(Vec::as_slice) {
        Some([left, right]) => format!("{} {}", left.as_str()?, right.as_str()?),
        Some(_) => return None,
        None => value.as_str()?.to_owned(),
    };
    (text.matches(' ').count() == 1).then_some(text)
}

/// Tokens by id.
#[derive(Default)]
struct Table(Vec<Option<(String, i32)>>);

impl Table {
    fn set(&mut self, id: &Value, text: &str, kind: i32) -> Result<(), String> {
        let id = id.as_u64().map(|id| id as usize).filter(|id| *id < MAX_TOKENS);
        let id = id.ok_or_else(|| format!("token `{text}` has no id below {MAX_TOKENS}"))?;
        if id >= self.0.len() {
            self.0.resize(id + 1, None);
        }
        match &self.0[id] {
            Some((other, _)) if other != text => {
                Err(format!("tokens `{other}` and `{text}` have the id {id}"))
            }
            _ => {
                self.0[id] = Some((text.to_owned(), kind));
                Ok(())
            }
        }
    }

    fn finish(self) -> (Vec<String>, Vec<i32>) {
        let or_unused = |(id, token): (usize, Option<(String, i32)>)| {
            token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED))
        };
        self.0.into_iter().enumerate().map(or_unused).unzip()
    }
}

/// llama.cpp's name of a pre-tokenizer. Llama 3 ignores merges for whole words in the vocabulary.
fn name_of(normalizer: &Value, found: &Value, ignore_merges: bool) -> Option<&'static str> {
    let found = without_offsets(found);
    PRE_TOKENIZERS.into_iter().find(|name| {
        pre_tokenizer(name).is_some_and(|(known_normalizer, known, ignores)| {
            known_normalizer == *normalizer
                && without_offsets(&known) == found
                && ignores == ignore_merges
        })
    })
}

/// Leaves out what moves offsets and no token.
fn without_offsets(pre_tokenizer: &Value) -> Value {
    match pre_tokenizer {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(key, _)| *key != "trim_offsets");
            Value::Object(kept.map(|(k, v)| (k.clone(), without_offsets(v))).collect())
        }
        Value::Array(parts) => parts.iter().map(without_offsets).collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn tokenizer(pre: &str) -> Value {
        let (normalizer, pre_tokenizer, ignore_merges) = pre_tokenizer(pre).unwrap();
        json!({
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "model": {"type": "BPE", "ignore_merges": ignore_merges,
                "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
            "added_tokens": [
                {"id": 4, "content": "<|im_end|>", "special": true},
                {"id": 5, "content": "<tool_call>", "special": false},
            ],
        })
    }

    #[test]
    fn tokens_get_their_types_and_gaps_are_unused() {
        let read = from_json(&tokenizer("qwen2")).unwrap();
        assert_eq!(read.pre, "qwen2");
        assert_eq!(read.tokens, ["a", "b", "ab", "[PAD3]", "<|im_end|>", "<tool_call>"]);
        assert_eq!(read.types, [NORMAL, NORMAL, NORMAL, UNUSED, CONTROL, USER_DEFINED]);
        assert_eq!(read.merges, ["a b"]);
    }

    #[test]
    fn every_known_pre_tokenizer_is_told_apart() {
        for name in PRE_TOKENIZERS {
            assert_eq!(from_json(&tokenizer(name)).unwrap().pre, name);
        }
        let mut other = tokenizer("qwen2");
        other["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("\\s+");
        assert!(from_json(&other).unwrap_err().contains("none of llama.cpp's"));
    }

    #[test]
    fn tokenizers_that_gguf_cannot_hold_here_are_refused() {
        let mut unigram = tokenizer("qwen2");
        unigram["model"]["type"] = json!("Unigram");
        assert!(from_json(&unigram).unwrap_err().contains("Unigram"));
        let mut twice = tokenizer("qwen2");
        twice["added_tokens"][0]["id"] = json!(1);
        assert!(from_json(&twice).unwrap_err().contains("have the id 1"));
        let mut huge = tokenizer("qwen2");
        huge["added_tokens"][0]["id"] = json!(u64::MAX);
        assert!(from_json(&huge).unwrap_err().contains("no id below"));
        let mut spaced = tokenizer("qwen2");
        spaced["model"]["merges"] = json!(["a b c"]);
        assert!(from_json(&spaced).unwrap_err().contains("no pair"));
    }
}
