//! Loading keeps a model as it is stored: alone in this file, because it watches the process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::{GgmlType, GgufWriter, NF4_VALUES};
use model::{Model, ModelConfig};
use serde_json::{Map, Value, json};

const HIDDEN: usize = 2048;
const FFN: usize = 11_008;
const LAYERS: usize = 6;
const VOCABULARY: usize = 32_768;

/// Private memory that loading may take: codes stay in the mapped file.
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

/// Linear layers of a block: transformers' and llama.cpp's names, `[out, in]`.
const LINEAR: [(&str, &str, [usize; 2]); 7] = [
    ("self_attn.q_proj", "attn_q", [HIDDEN, HIDDEN]),
    ("self_attn.k_proj", "attn_k", [256, HIDDEN]),
    ("self_attn.v_proj", "attn_v", [256, HIDDEN]),
    ("self_attn.o_proj", "attn_output", [HIDDEN, HIDDEN]),
    ("mlp.gate_proj", "ffn_gate", [FFN, HIDDEN]),
    ("mlp.up_proj", "ffn_up", [FFN, HIDDEN]),
    ("mlp.down_proj", "ffn_down", [HIDDEN, FFN]),
];

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
        for (module, _, shape) in LINEAR {
            let name = format!("model.layers.{layer}.{module}");
            nf4(&mut tensors, &format!("{name}.weight"), shape);
            if ["q_proj", "k_proj", "v_proj"].iter().any(|biased| module.ends_with(biased)) {
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

/// A file in which zeros take no room.
struct Sparse(File);

impl Write for Sparse {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.iter().all(|b| *b == 0) {
            self.0.seek(SeekFrom::Current(bytes.len() as i64))?;
            return Ok(bytes.len());
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// Writes a GGUF model in Q4_K, Q6_K and F32; returns the bytes of the file.
fn write_gguf(folder: &Path) -> u64 {
    let mut writer = GgufWriter::new();
    writer.str("general.architecture", "llama");
    for (key, value) in [
        ("block_count", LAYERS),
        ("context_length", 1024),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", FFN),
        ("attention.head_count", 16),
        ("attention.head_count_kv", 2),
    ] {
        writer.u32(&format!("llama.{key}"), value as u32);
    }
    writer.f32("llama.attention.layer_norm_rms_epsilon", 1e-6);
    let mut sizes = Vec::new();
    let mut add = |name: String, dtype: GgmlType, shape: &[usize]| {
        writer.tensor(&name, dtype, shape).unwrap();
        let shape: Vec<u64> = shape.iter().map(|d| *d as u64).collect();
        sizes.push(dtype.tensor_bytes(&shape).unwrap());
    };
    add("token_embd.weight".to_owned(), GgmlType::Q6_K, &[VOCABULARY, HIDDEN]);
    add("output_norm.weight".to_owned(), GgmlType::F32, &[HIDDEN]);
    for layer in 0..LAYERS {
        for (_, module, shape) in LINEAR {
            add(format!("blk.{layer}.{module}.weight"), GgmlType::Q4_K, &shape);
        }
        for norm in ["attn_norm", "ffn_norm"] {
            add(format!("blk.{layer}.{norm}.weight"), GgmlType::F32, &[HIDDEN]);
        }
    }
    let mut file = Sparse(File::create(folder.join("model.gguf")).unwrap());
    let zeros = |index: usize| Ok::<_, std::io::Error>(vec![0; sizes[index] as usize]);
    writer.write(&mut file, zeros).unwrap();
    let end = file.0.stream_position().unwrap();
    file.0.set_len(end).unwrap();
    end
}

/// Private memory of this process in bytes; mapped files do not count.
fn private() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

/// The loaded model, and by how much private memory grew at most.
fn load(folder: &Path) -> (Model, u64) {
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
        let model = Model::load(folder).unwrap();
        done.store(true, Ordering::Relaxed);
        (model, watcher.join().unwrap())
    });
    (model, peak.max(private()).saturating_sub(before))
}

/// Bytes of the linear layers in f32.
fn full(config: &ModelConfig) -> u64 {
    (config.hidden_size * (2 * HIDDEN + 512 + 3 * FFN) * LAYERS * 4) as u64
}

#[test]
fn loading_leaves_a_model_in_its_file() {
    for write in [write_model, write_gguf] {
        let dir = tempfile::tempdir().unwrap();
        let stored = write(dir.path());
        let (model, peak) = load(dir.path());
        assert!(peak <= MARGIN, "{peak} bytes for {stored}");
        // As f32 it would not fit, nor in its own format.
        let full = full(model.config());
        assert!(full > 2 * (stored + MARGIN), "{full} bytes is too small a model for this test");
        assert!(stored > MARGIN, "{stored} bytes is too small a model for this test");
        assert!(model.weight_bytes() <= stored, "{} bytes for {stored}", model.weight_bytes());
    }
}
