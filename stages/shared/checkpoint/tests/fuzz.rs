//! Every reader of a model folder on damaged files: values or an error that names the file, never a
//! panic, never an allocation out of proportion. Seeded; `PIPE_FUZZ=100` runs a hundred times as
//! long, `PIPE_FUZZ_FROM=N` starts at round N.
#![allow(clippy::unwrap_used, reason = "tests")]

mod mutate;

use std::path::{Path, PathBuf};

use checkpoint::{
    CheckpointError, GgmlType, GgufWriter, ModelConfig, ModelFolder, StoredMatrix, Weights,
};
use mutate::{Counting, Random, check, rounds};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const HIDDEN: usize = 256;
const FFN: usize = 512;
const KV: usize = 128;
const TOKENS: usize = 260;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/fixtures")
}

fn text<T>(result: Result<T, CheckpointError>) -> Result<T, String> {
    result.map_err(|e| e.to_string())
}

/// Reads everything that a stage would read of a folder, and decodes a row of every matrix.
fn read_all(path: &Path) -> Result<(), String> {
    let folder = text(ModelFolder::open(path))?;
    let config = text(ModelConfig::read(&folder))?;
    let weights = text(Weights::open(&folder, &config))?;
    let (q, kv) = (
        config.num_attention_heads.saturating_mul(config.head_dim),
        config.num_key_value_heads.saturating_mul(config.head_dim),
    );
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let matrix = |name: &str, shape: [usize; 2], linear: bool| -> Result<(), String> {
        match text(weights.load_stored(name, shape, linear))? {
            Some(stored) => decode_row(&stored),
            None if linear => drop(text(weights.load_linear(name, shape))?.into_f32()),
            None => drop(text(weights.load(name, &shape))?),
        }
        Ok(())
    };
    for layer in 0..config.num_hidden_layers {
        for (module, shape) in [
            ("self_attn.q_proj", [q, hidden]),
            ("self_attn.k_proj", [kv, hidden]),
            ("self_attn.v_proj", [kv, hidden]),
            ("self_attn.o_proj", [hidden, q]),
            ("mlp.gate_proj", [ffn, hidden]),
            ("mlp.up_proj", [ffn, hidden]),
            ("mlp.down_proj", [hidden, ffn]),
        ] {
            matrix(&format!("model.layers.{layer}.{module}.weight"), shape, true)?;
        }
        let norm = format!("model.layers.{layer}.input_layernorm.weight");
        text(weights.load(&norm, &[hidden]))?;
    }
    matrix("model.embed_tokens.weight", [config.vocab_size, hidden], false)?;
    read_text(&folder, config.vocab_size)
}

fn decode_row(stored: &StoredMatrix) {
    let [rows, columns] = stored.shape();
    if rows > 0 {
        stored.decode_rows(rows - 1..rows, &mut vec![0.0; columns]);
    }
}

/// Tokenizer, vocabulary and chat template, with and without the one another.
fn read_text(folder: &ModelFolder, rows: usize) -> Result<(), String> {
    let tokenizer = text(folder.tokenizer()).map(|tokenizer| {
        // What a damaged tokenizer cannot encode has no file to name.
        if let Ok(encoded) = tokenizer.encode("Hello <|im_end|> wörld 12\n") {
            let _ = tokenizer.decode(&encoded.ids);
        }
        let _ = tokenizer.to_json();
    });
    let vocabulary = text(folder.vocabulary(rows)).map(drop);
    let template = text(folder.chat_template()).map(drop);
    tokenizer.and(vocabulary).and(template)
}

/// A tokenizer of bytes, two merges and a mark, as GGUF and tokenizer.json have it.
fn tokens() -> (Vec<String>, Vec<i32>, Vec<String>) {
    let mut tokens: Vec<String> = (33..127_u8).map(|b| char::from(b).to_string()).collect();
    tokens.extend(["Ġ", "Ċ", "he", "ll", "hell", "<|im_end|>"].map(str::to_owned));
    tokens.resize_with(TOKENS, String::new);
    for (id, token) in tokens.iter_mut().enumerate().filter(|(_, t)| t.is_empty()) {
        *token = format!("[PAD{id}]");
    }
    let kind = |t: &String| if t.starts_with("<|") { 3 } else { 1 };
    let types = tokens.iter().map(kind).collect();
    (tokens, types, ["h e", "l l", "he ll"].map(str::to_owned).to_vec())
}

