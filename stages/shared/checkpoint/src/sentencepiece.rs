//! SentencePiece's BPE with byte fallback, Gemma's and Llama 2's kind of tokenizer: between
//! `tokenizer.json`, which has merges, and GGUF, which has a score for each token.
//!
//! Two neighbours are merged where their text is a token, those of the highest score first. So a
//! token's score is the place of its merges, and the merges are the ways to cut a token in two.

use std::cmp::Reverse;
use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::vocabulary::{CONTROL, NORMAL, Table, UNUSED, USER_DEFINED};
use crate::{CheckpointError, Gguf, Metadata};

/// ggml's token types that byte-level BPE has not.
const UNKNOWN: i32 = 2;
const BYTE: i32 = 6;
/// llama.cpp's score of tokens that are matched before anything is merged.
const MATCHED_FIRST: f32 = -1000.0;
/// What stands for a space.
const BLANK: &str = "▁";

/// Tokens, types and scores by id, and whether a text gets a space in front.
pub(crate) struct Pieces {
    pub(crate) tokens: Vec<String>,
    pub(crate) types: Vec<i32>,
    pub(crate) scores: Vec<f32>,
    pub(crate) adds_space: bool,
}

/// Whether a `tokenizer.json` is of this kind.
pub(crate) fn is_of_this_kind(json: &Value) -> bool {
    json["model"]["type"] == "BPE" && json["model"]["byte_fallback"] == true
}

/// Reads a `tokenizer.json`.
///
/// # Errors
/// Says what GGUF has no place for.
pub(crate) fn from_json(json: &Value) -> Result<Pieces, String> {
    let adds_space =
        adds_space(&json["normalizer"]).ok_or("its normaliser is not SentencePiece's")?;
    let split = json!({"type": "Split", "pattern": {"String": " "},
        "behavior": "MergedWithPrevious", "invert": false});
    if !json["pre_tokenizer"].is_null() && json["pre_tokenizer"] != split {
        return Err("its pre-tokenizer is not SentencePiece's".to_owned());
    }
    let model = &json["model"];
    let unknown = model["unk_token"].as_str();
    let mut table = Table::default();
    for (text, id) in model["vocab"].as_object().into_iter().flatten() {
        let kind = match text.as_str() {
            text if Some(text) == unknown => UNKNOWN,
            text if is_byte(text) => BYTE,
            _ => NORMAL,
        };
        table.set(id, text, kind)?;
    }
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let text = token["content"].as_str().ok_or("an added token has no content")?;
        let kind = match token["special"] == true {
            true if Some(text) == unknown => UNKNOWN,
            true => CONTROL,
            false => USER_DEFINED,
        };
        table.set(&token["id"], text, kind)?;
    }
    let (mut tokens, types) = table.finish();
    let merges = model["merges"].as_array().ok_or("it has no merges")?;
    let places = places(merges).ok_or("a merge is no pair")?;
    let letters = places.len() as f32;
    let score = |text: &str, kind: i32| match (kind, places.get(text)) {
        (NORMAL, Some(place)) => -(*place as f32),
        (NORMAL, None) => -letters,
        (USER_DEFINED, _) => MATCHED_FIRST,
        _ => 0.0,
    };
    let scores = tokens.iter().zip(&types).map(|(text, kind)| score(text, *kind)).collect();
    for (text, kind) in tokens.iter_mut().zip(&types) {
        // They are looked for before spaces are replaced.
        if *kind == USER_DEFINED {
            *text = text.replace(BLANK, " ");
        }
    }
    Ok(Pieces { tokens, types, scores, adds_space })
}

/// Reads GGUF metadata of the tokenizer model `llama`.
///
/// # Errors
/// [`CheckpointError`] naming what is missing.
pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Pieces, CheckpointError> {
    let tokens: Vec<String> =
        gguf.strings("tokenizer.ggml.tokens")?.into_iter().map(str::to_owned).collect();
    let mut types: Vec<i32> = gguf
        .integers("tokenizer.ggml.token_type")
        .unwrap_or_default()
        .into_iter()
        .map(|kind| kind as i32)
        .collect();
    types.resize(tokens.len(), NORMAL);
    let scores: Option<Vec<f32>> = match gguf.metadata("tokenizer.ggml.scores") {
        Some(Metadata::Array(values)) if values.len() == tokens.len() => values
            .iter()
            .map(|value| match value {
                Metadata::F32(score) => Some(*score),
                _ => None,
            })
            .collect(),
        _ => None,
    };
    let scores = scores.ok_or_else(|| {
        CheckpointError::content(gguf.path(), "`tokenizer.ggml.scores` has no score for each token")
    })?;
    let adds_space = gguf.metadata("tokenizer.ggml.add_space_prefix").and_then(Metadata::as_bool);
    Ok(Pieces { tokens, types, scores, adds_space: adds_space.unwrap_or(true) })
}

