//! Safetensors in shards: faults of the set have names of their own.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use checkpoint::{ModelConfig, ModelFolder, Weights};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

const A: &str = "model-00001-of-00002.safetensors";
const B: &str = "model-00002-of-00002.safetensors";

/// Writes F32 vectors of two elements.
fn shard(dir: &Path, file: &str, names: &[&str]) {
    let data: Vec<u8> = [1.5_f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let views = names.iter().map(|n| (*n, TensorView::new(Dtype::F32, vec![2], &data).unwrap()));
    std::fs::write(dir.join(file), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Two shards with `a`, `b` and `c`, and an index of them.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "tie_word_embeddings": true,
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    shard(dir.path(), A, &["a", "b"]);
    shard(dir.path(), B, &["c"]);
    index(dir.path(), &json!({"a": A, "b": A, "c": B}));
    dir
}

fn index(dir: &Path, map: &serde_json::Value) {
    let text = json!({"metadata": {"total_size": 24}, "weight_map": map}).to_string();
    std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
}

fn load(dir: &Path, name: &str) -> Result<Vec<f32>, String> {
    let folder = ModelFolder::open(dir).map_err(|e| e.to_string())?;
    let config = ModelConfig::read(&folder).map_err(|e| e.to_string())?;
    let weights = Weights::open(&folder, &config).map_err(|e| e.to_string())?;
    weights.load(name, &[2]).map_err(|e| e.to_string())
}

#[test]
fn tensors_come_from_the_shard_that_has_them() {
    let dir = folder();
    for name in ["a", "b", "c"] {
        assert_eq!(load(dir.path(), name).unwrap(), [1.5, -2.0]);
    }
    let error = load(dir.path(), "d").unwrap_err();
    assert!(error.contains("tensor `d` is missing"), "{error}");
}

#[test]
fn missing_shard_is_named() {
    let dir = folder();
    std::fs::remove_file(dir.path().join(B)).unwrap();
    let error = load(dir.path(), "a").unwrap_err();
    assert!(error.contains(&format!("the shard `{B}` is missing")), "{error}");
}

#[test]
fn tensor_that_its_shard_lacks_is_named() {
    let dir = folder();
    for map in [json!({"a": A, "b": B, "c": B}), json!({"a": A, "c": B, "d": A})] {
        index(dir.path(), &map);
        let error = load(dir.path(), "a").unwrap_err();
        assert!(error.contains("is not in the shard"), "{error}");
    }
}

#[test]
fn tensor_in_two_shards_is_named() {
    let dir = folder();
    shard(dir.path(), B, &["c", "a"]);
    let error = load(dir.path(), "c").unwrap_err();
    assert!(error.contains("tensor `a` is also in") && error.contains(A), "{error}");
}

#[test]
fn tensor_twice_in_one_header_is_named() {
    let dir = folder();
    let entry = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    let header = format!("{{{entry},{entry}}}");
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend([0; 8]);
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let error = load(dir.path(), "a").unwrap_err();
    assert!(error.contains("tensor `a` is listed twice"), "{error}");
}

#[test]
fn index_that_leads_elsewhere_is_refused() {
    let dir = folder();
    for name in ["../other.safetensors", "..", "config.json"] {
        index(dir.path(), &json!({"a": name}));
        let error = load(dir.path(), "a").unwrap_err();
        assert!(error.contains("is not the name of a shard"), "{error}");
    }
    std::fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    let error = load(dir.path(), "a").unwrap_err();
    assert!(error.contains("no weights here"), "{error}");
}