/// A Llama of one layer, every matrix in another type; its length up to the data.
fn gguf() -> (Vec<u8>, usize) {
    let mut writer = GgufWriter::new();
    writer.str("general.architecture", "llama");
    for (key, value) in [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", HIDDEN as u32),
        ("feed_forward_length", FFN as u32),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("rope.dimension_count", 64),
    ] {
        writer.u32(&format!("llama.{key}"), value);
    }
    writer.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    let (tokens, types, merges) = tokens();
    writer.str("tokenizer.ggml.model", "gpt2");
    writer.str("tokenizer.ggml.pre", "smollm");
    writer.strings("tokenizer.ggml.merges", &merges);
    writer.str("tokenizer.chat_template", "{{ messages }}");
    writer.u32("tokenizer.ggml.bos_token_id", 1);
    writer.u32("tokenizer.ggml.eos_token_id", 99);
    writer.bool("tokenizer.ggml.add_bos_token", true);
    writer.i32s("tokenizer.ggml.token_type", &types);
    writer.strings("tokenizer.ggml.tokens", &tokens);
    let mut sizes = Vec::new();
    let mut add = |name: &str, dtype: GgmlType, shape: &[usize]| {
        writer.tensor(name, dtype, shape).unwrap();
        let shape: Vec<u64> = shape.iter().map(|d| *d as u64).collect();
        sizes.push(dtype.tensor_bytes(&shape).unwrap() as usize);
    };
    add("token_embd.weight", GgmlType::Q6_K, &[TOKENS, HIDDEN]);
    for (name, dtype, shape) in [
        ("attn_q", GgmlType::Q4_0, [HIDDEN, HIDDEN]),
        ("attn_k", GgmlType::Q5_1, [KV, HIDDEN]),
        ("attn_v", GgmlType::F16, [KV, HIDDEN]),
        ("attn_output", GgmlType::Q8_0, [HIDDEN, HIDDEN]),
        ("ffn_gate", GgmlType::Q2_K, [FFN, HIDDEN]),
        ("ffn_up", GgmlType::Q3_K, [FFN, HIDDEN]),
        ("ffn_down", GgmlType::Q5_K, [HIDDEN, FFN]),
    ] {
        add(&format!("blk.0.{name}.weight"), dtype, &shape);
    }
    for name in ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"] {
        add(name, GgmlType::F32, &[HIDDEN]);
    }
    let mut out = Vec::new();
    writer.write(&mut out, |i| Ok::<_, std::io::Error>(vec![0x3c; sizes[i]])).unwrap();
    let data: usize = sizes.iter().map(|size| size.next_multiple_of(32)).sum();
    let head = out.len() - data;
    (out, head)
}

#[test]
fn damaged_gguf() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let (whole, head) = gguf();
    std::fs::write(&path, &whole).unwrap();
    read_all(dir.path()).unwrap();
    for round in rounds(500) {
        let mut damaged = whole.clone();
        mutate::bytes(&mut Random::new(round), &mut damaged, head);
        std::fs::write(&path, &damaged).unwrap();
        check(&format!("gguf, round {round}"), damaged.len(), &["model.gguf"], || {
            let folder = text(ModelFolder::open(dir.path()))?;
            // Each on its own: the first that fails must not hide the others.
            let own = read_text(&folder, TOKENS);
            read_all(dir.path()).and(own)
        });
    }
    // Cut at every length of the head, and within the data.
    let cuts = (0..head).step_by(3).chain((head..whole.len()).step_by(9973));
    for len in cuts {
        std::fs::write(&path, &whole[..len]).unwrap();
        let error = read_all(dir.path()).unwrap_err();
        assert!(error.contains("model.gguf") && error.contains("byte"), "cut at {len}: {error}");
    }
}

/// A folder of the tiny model of a family, with the safetensors and JSON of the fixtures.
fn hub(family: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let source = fixtures().join(format!("tiny-models/{family}/f32"));
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), dir.path().join(name)).unwrap();
    }
    dir
}