impl Pieces {
    /// A `tokenizer.json` of these pieces.
    pub(crate) fn to_json(&self) -> Value {
        let unknown =
            self.types.iter().position(|kind| *kind == UNKNOWN).map(|id| &self.tokens[id]);
        let known = self.tokens.iter().zip(&self.types).enumerate();
        let known = known.filter(|(_, (_, kind))| **kind != UNUSED);
        let vocab: Map<String, Value> =
            known.map(|(id, (text, _))| (text.clone(), json!(id))).collect();
        let added: Vec<Value> = self
            .tokens
            .iter()
            .zip(&self.types)
            .enumerate()
            .filter(|(_, (_, kind))| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED))
            .map(|(id, (text, kind))| {
                json!({"id": id, "content": text, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": *kind != USER_DEFINED})
            })
            .collect();
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": BLANK});
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": BLANK}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        let normalizer = if self.adds_space {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
            let prepend = json!({"type": "Prepend", "prepend": BLANK});
            json!({"type": "Sequence", "normalizers": [prepend, replace]})
        } else {
            replace
        };
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": normalizer, "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "dropout": null, "unk_token": unknown,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
                "merges": self.merges()},
        })
    }

    /// Every way to cut a token into two, in the order in which transformers lists them: by score,
    /// then the longer left part first.
    fn merges(&self) -> Vec<[&str; 2]> {
        let is_text = |id: usize| self.types[id] == NORMAL;
        let ids: HashMap<&str, usize> = self
            .tokens
            .iter()
            .enumerate()
            .filter(|(id, _)| is_text(*id))
            .map(|(id, text)| (text.as_str(), id))
            .collect();
        let mut merges: Vec<(usize, usize, [&str; 2])> = Vec::new();
        for (id, text) in self.tokens.iter().enumerate().filter(|(id, _)| is_text(*id)) {
            let cuts = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
            let cuts =
                cuts.filter(|(left, right)| ids.contains_key(left) && ids.contains_key(right));
            merges.extend(cuts.map(|(left, right)| (id, left.chars().count(), [left, right])));
        }
        merges.sort_by(|(a, a_left, _), (b, b_left, _)| {
            let by_score = self.scores[*b].total_cmp(&self.scores[*a]);
            by_score.then(Reverse(a_left).cmp(&Reverse(b_left))).then(a.cmp(b))
        });
        merges.into_iter().map(|(_, _, pair)| pair).collect()
    }
}

/// Place of each merged text among the merges, all ways to make it being one place.
fn places(merges: &[Value]) -> Option<HashMap<String, usize>> {
    let mut places: HashMap<String, usize> = HashMap::new();
    for merge in merges {
        let text = match merge.as_array().map(Vec::as_slice) {
            Some([left, right]) => format!("{}{}", left.as_str()?, right.as_str()?),
            Some(_) => return None,
            None => {
                let (left, right) = merge.as_str()?.split_once(' ')?;
                format!("{left}{right}")
            }
        };
        let next = places.len();
        places.entry(text).or_insert(next);
    }
    Some(places)
}

/// Whether a normaliser puts a space in front of a text; `None` where it is another's.
fn adds_space(normalizer: &Value) -> Option<bool> {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": BLANK});
    let prepend = json!({"type": "Prepend", "prepend": BLANK});
    if *normalizer == replace {
        return Some(false);
    }
    (*normalizer == json!({"type": "Sequence", "normalizers": [prepend, replace]})).then_some(true)
}

/// Whether a token stands for a byte, such as `<0x0A>`.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && u8::from_str_radix(d, 16).is_ok())
}
