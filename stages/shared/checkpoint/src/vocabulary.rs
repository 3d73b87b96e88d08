//! A vocabulary in GGUF's terms, from either kind of model folder: byte-level BPE, or SentencePiece's.

use serde_json::Value;

use crate::sentencepiece::{self, Pieces};
use crate::tokenizer::{pre_tokenizer, read_json, token_text};
use crate::{CheckpointError, Gguf, GgufWriter, ModelFolder};

/// llama.cpp's names of the pre-tokenizers that are known here.
const PRE_TOKENIZERS: [&str; 4] = ["gpt-2", "smollm", "qwen2", "llama-bpe"];
/// llama.cpp's score of a token that nothing becomes.
const UNUSED_SCORE: f32 = -10_000.0;
/// Most tokens of a vocabulary: four times the largest in use.
const MAX_TOKENS: usize = 1 << 20;

/// ggml's token types.
pub(crate) const NORMAL: i32 = 1;
pub(crate) const CONTROL: i32 = 3;
pub(crate) const USER_DEFINED: i32 = 4;
pub(crate) const UNUSED: i32 = 5;

/// How text becomes tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum VocabularyKind {
    /// Byte-level BPE: ggml's model `gpt2`.
    Bytes {
        /// llama.cpp's name of the pre-tokenizer, such as `qwen2`.
        pre: String,
        /// Pairs `left right` in order of preference.
        merges: Vec<String>,
    },
    /// SentencePiece's BPE with byte fallback: ggml's model `llama`.
    Pieces {
        /// Of each token; the highest is merged first.
        scores: Vec<f32>,
        /// Texts get a space in front.
        adds_space: bool,
    },
}

/// Tokens, their kind and the marks of a tokenizer.
#[derive(Clone, Debug, PartialEq)]
pub struct Vocabulary {
    /// How text becomes tokens.
    pub kind: VocabularyKind,
    /// Text of each token by id; ids that no token has are `[PADn]`.
    pub tokens: Vec<String>,
    /// ggml's type of each token.
    pub types: Vec<i32>,
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
    /// [`CheckpointError`] where the tokenizer is missing, is neither SentencePiece's BPE nor
    /// byte-level BPE with one of llama.cpp's pre-tokenizers, or has tokens beyond the embedding.
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
        if let VocabularyKind::Pieces { scores, .. } = &mut vocabulary.kind {
            scores.resize(rows, UNUSED_SCORE);
        }
        Ok(vocabulary)
    }
}

impl Vocabulary {
    /// Adds the metadata `tokenizer.ggml.*`.
    pub fn write(&self, gguf: &mut GgufWriter) {
        let (model, pre) = match &self.kind {
            VocabularyKind::Bytes { pre, .. } => ("gpt2", pre.as_str()),
            VocabularyKind::Pieces { .. } => ("llama", "default"),
        };
        gguf.str("tokenizer.ggml.model", model);
        gguf.str("tokenizer.ggml.pre", pre);
        gguf.strings("tokenizer.ggml.tokens", &self.tokens);
        gguf.i32s("tokenizer.ggml.token_type", &self.types);
        match &self.kind {
            VocabularyKind::Bytes { merges, .. } => gguf.strings("tokenizer.ggml.merges", merges),
            VocabularyKind::Pieces { scores, adds_space } => {
                gguf.f32s("tokenizer.ggml.scores", scores);
                gguf.bool("tokenizer.ggml.add_space_prefix", *adds_space);
            }
        }
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
    let id = |mark: &str| {
        let id = gguf.u64(&format!("tokenizer.ggml.{mark}_token_id")).ok()?;
        u32::try_from(id).ok()
    };
    let adds_bos = gguf.metadata("tokenizer.ggml.add_bos_token").and_then(crate::Metadata::as_bool);
    let parts = match gguf.str("tokenizer.ggml.model")? {
        "gpt2" => bytes_of_gguf(gguf)?,
        "llama" => Vocabulary::of_pieces(sentencepiece::from_gguf(gguf)?),
        model => {
            return refuse(format!(
                "tokenizer model `{model}` is not supported (supported: gpt2, llama)"
            ));
        }
    };
    Ok(Vocabulary {
        bos: id("bos"),
        eos: id("eos"),
        padding: id("padding"),
        unknown: id("unknown"),
        adds_bos: adds_bos.unwrap_or(matches!(parts.kind, VocabularyKind::Pieces { .. })),
        ..parts
    })
}

/// Byte-level BPE without its marks.
fn bytes_of_gguf(gguf: &Gguf) -> Result<Vocabulary, CheckpointError> {
    let owned = |texts: Vec<&str>| texts.into_iter().map(str::to_owned).collect();
    let tokens: Vec<String> = owned(gguf.strings("tokenizer.ggml.tokens")?);
    let mut types = gguf.integers("tokenizer.ggml.token_type").unwrap_or_default();
    types.resize(tokens.len(), NORMAL.into());
    let kind = VocabularyKind::Bytes {
        pre: gguf.str("tokenizer.ggml.pre").unwrap_or("default").to_owned(),
        merges: owned(gguf.strings("tokenizer.ggml.merges")?),
    };
    Ok(Vocabulary::unmarked(kind, tokens, types.into_iter().map(|t| t as i32).collect()))
}

impl Vocabulary {
    fn unmarked(kind: VocabularyKind, tokens: Vec<String>, types: Vec<i32>) -> Self {
        let (bos, eos, padding, unknown) = (None, None, None, None);
        Self { kind, tokens, types, bos, eos, padding, unknown, adds_bos: false }
    }

    fn of_pieces(pieces: Pieces) -> Self {
        let Pieces { tokens, types, scores, adds_space } = pieces;
        Self::unmarked(VocabularyKind::Pieces { scores, adds_space }, tokens, types)
    }
}

/// Reads a `tokenizer.json`; marks are in another file.
fn from_json(json: &Value) -> Result<Vocabulary, String> {
    let model = &json["model"];
    if sentencepiece::is_of_this_kind(json) {
        return sentencepiece::from_json(json).map(Vocabulary::of_pieces);
    }
    if model["type"] != "BPE" {
        return Err(format!("a `{}` tokenizer, not BPE", model["type"]));
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
    let merges: Option<Vec<String>> = merges.iter().map(merge).collect();
    let merges = merges.ok_or("a merge is no pair")?;
    Ok(Vocabulary::unmarked(VocabularyKind::Bytes { pre: pre.to_owned(), merges }, tokens, types))
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
pub(crate) struct Table(Vec<Option<(String, i32)>>);

impl Table {
    /// Gives an id its token; the last kind counts.
    pub(crate) fn set(&mut self, id: &Value, text: &str, kind: i32) -> Result<(), String> {
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

    /// Texts and kinds by id; gaps are unused.
    pub(crate) fn finish(self) -> (Vec<String>, Vec<i32>) {
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
        let VocabularyKind::Bytes { pre, merges } = read.kind else { panic!("no bytes") };
        assert_eq!(pre, "qwen2");
        assert_eq!(read.tokens, ["a", "b", "ab", "[PAD3]", "<|im_end|>", "<tool_call>"]);
        assert_eq!(read.types, [NORMAL, NORMAL, NORMAL, UNUSED, CONTROL, USER_DEFINED]);
        assert_eq!(merges, ["a b"]);
    }

    #[test]
    fn every_known_pre_tokenizer_is_told_apart() {
        for name in PRE_TOKENIZERS {
            let kind = from_json(&tokenizer(name)).unwrap().kind;
            let VocabularyKind::Bytes { pre, .. } = kind else { panic!("no bytes") };
            assert_eq!(pre, name);
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
