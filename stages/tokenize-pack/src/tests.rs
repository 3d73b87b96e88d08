//! The whole stage, with a tokenizer that has a token for each of the letters `a` to `z`.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use super::*;

/// Ids of the marks.
const BEGIN: i32 = 26;
const END: i32 = 27;

fn write_model(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 8, "vocab_size": 28,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "tie_word_embeddings": true, "hidden_act": "silu",
    });
    let vocabulary: serde_json::Map<String, Value> =
        ('a'..='z').enumerate().map(|(id, letter)| (letter.to_string(), json!(id))).collect();
    let mark = |id: i32, text: &str| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
        "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [mark(BEGIN, "<s>"), mark(END, "</s>")],
        "normalizer": null, "pre_tokenizer": bytes, "decoder": bytes,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BEGIN], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocabulary, "merges": []},
    });
    let about = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true});
    for (name, value) in
        [("config.json", config), ("tokenizer.json", tokenizer), ("tokenizer_config.json", about)]
    {
        std::fs::write(folder.join(name), value.to_string()).unwrap();
    }
}

/// Runs the stage on texts; what is between brackets is the model's to say.
fn run(params: Value, texts: &[&str]) -> Result<(TokenFile, Value), StageError> {
    let dir = tempfile::tempdir().unwrap();
    write_model(&dir.path().join("model"));
    let rows: Vec<RenderedRow> = texts.iter().enumerate().map(|(i, text)| row(i, text)).collect();
    data::write_jsonl(&dir.path().join("train"), &rows).unwrap();
    let paths = ["model", "train"].map(|name| dir.path().join(name));
    let inputs = [("model", &*paths[0]), ("train", &*paths[1])];
    let request = fixtures::request(&TokenizePack, &params, &inputs, dir.path());
    TokenizePack.run(&request, &mut Reporter::silent())?;
    let stats = std::fs::read(&request.outputs["stats"]).unwrap();
    let file = TokenFile::read(&request.outputs["train"]).unwrap();
    Ok((file, serde_json::from_slice(&stats).unwrap()))
}

fn row(index: usize, marked: &str) -> RenderedRow {
    let mut text = String::new();
    let mut response_spans = Vec::new();
    let mut start = 0;
    for part in marked.split_inclusive(['[', ']']) {
        text.push_str(part.trim_end_matches(['[', ']']));
        match part.chars().last() {
            Some('[') => start = text.len(),
            Some(']') => response_spans.push([start, text.len()]),
            _ => {}
        }
    }
    RenderedRow { id: format!("r{index}"), text, response_spans }
}

fn ids(text: &str) -> Vec<i32> {
    text.bytes()
        .map(|b| match b {
            b'^' => BEGIN,
            b'$' => END,
            letter => i32::from(letter - b'a'),
        })
        .collect()
}

#[test]
fn marks_are_added_as_unsloth_or_as_trl_adds_them() {
    for (rule, expected) in [("unsloth", "^abc^de</s>"), ("trl", "^abc$^^de$")] {
        let expected = expected.replace("</s>", "$");
        let params = json!({"pack": "none", "special_tokens": rule, "max_length": 16});
        let (file, _) = run(params, &["abc", "<s>de</s>"]).unwrap();
        assert_eq!(file.tokens, ids(&expected), "{rule}");
    }
}

#[test]
fn the_loss_is_on_everything_or_on_what_the_model_is_to_say() {
    for (loss_on, expected) in
        [("all", [0, 1, 1, 1, 1, 1, 1, 1]), ("response", [0, 0, 0, 1, 1, 0, 1, 1])]
    {
        let params = json!({"pack": "none", "loss_on": loss_on, "max_length": 16});
        let (file, stats) = run(params, &["ab[cd]e[f</s>]"]).unwrap();
        assert_eq!(file.tokens, ids("^abcdef$"));
        assert_eq!(file.label_mask, expected, "{loss_on}");
        assert_eq!(stats["train"]["targets"], expected.iter().sum::<u8>(), "{loss_on}");
    }
    let fault = run(json!({"loss_on": "response", "max_length": 16}), &["abc"]).unwrap_err();
    assert!(fault.message.contains("no token to learn from"), "{}", fault.message);
}

#[test]
fn long_rows_are_cut_dropped_or_named_and_wrapped_goes_on_in_the_next_row() {
    let texts = ["abcdefghij", "kl"];
    let params = |truncate: &str| json!({"max_length": 5, "truncate": truncate});
    let (file, stats) = run(params("cut"), &texts).unwrap();
    assert_eq!(file.tokens, ids("^abcd^kl"));
    assert_eq!(stats["train"]["truncated"], json!({"count": 1, "ids": ["r0"]}));
    let (file, stats) = run(params("drop"), &texts).unwrap();
    assert_eq!(file.tokens, ids("^kl"));
    assert_eq!(stats["train"]["dropped"], json!({"count": 1, "ids": ["r0"]}));
    let fault = run(params("error"), &texts).unwrap_err();
    assert_eq!(fault.message, "row `r0` has 11 tokens, more than `max_length` (5)");
    for truncate in ["cut", "drop", "error"] {
        let mut params = params(truncate);
        params["pack"] = json!("wrapped");
        let (file, stats) = run(params, &texts).unwrap();
        assert_eq!(file.tokens, ids("^abcdefghij^kl"));
        assert_eq!(file.row_offsets, [0, 5, 10, 14]);
        // Rows have one segment each, however many examples: as TRL's.
        assert_eq!(file.cu_seqlens, [0, 5, 10, 14]);
        assert_eq!(stats["train"]["truncated"]["count"], 0);
    }
}
