//! The stage on the tiny models, whose weights are random: what they say has no meaning, but has to
//! be the same whatever the batch, and after a resume.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use data::{Expected, ExpectedCall, Prediction, Prompt, Tool};
use serde_json::{Map, Value, json};

use super::*;
use crate::trial::Trial;

fn tiny(family: &str, part: &str) -> PathBuf {
    fixtures::path(&format!("tiny-models/{family}/{part}"))
}

/// A tiny model with a tokenizer of bytes. Of the tokens that no text has, every fourth is the
/// beginning of a call, so that answers decide one way or the other.
fn with_tokenizer(family: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(tiny(family, "f32")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let printable = |b: &u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut texts: Vec<String> =
        (0..=255_u8).filter(printable).map(|b| char::from(b).to_string()).collect();
    let others = (256..).take(256 - texts.len()).map(|c| char::from_u32(c).unwrap().to_string());
    texts.extend(others.collect::<Vec<_>>());
    texts.push("<|im_end|>".to_owned());
    let rest =
        (257..512).map(|i| if i % 4 == 0 { format!("<tool_call>{i}") } else { format!("w{i}") });
    texts.extend(rest);
    let vocab: Map<String, Value> =
        texts.iter().enumerate().map(|(id, text)| (text.clone(), json!(id))).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
        "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": 256, "content": "<|im_end|>", "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": []},
    });
    let config = json!({"eos_token": "<|im_end|>"});
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

/// Prompts of different lengths, of which every other one wants a call.
fn write_prompts(folder: &Path) -> PathBuf {
    let tool = json!({"name": "times", "parameters": {"properties": {"a": {}}}});
    let tools = vec![Tool::new(tool.as_object().unwrap().clone())];
    let prompts: Vec<Prompt> = (0..14)
        .map(|i| {
            let arguments = json!({"a": [i]}).as_object().unwrap().clone();
            let call = ExpectedCall { name: "times".to_owned(), arguments };
            Prompt {
                id: format!("{i}#1"),
                index: i,
                turn: 1,
                text: format!("{} {i}*7 = {}?<|im_end|>", "né ".repeat(i as usize), 7 * i),
                end_mark: "<|im_end|>".to_owned(),
                user: format!("{i}*7"),
                tools: tools.clone(),
                expected: Some(Expected {
                    calls: if i % 2 == 0 { vec![call] } else { Vec::new() },
                    text: String::new(),
                }),
            }
        })
        .collect();
    let path = folder.join("prompts.jsonl");
    data::write_jsonl(&path, &prompts).unwrap();
    let manual = folder.join("manual.jsonl");
    let asked: Vec<Prompt> =
        prompts[..2].iter().map(|p| Prompt { expected: None, ..p.clone() }).collect();
    data::write_jsonl(&manual, &asked).unwrap();
    path
}

#[test]
fn fixture_a_row_is_answered_alike_alone_in_a_batch_and_after_a_resume() {
    for family in ["llama", "qwen2", "gemma2"] {
        let (model, adapter) = (with_tokenizer(family), tiny(family, "adapter"));
        let prompts = write_prompts(model.path());
        let manual = model.path().join("manual.jsonl");
        let inputs: [(&str, &Path); 4] = [
            ("model", model.path()),
            ("adapter", &adapter),
            ("prompts", &prompts),
            ("manual", &manual),
        ];
        let params = |batch: usize| json!({"max_new_tokens": 12, "batch_size": batch});
        let alone = Trial::new(params(1), &inputs, &[]);
        alone.run_stage().unwrap();
        let together = Trial::new(params(5), &inputs, &[]);
        together.run_stage().unwrap();
        assert_eq!(together.outputs(), alone.outputs(), "{family}");
        assert!(alone.outputs().values().all(Option::is_some), "{family}");

        let mut kept: Value = serde_json::from_slice(&alone.checkpoint()).unwrap();
        kept["answers"].as_array_mut().unwrap().truncate(6);
        let killed = Trial::new(params(5), &inputs, &[]);
        killed.save_checkpoint(&serde_json::to_vec(&kept).unwrap());
        let resumed = Trial::new(params(5), &inputs, &[&killed]);
        let outcome = resumed.run_stage().unwrap();
        assert_eq!(outcome.telemetry["resumed_rows"], 6, "{family}");
        assert_eq!(resumed.outputs(), alone.outputs(), "{family}");
    }
}

