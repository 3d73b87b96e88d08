//! Files from strangers: whatever the bytes, an answer or a named error, never a panic.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use checkpoint::{GgmlType, Gguf, GgufWriter, LinearWeight, ModelConfig, ModelFolder, Weights};
use proptest::prelude::*;
use safetensors::SafeTensors;

const NAME: &str = "zeros_double.weight";
const SHAPE: [usize; 2] = [8, 64];
const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64, "tie_word_embeddings": true,
    "quantization_config": {"quant_method": "bitsandbytes",
    "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}}"#;

/// A change to a file.
#[derive(Clone, Debug)]
enum Damage {
    /// Bits flipped in the byte at that share of the file.
    Flip(f64, u8),
    /// The file ends at that share.
    Cut(f64),
    /// Eight bytes at that share become a large little-endian number.
    BlowUp(f64, u64),
    /// The first run of digits after that share is replaced.
    Number(f64, u64),
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    // Most of what a reader decides on is near the start.
    let at = || prop_oneof![0.0..0.02, 0.0..1.0];
    let large = || prop_oneof![Just(u64::MAX), any::<u64>(), (0_u32..64).prop_map(|b| 1 << b)];
    let one = prop_oneof![
        (at(), 1_u8..).prop_map(|(at, bits)| Damage::Flip(at, bits)),
        at().prop_map(Damage::Cut),
        (at(), large()).prop_map(|(at, n)| Damage::BlowUp(at, n)),
        (0.0..1.0, large()).prop_map(|(at, n)| Damage::Number(at, n)),
    ];
    prop::collection::vec(one, 1..4)
}

fn apply(bytes: &mut Vec<u8>, damage: &[Damage]) {
    for damage in damage {
        let place = |at: f64| ((bytes.len() as f64 * at) as usize).min(bytes.len());
        match *damage {
            Damage::Flip(at, bits) => {
                let at = place(at);
                bytes.iter_mut().skip(at).take(1).for_each(|b| *b ^= bits);
            }
            Damage::Cut(at) => bytes.truncate(place(at)),
            Damage::BlowUp(at, number) => {
                let at = place(at);
                bytes.iter_mut().skip(at).zip(number.to_le_bytes()).for_each(|(b, n)| *b = n);
            }
            Damage::Number(at, number) => {
                let digit = |b: &u8| b.is_ascii_digit();
                let Some(from) = bytes[place(at)..].iter().position(digit) else { continue };
                let from = place(at) + from;
                let len = bytes[from..].iter().take_while(|b| digit(b)).count();
                bytes.splice(from..from + len, number.to_string().into_bytes());
            }
        }
    }
}

/// A checkpoint of one NF4 layer with double quantisation.
fn safetensors_file() -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../tests/fixtures/checkpoint/nf4/model.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let one = file.tensors().into_iter().filter(|(name, _)| name.starts_with(NAME));
    safetensors::serialize(one, None).unwrap()
}

/// Metadata of every kind and a Q4_K tensor `[2, 256]`.
fn gguf_file() -> Vec<u8> {
    let mut writer = GgufWriter::new();
    writer.str("general.architecture", "llama");
    writer.u32("llama.block_count", 1);
    writer.strings("tokenizer.ggml.tokens", &["a", "", "bc"].map(str::to_owned));
    writer.tensor("token_embd.weight", GgmlType::Q4_K, &[2, 256]).unwrap();
    let mut out = Vec::new();
    writer.write(&mut out, |_| Ok::<_, std::io::Error>(vec![3; 288])).unwrap();
    out
}

/// Reads the layer; the error as text.
fn read_safetensors(bytes: &[u8]) -> Result<Vec<f32>, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let folder = ModelFolder::open(dir.path()).unwrap();
    let config = ModelConfig::read(&folder).unwrap();
    let weights = Weights::open(&folder, &config).map_err(|e| e.to_string())?;
    let linear = weights.load_linear(NAME, SHAPE);
    linear.map(LinearWeight::into_f32).map_err(|e| e.to_string())
}

/// Reads every tensor and the shape of the model; the error as text.
fn read_gguf(bytes: &[u8]) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let gguf = Gguf::open(&path).map_err(|e| e.to_string())?;
    for tensor in gguf.tensors() {
        let data = gguf.tensor_data(&tensor.name).unwrap();
        assert_eq!(data.len() as u64, tensor.bytes);
    }
    let folder = ModelFolder::Gguf { gguf };
    ModelConfig::read(&folder).map(drop).map_err(|e| e.to_string())
}

fn check_safetensors(bytes: &[u8]) {
    match read_safetensors(bytes) {
        Ok(values) => assert_eq!(values.len(), SHAPE[0] * SHAPE[1]),
        Err(error) => {
            assert!(error.contains("model.safetensors") || error.contains(NAME), "{error}");
        }
    }
}

fn check_gguf(bytes: &[u8]) {
    if let Err(error) = read_gguf(bytes) {
        assert!(error.contains("model.gguf"), "{error}");
    }
}

#[test]
fn files_are_whole_before_they_are_damaged() {
    assert_eq!(read_safetensors(&safetensors_file()).unwrap().len(), 512);
    let error = read_gguf(&gguf_file()).unwrap_err();
    assert!(error.contains("llama.attention.head_count"), "{error}");
}

#[test]
fn file_of_safetensors_cut_anywhere_is_an_error() {
    let whole = safetensors_file();
    for len in (0..whole.len()).step_by(7) {
        let error = read_safetensors(&whole[..len]).unwrap_err();
        assert!(error.contains("not a valid safetensors file"), "{error}");
    }
}

proptest! {
    #[test]
    fn damaged_safetensors_give_values_or_a_named_error(damage in damage()) {
        let mut bytes = safetensors_file();
        apply(&mut bytes, &damage);
        check_safetensors(&bytes);
    }

    #[test]
    fn damaged_gguf_gives_a_model_or_a_named_error(damage in damage()) {
        let mut bytes = gguf_file();
        apply(&mut bytes, &damage);
        check_gguf(&bytes);
    }

    #[test]
    fn any_bytes_are_an_error(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        header in 0_u64..400,
    ) {
        check_safetensors(&bytes);
        check_safetensors(&[&header.to_le_bytes(), &bytes[..]].concat());
        check_gguf(&bytes);
        check_gguf(&[b"GGUF\x03\0\0\0", &bytes[..]].concat());
    }

    #[test]
    fn damaged_quant_state_gives_values_or_a_named_error(damage in damage()) {
        let whole = safetensors_file();
        let file = SafeTensors::deserialize(&whole).unwrap();
        let tensors = file.tensors();
        let mut state = Vec::new();
        let key = format!("{NAME}.quant_state.bitsandbytes__nf4");
        state.extend(file.tensor(&key).unwrap().data());
        apply(&mut state, &damage);
        let changed = tensors.into_iter().map(|(name, view)| {
            if name == key {
                let (dtype, len) = (view.dtype(), vec![state.len()]);
                (name, safetensors::tensor::TensorView::new(dtype, len, &state).unwrap())
            } else {
                (name, view)
            }
        });
        check_safetensors(&safetensors::serialize(changed, None).unwrap());
    }
}