/// The same configuration as transformers 4 would write it, for a four-bit checkpoint.
fn of_transformers_4(config: &Value) -> Value {
    let mut old = config.clone();
    let map = old.as_object_mut().unwrap();
    let rope = map.remove("rope_parameters").unwrap();
    map.insert("rope_theta".to_owned(), rope["rope_theta"].clone());
    map.insert("rope_scaling".to_owned(), Value::Null);
    map.insert(
        "quantization_config".to_owned(),
        json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "_load_in_4bit": true,
            "load_in_8bit": false, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": true, "llm_int8_skip_modules": ["lm_head", "layers"]}),
    );
    old
}

#[test]
fn damaged_config_json() {
    for family in ["llama", "qwen2", "gemma2"] {
        let dir = hub(family);
        let path = dir.path().join("config.json");
        let new: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for config in [of_transformers_4(&new), new] {
            let whole = config.to_string().into_bytes();
            for round in rounds(150) {
                let damaged = mutate::json(&mut Random::new(round), &whole);
                std::fs::write(&path, &damaged).unwrap();
                let size = std::fs::metadata(dir.path().join("model.safetensors")).unwrap().len();
                let files = ["config.json", "model.safetensors", &dir.path().display().to_string()];
                check(&format!("{family}, round {round}"), size as usize, &files, || {
                    match read_all(dir.path()) {
                        // There is no tokenizer: getting so far is getting through.
                        Err(error) if error.contains("tokenizer.json") => Ok(()),
                        other => other,
                    }
                });
            }
        }
    }
}

