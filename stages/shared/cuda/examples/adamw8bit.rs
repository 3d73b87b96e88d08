//! Ten steps of the 8-bit AdamW from gradients in a file, for a comparison with bitsandbytes':
//! `adamw8bit FOLDER`; `benches/peers/adamw8bit.py` makes the folder and reads the result.
//!
//! `FOLDER/in.safetensors` holds `values` [n] and `gradients` [steps, n] in the layout of the adapter of
//! the shape below, and `rates` [steps]; `FOLDER/out.safetensors` gets `values`, and the states as
//! `Optimizer::write` has them. `adamw8bit FOLDER layout` writes the tensors' bounds as `bounds` instead.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "an example")]

use std::collections::HashMap;
use std::path::Path;

use checkpoint::{Family, ModelConfig, Variations, dynamic_map};
use cuda::{AdamSettings, Device, Dtype, Lora, Optimizer};
use model::{Adapter, LoraConfig};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as Stored, SafeTensors};

/// Factors of 512 to 8,000 elements, on both sides of the 4,096 from which moments have 8 bits; not all
/// are multiples of 256.
fn shape() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        variations: Variations::default(),
        hidden_size: 520,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 32,
        intermediate_size: 1000,
        vocab_size: 64,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        max_position_embeddings: 64,
        tie_word_embeddings: true,
        qkv_bias: false,
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let folder = Path::new(&args[0]);
    let config = LoraConfig { r: 8, ..LoraConfig::default() };
    let mut adapter = Adapter::fresh(&shape(), &config, 1).unwrap();
    let tensors = adapter.tensors();
    if args.len() > 1 {
        let bounds: Vec<u8> = tensors
            .iter()
            .flat_map(|t| [t.start, t.end])
            .flat_map(|bound| (bound as i64).to_le_bytes())
            .collect();
        let bounds = TensorView::new(Stored::I64, vec![tensors.len(), 2], &bounds).unwrap();
        let file = HashMap::from([("bounds".to_owned(), bounds)]);
        safetensors::serialize_to_file(file, None, &folder.join("layout.safetensors")).unwrap();
        return;
    }
    let bytes = std::fs::read(folder.join("in.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| Dtype::F32.decode(file.tensor(name).unwrap().data());
    adapter.values = floats("values");
    let device = Device::open(0, Dtype::Bf16).unwrap();
    let lora = Lora::new(&device, &shape(), &adapter).unwrap();
    let settings = AdamSettings { eight_bit: true, clip: 0.0, ..AdamSettings::default() };
    let maps = [dynamic_map(true), dynamic_map(false)].concat();
    let mut optimizer = Optimizer::new(&device, settings, &tensors, &maps, None).unwrap();
    let gradients = floats("gradients");
    for (gradient, rate) in gradients.chunks_exact(adapter.values.len()).zip(floats("rates")) {
        lora.write_gradient(&device, gradient).unwrap();
        optimizer.collect(&device, &lora, 1.0).unwrap();
        optimizer.update(&device, &lora, f64::from(rate)).unwrap();
    }
    let values = Dtype::F32.encode(&lora.read_values(&device).unwrap());
    let mut states = Vec::new();
    optimizer.write(&device, &mut states).unwrap();
    let file = HashMap::from([
        (
            "values".to_owned(),
            TensorView::new(Stored::F32, vec![values.len() / 4], &values).unwrap(),
        ),
        ("states".to_owned(), TensorView::new(Stored::U8, vec![states.len()], &states).unwrap()),
    ]);
    safetensors::serialize_to_file(file, None, &folder.join("out.safetensors")).unwrap();
    println!("{} tensors, {} steps", tensors.len(), gradients.len() / adapter.values.len());
}