#[test]
fn fixture_an_adapter_is_compared_with_its_model_alone() {
    let (model, adapter) = (with_tokenizer("qwen2"), tiny("qwen2", "adapter"));
    let prompts = write_prompts(model.path());
    let params = json!({"max_new_tokens": 12});
    let alone: [(&str, &Path); 2] = [("model", model.path()), ("prompts", &prompts)];
    let base = Trial::new(params.clone(), &alone, &[]);
    base.run_stage().unwrap();
    let files = [base.path("metrics.json"), base.path("predictions.jsonl")];
    let mut wired = alone.to_vec();
    wired.extend([
        ("adapter", &*adapter),
        ("baseline_metrics", &*files[0]),
        ("baseline_predictions", &*files[1]),
    ]);
    let tuned = Trial::new(params, &wired, &[]);
    tuned.run_stage().unwrap();

    let (before, after) = (base.predictions(), tuned.predictions());
    assert_ne!(before, after, "the adapter changes nothing");
    let said = tuned.text("log");
    let mut discordant = 0;
    for (paired, is_right) in
        tuned.metrics().against_baseline.iter().zip::<[fn(&Prediction) -> bool; 3]>([
            |p| p.strict_correct,
            |p| p.lenient_correct,
            |p| p.decision_correct,
        ])
    {
        let pairs = || before.iter().zip(&after).map(|(a, b)| (is_right(a), is_right(b)));
        let wins = pairs().filter(|(a, b)| !a && *b).count();
        let losses = pairs().filter(|(a, b)| *a && !b).count();
        assert_eq!((paired.wins, paired.losses), (wins as u64, losses as u64), "{paired:?}");
        let by = (wins as f64 - losses as f64) / 14.0;
        assert!((paired.difference - by).abs() < 1e-12, "{paired:?}");
        assert!(said.contains(&format!("(won {wins}, lost {losses})")), "{said}");
        discordant += wins + losses;
    }
    assert!(discordant > 0, "both are right in the same rows, so that nothing was compared");

    let shorter = Trial::new(json!({"max_new_tokens": 11}), &wired, &[]);
    let fault = shorter.run_stage().unwrap_err();
    assert!(fault.message.contains("`max_new_tokens` is 11 here and 12 there"), "{fault}");
}

#[test]
fn params_are_checked_and_a_batch_counts_where_it_may_change_an_answer() {
    for path in ["max_new_tokens", "batch_size", "limit"] {
        let fault = Evaluate.resolve(&json!({ path: 0 })).unwrap_err();
        assert_eq!(
            (fault.path, fault.message.as_str()),
            (vec![path.to_owned()], "must be at least 1")
        );
    }
    let most = Evaluate.resolve(&json!({"batch_size": 65_537})).unwrap_err();
    assert_eq!(
        (most.path.join("."), &*most.message),
        ("batch_size".into(), "must be at most 65536")
    );
    let identity = |params: Value| Evaluate.resolve(&params).unwrap().identity;
    let on = |device: &str, batch: Value| identity(json!({"device": device, "batch_size": batch}));
    assert_eq!(on("cpu", json!(3)), on("cpu", Value::Null));
    assert_eq!(on("cuda", Value::Null), on("cuda:0", Value::Null));
    for device in ["auto", "cuda"] {
        assert_ne!(on(device, json!(3)), on(device, json!(4)), "{device}");
        assert!(on(device, Value::Null).get("batch_size").is_none(), "{device}");
    }
    assert_ne!(identity(json!({"max_new_tokens": 95})), identity(json!({})));
    assert_ne!(identity(json!({"limit": 7})), identity(json!({})));
}