#[test]
fn damaged_four_bit_layers() {
    let golden = std::fs::read(fixtures().join("checkpoint/nf4/model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&golden).unwrap();
    let cases: Vec<(String, [usize; 2])> = file
        .tensors()
        .into_iter()
        .filter_map(|(name, view)| {
            let case = name.strip_suffix(".input").filter(|case| *case != "blockwise")?;
            Some((format!("{case}.weight"), view.shape().to_vec().try_into().ok()?))
        })
        .collect();
    assert_eq!(cases.len(), 15);
    let head = 8 + u64::from_le_bytes(*golden.first_chunk().unwrap()) as usize;
    let dir = hub("llama");
    let config = std::fs::read(dir.path().join("config.json")).unwrap();
    let config = of_transformers_4(&serde_json::from_slice(&config).unwrap()).to_string();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let path = dir.path().join("model.safetensors");
    let read = |random: &mut Random| -> Result<(), String> {
        let folder = text(ModelFolder::open(dir.path()))?;
        let config = text(ModelConfig::read(&folder))?;
        let weights = text(Weights::open(&folder, &config))?;
        let (name, shape) = &cases[random.below(cases.len())];
        drop(text(weights.load(name, shape))?);
        text(weights.load_stored(name, *shape, true))?.iter().for_each(decode_row);
        text(weights.load_linear(name, *shape)).map(drop)
    };
    for round in rounds(800) {
        let mut random = Random::new(round);
        let mut damaged = golden.clone();
        mutate::bytes(&mut random, &mut damaged, if round % 4 == 0 { golden.len() } else { head });
        std::fs::write(&path, &damaged).unwrap();
        let files = ["model.safetensors", "tensor `"];
        check(&format!("nf4, round {round}"), damaged.len(), &files, || read(&mut random));
    }
    // Cut at the bounds of every tensor and beside them.
    let starts = file
        .tensors()
        .into_iter()
        .map(|(_, view)| view.data().as_ptr() as usize - golden.as_ptr() as usize);
    for len in starts.flat_map(|at| [at - 1, at, at + 1]).chain(0..64) {
        std::fs::write(&path, &golden[..len.min(golden.len() - 1)]).unwrap();
        let error = read(&mut Random::new(1)).unwrap_err();
        assert!(error.contains("not a valid safetensors file"), "cut at {len}: {error}");
    }
}

#[test]
fn damaged_quant_state() {
    let golden = std::fs::read(fixtures().join("checkpoint/nf4/model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&golden).unwrap();
    let dir = hub("llama");
    let config = std::fs::read(dir.path().join("config.json")).unwrap();
    let config = of_transformers_4(&serde_json::from_slice(&config).unwrap()).to_string();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    for (case, shape) in [("double", [24, 96]), ("odd", [7, 33])] {
        let name = format!("{case}.weight");
        let key = format!("{name}.quant_state.bitsandbytes__nf4");
        let own = || file.tensors().into_iter().filter(|(n, _)| n.starts_with(&name));
        let whole = file.tensor(&key).unwrap().data().to_vec();
        for round in rounds(600) {
            let state = mutate::json(&mut Random::new(round), &whole);
            let views = own().map(|(n, view)| {
                let state = || TensorView::new(Dtype::U8, vec![state.len()], &state).unwrap();
                let view = if n == key { state() } else { view };
                (n, view)
            });
            let damaged = safetensors::serialize(views, None).unwrap();
            std::fs::write(dir.path().join("model.safetensors"), &damaged).unwrap();
            let size = damaged.len();
            check(&format!("{case}, round {round}"), size, &["model.safetensors"], || {
                let folder = text(ModelFolder::open(dir.path()))?;
                let config = text(ModelConfig::read(&folder))?;
                let weights = text(Weights::open(&folder, &config))?;
                text(weights.load_linear(&name, shape)).map(|weight| drop(weight.into_f32()))
            });
        }
    }
}

#[test]
fn damaged_index_of_shards() {
    let dir = hub("llama");
    let whole = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&whole).unwrap();
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let first = |name: &str| name.contains("layers.0");
    let mut map = serde_json::Map::new();
    for (shard, wanted) in names.into_iter().zip([true, false]) {
        let own = || file.tensors().into_iter().filter(|(name, _)| first(name) == wanted);
        map.extend(own().map(|(name, _)| (name, json!(shard))));
        let bytes = safetensors::serialize(own(), None).unwrap();
        std::fs::write(dir.path().join(shard), bytes).unwrap();
    }
    let index = dir.path().join("model.safetensors.index.json");
    let text = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string().into_bytes();
    std::fs::write(&index, &text).unwrap();
    let error = read_all(dir.path()).unwrap_err();
    assert!(error.contains("tokenizer.json"), "{error}");
    for round in rounds(600) {
        let damaged = mutate::json(&mut Random::new(round), &text);
        std::fs::write(&index, &damaged).unwrap();
        let files = ["index.json", "safetensors", "tokenizer.json", "tensor `"];
        check(&format!("index, round {round}"), whole.len(), &files, || read_all(dir.path()));
    }
}

/// A tokenizer.json as transformers writes it.
fn tokenizer_json() -> Value {
    let (tokens, types, merges) = tokens();
    let vocabulary: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let marks = tokens.iter().zip(&types).enumerate().filter(|(_, (_, kind))| **kind == 3);
    let added: Vec<Value> = marks
        .map(|(id, (token, _))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+|\\s+"},
                "behavior": "Isolated", "invert": false},
            {"type": "Digits", "individual_digits": true}, bytes]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [99],
                "tokens": ["<|im_end|>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocabulary, "merges": merges},
    })
}

#[test]
fn damaged_tokenizer_json() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages }}").unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"bos_token": "<|im_end|>"}"#)
        .unwrap();
    let folder = ModelFolder::open(dir.path()).unwrap();
    let path = dir.path().join("tokenizer.json");
    let whole = tokenizer_json().to_string().into_bytes();
    std::fs::write(&path, &whole).unwrap();
    folder.tokenizer().unwrap();
    for round in rounds(700) {
        let damaged = mutate::json(&mut Random::new(round), &whole);
        std::fs::write(&path, &damaged).unwrap();
        let files = ["tokenizer.json", &dir.path().display().to_string()];
        check(&format!("tokenizer, round {round}"), damaged.len(), &files, || {
            read_text(&folder, TOKENS)
        });
    }
}

#[test]
fn damaged_tokenizer_config_json() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
    let folder = ModelFolder::open(dir.path()).unwrap();
    let path = dir.path().join("tokenizer_config.json");
    let mark = json!({"content": "<|im_end|>", "lstrip": false, "special": true});
    let whole = json!({
        "bos_token": mark, "eos_token": "<|im_end|>", "pad_token": null, "unk_token": mark,
        "chat_template": [{"name": "default", "template": "{{ messages }}"},
            {"name": "tool_use", "template": "{{ tools }}"}],
        "added_tokens_decoder": {"99": mark}, "model_max_length": 1e30,
    });
    let whole = whole.to_string().into_bytes();
    for round in rounds(800) {
        let damaged = mutate::json(&mut Random::new(round), &whole);
        std::fs::write(&path, &damaged).unwrap();
        let files = ["tokenizer_config.json", &dir.path().display().to_string()];
        check(&format!("tokenizer config, round {round}"), damaged.len(), &files, || {
            read_text(&folder, TOKENS)
        });
    }
}
