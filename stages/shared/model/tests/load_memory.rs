//! Loading keeps a model as it is stored: alone in this file, because it watches the process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::NF4_VALUES;
use model::Model;
use serde_json::{Map, Value, json};

const HIDDEN: usize = 2048;
const FFN: usize = 11_008;
const LAYERS: usize = 6;
const VOCABULARY: usize = 32_768;

/// What may come on top of the weights as stored.
const MARGIN: u64 = 256 << 20;

struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    /// Zeros where there are none: the file is sparse.
    data: Option<Vec<u8>>,
}

fn nf4(tensors: &mut Vec<Tensor>, name: &str, shape: [usize; 2]) {
    let count = shape[0] * shape[1];
    let state = json!({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape});
    let state = state.to_string().into_bytes();
    let map = NF4_VALUES.iter().flat_map(|v| v.to_le_bytes()).collect();
    for (part, dtype, shape, data) in [
        ("", "U8", vec![count / 2, 1], None),
        (".absmax", "F32", vec![count / 64], None),
        (".quant_map", "F32", vec![16], Some(map)),
        (".quant_state.bitsandbytes__nf4", "U8", vec![state.len()], Some(state)),
    ] {
        tensors.push(Tensor { name: format!("{name}{part}"), dtype, shape, data });
    }
}

/// Writes a model of NF4 layers and bf16 embeddings; returns the bytes of its tensors.
fn write_model(folder: &Path) -> u64 {
    let config = json!({
        "model_type": "qwen2", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 16, "num_key_value_heads": 2, "intermediate_size": FFN,
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6, "max_position_embeddings": 1024,
        "tie_word_embeddings": true,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true,
            "bnb_4bit_quant_type": "nf4"},
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut tensors = Vec::new();
    let plain = |tensors: &mut Vec<Tensor>, name: String, shape: Vec<usize>| {
        tensors.push(Tensor { name, dtype: "BF16", shape, data: None });
    };
    plain(&mut tensors, "model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]);
    plain(&mut tensors, "model.norm.weight".to_owned(), vec![HIDDEN]);
    for layer in 0..LAYERS {
        for (module, shape, biased) in [
            ("self_attn.q_proj", [HIDDEN, HIDDEN], true),
            ("self_attn.k_proj", [256, HIDDEN], true),
            ("self_attn.v_proj", [256, HIDDEN], true),
            ("self_attn.o_proj", [HIDDEN, HIDDEN], false),
            ("mlp.gate_proj", [FFN, HIDDEN], false),
            ("mlp.up_proj", [FFN, HIDDEN], false),
            ("mlp.down_proj", [HIDDEN, FFN], false),
        ] {
            let name = format!("model.layers.{layer}.{module}");
            nf4(&mut tensors, &format!("{name}.weight"), shape);
            if biased {
                plain(&mut tensors, format!("{name}.bias"), vec![shape[0]]);
            }
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            let name = format!("model.layers.{layer}.{norm}.weight");
            plain(&mut tensors, name, vec![HIDDEN]);
        }
    }
    write_safetensors(&folder.join("model.safetensors"), &tensors)
}

fn write_safetensors(path: &Path, tensors: &[Tensor]) -> u64 {
    let (mut header, mut end, mut places) = (Map::new(), 0, Vec::new());
    for Tensor { name, dtype, shape, .. } in tensors {
        let width = match *dtype {
            "U8" => 1,
            "BF16" => 2,
            _ => 4,
        };
        let start = end;
        end += shape.iter().product::<usize>() * width;
        places.push(start);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
    for (tensor, start) in tensors.iter().zip(places) {
        if let Some(data) = &tensor.data {
            file.seek(SeekFrom::Start((8 + header.len() + start) as u64)).unwrap();
            file.write_all(data).unwrap();
        }
    }
    end as u64
}

/// Private memory of this process in bytes; mapped files do not count.
fn private() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn loading_takes_the_model_as_stored_and_little_more() {
    let dir = tempfile::tempdir().unwrap();
    let stored = write_model(dir.path());
    let before = private();
    let done = AtomicBool::new(false);
    let (model, peak) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut peak = 0;
            while !done.load(Ordering::Relaxed) {
                peak = peak.max(private());
            }
            peak
        });
        let model = Model::load(dir.path()).unwrap();
        done.store(true, Ordering::Relaxed);
        (model, watcher.join().unwrap())
    });
    let peak = peak.max(private()) - before;
    assert!(peak <= stored + MARGIN, "{peak} bytes for {stored}");
    // As f32 it would not fit.
    let full = (model.config().hidden_size * (2 * HIDDEN + 512 + 3 * FFN) * LAYERS * 4) as u64;
    assert!(full > 2 * (stored + MARGIN), "{full} bytes is too small a model for this test");
    assert!(model.weight_bytes() <= stored, "{} bytes for {stored}", model.weight_bytes());
}
