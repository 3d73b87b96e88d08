//! A Gemma-2 in llama.cpp's layout gives the logits of the same model in transformers' layout.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use checkpoint::{GgmlType, GgufWriter, to_f32};
use model::Model;
use safetensors::SafeTensors;

/// Names as `convert_hf_to_gguf.py` gives them.
fn llama_cpp_name(name: &str) -> String {
    let name = name.replace("model.layers.", "blk.");
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    ];
    pairs.iter().fold(name, |name, (from, to)| name.replace(from, to))
}

/// The tiny Gemma-2 as a GGUF file; norm weights get the 1 that llama.cpp stores.
fn write_gguf(source: &Path, target: &Path) {
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut writer = GgufWriter::new();
    writer.str("general.architecture", "gemma2");
    for (key, value) in [
        ("block_count", 2),
        ("context_length", 256),
        ("embedding_length", 128),
        ("feed_forward_length", 320),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 64),
        ("attention.value_length", 64),
        ("attention.sliding_window", 16),
    ] {
        writer.u32(&format!("gemma2.{key}"), value);
    }
    for (key, value) in [
        ("attention.layer_norm_rms_epsilon", 1e-6),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
    ] {
        writer.f32(&format!("gemma2.{key}"), value);
    }
    let mut data: Vec<Vec<u8>> = Vec::new();
    for (name, view) in file.tensors() {
        writer.tensor(&llama_cpp_name(&name), GgmlType::F32, view.shape()).unwrap();
        let plus = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let values = to_f32(view.dtype(), view.data()).unwrap();
        data.push(values.iter().flat_map(|v| (v + plus).to_le_bytes()).collect());
    }
    let mut out = std::fs::File::create(target).unwrap();
    writer.write(&mut out, |i| Ok::<_, std::io::Error>(data[i].clone())).unwrap();
}

#[test]
fn a_gguf_of_gemma2_gives_the_logits_of_its_safetensors() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/fixtures");
    let source = repository.join("tiny-models/gemma2/f32");
    let dir = tempfile::tempdir().unwrap();
    write_gguf(&source, &dir.path().join("model.gguf"));
    let [whole, gguf] = [source.as_path(), dir.path()].map(|path| Model::load(path).unwrap());
    let tokens: Vec<i32> = (0..40).map(|i| i * 11 % 500).collect();
    let logits = |model: &Model| model.logits(None, &tokens, &[0, 40]).unwrap();
    assert_eq!(logits(&whole), logits(&gguf));
}
