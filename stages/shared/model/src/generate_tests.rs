#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

use checkpoint::{GgmlType, GgufWriter, ModelConfig, ModelFolder, gguf_name, gguf_rows, to_f32};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::*;
use crate::MicroBatch;
use crate::matrix::Matrix;

fn fixture(path: &str) -> PathBuf {
    fixtures::path(&format!("tiny-models/{path}"))
}

/// A tiny model with its values rounded to bf16, once stored so and once as f32.
fn rounded(family: &str) -> [tempfile::TempDir; 2] {
    let source = fixture(&format!("{family}/f32"));
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    // Cutting the lower half off is a bf16 too.
    let cut = |data: &[u8], f32: bool| -> Vec<u8> {
        let keep = |b: &[u8; 4]| if f32 { vec![0, 0, b[2], b[3]] } else { vec![b[2], b[3]] };
        data.as_chunks().0.iter().flat_map(keep).collect()
    };
    [false, true].map(|f32| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(source.join("config.json"), dir.path().join("config.json")).unwrap();
        let parts: Vec<(String, Vec<usize>, Vec<u8>)> = file
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, view.shape().to_vec(), cut(view.data(), f32)))
            .collect();
        let dtype = if f32 { Dtype::F32 } else { Dtype::BF16 };
        let views = parts.iter().map(|(name, shape, data)| {
            (name.as_str(), TensorView::new(dtype, shape.clone(), data).unwrap())
        });
        let whole = safetensors::serialize(views, None).unwrap();
        std::fs::write(dir.path().join("model.safetensors"), whole).unwrap();
        dir
    })
}

fn generated(model: &Model, adapter: &Adapter) -> Vec<Generated> {
    let prompts = [vec![1, 2, 3], vec![7; 20], vec![400]];
    let options = GenerateOptions { max_new_tokens: 12, end_tokens: vec![], batch_size: 2 };
    let mut rows = Vec::new();
    let mut keep = |row| {
        rows.push(row);
        true
    };
    model.generate(Some(adapter), &prompts, &options, &mut keep).unwrap();
    rows.sort_by_key(|row| row.prompt);
    rows
}

/// A large model decodes its matrices whenever they are used.
fn as_in_a_large_model(mut model: Model) -> Model {
    for matrix in model.layers.iter_mut().flat_map(|layer| &mut layer.projections) {
        *matrix = matrix.not_kept();
    }
    model.embed_tokens = model.embed_tokens.not_kept();
    model.lm_head = model.lm_head.map(|head| head.not_kept());
    model
}

fn bits(values: Vec<f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

/// Bits of logits, loss and gradient.
fn results(model: &Model, adapter: &Adapter) -> (Vec<u32>, u64, Vec<u32>) {
    let tokens: Vec<i32> = (0..40).map(|i| i * 11 % 500).collect();
    let targets: Vec<i32> = tokens.iter().map(|t| (t + 1) % 500).collect();
    let cu_seqlens = &[0, 25, 40];
    let logits = model.logits(Some(adapter), &tokens, cu_seqlens).unwrap();
    let mut grad = vec![0.0; adapter.values.len()];
    let batch = MicroBatch { tokens: &tokens, cu_seqlens, targets: &targets };
    let loss = model.loss_and_grad(adapter, batch, 0.5, None, &mut grad).unwrap();
    (bits(logits), loss.sum.to_bits(), bits(grad))
}

#[test]
fn stored_weights_give_the_bits_of_decoded_ones() {
    for family in ["llama", "qwen2", "gemma2"] {
        let [stored, full] = rounded(family).map(|dir| Model::load(dir.path()).unwrap());
        assert!(matches!(stored.layers[0].projections[0], Matrix::Stored(_)));
        assert!(matches!(full.layers[0].projections[0], Matrix::Full(_)));
        assert_eq!(stored.weight_bytes() * 2, full.weight_bytes());
        let adapter = Adapter::load_peft(&fixture(&format!("{family}/adapter")), &full).unwrap();
        let expected = results(&full, &adapter);
        // Twice: values that were kept are used again.
        assert_eq!(results(&stored, &adapter), expected, "{family}");
        assert_eq!(results(&stored, &adapter), expected, "{family}");
        assert_eq!(results(&as_in_a_large_model(stored), &adapter), expected, "{family}");
    }
}

/// The tiny Llama with its matrices in one of ggml's types, as GGUF, and decoded as safetensors.
fn quantised(dtype: GgmlType) -> [tempfile::TempDir; 2] {
    let source = fixture("llama/f32");
    let config = ModelFolder::open(&source).and_then(|f| ModelConfig::read(&f)).unwrap();
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let mut writer = GgufWriter::new();
    writer.str("general.architecture", "llama");
    for (key, value) in [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
    ] {
        writer.u32(&format!("llama.{key}"), value as u32);
    }
    writer.f32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps);
    writer.f32("llama.rope.freq_base", config.rope_theta);
    let (mut blocks, mut decoded) = (Vec::new(), Vec::new());
    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let values = to_f32(view.dtype(), view.data()).unwrap();
        let (shape, own) = (view.shape().to_vec(), gguf_name(&config, &name).unwrap());
        let dtype = if shape.len() == 1 { GgmlType::F32 } else { dtype };
        writer.tensor(&own, dtype, &shape).unwrap();
        let width = shape[shape.len() - 1];
        let encoded = dtype.encode(&values).unwrap();
        let rounded = dtype.decode(&encoded, values.len()).unwrap();
        blocks.push(dtype.encode(&gguf_rows(&config, &own, values, width)).unwrap());
        let rounded: Vec<u8> = rounded.iter().flat_map(|v| v.to_le_bytes()).collect();
        decoded.push((name, shape, rounded));
    }
    let dirs = [(), ()].map(|()| tempfile::tempdir().unwrap());
    let mut file = std::fs::File::create(dirs[0].path().join("model.gguf")).unwrap();
    writer.write(&mut file, |i| Ok::<_, std::io::Error>(blocks[i].clone())).unwrap();
    let views = decoded.iter().map(|(name, shape, data)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
    });
    let whole = safetensors::serialize(views, None).unwrap();
    std::fs::write(dirs[1].path().join("model.safetensors"), whole).unwrap();
    std::fs::copy(source.join("config.json"), dirs[1].path().join("config.json")).unwrap();
    dirs
}

#[test]
fn blocks_of_gguf_give_the_bits_of_decoded_weights() {
    for dtype in [GgmlType::Q4_0, GgmlType::Q8_0, GgmlType::F16, GgmlType::BF16, GgmlType::F32] {
        let [stored, full] = quantised(dtype).map(|dir| Model::load(dir.path()).unwrap());
        let projections = || stored.layers.iter().flat_map(|layer| &layer.projections);
        let in_blocks = projections().all(|m| matches!(m, Matrix::Stored(_)));
        assert_eq!(in_blocks, dtype != GgmlType::F32, "{dtype:?}");
        let adapter = Adapter::load_peft(&fixture("llama/adapter"), &full).unwrap();
        let expected = results(&full, &adapter);
        assert_eq!(results(&stored, &adapter), expected, "{dtype:?}");
        let tokens = generated(&full, &adapter);
        assert_eq!(generated(&stored, &adapter), tokens, "{dtype:?}");
        let stored = as_in_a_large_model(stored);
        assert_eq!(results(&stored, &adapter), expected, "{dtype:?}");
        assert_eq!(generated(&stored, &adapter), tokens, "{dtype:?}");
    }
}

#[test]
fn fixture_nf4_weights_give_the_bits_of_decoded_ones() {
    for family in ["llama", "qwen2", "gemma2"] {
        let folder = fixture(family);
        let [stored, mut full] = [(), ()].map(|()| Model::load(&folder.join("nf4")).unwrap());
        let stored = as_in_a_large_model(stored);
        for matrix in full.layers.iter_mut().flat_map(|layer| &mut layer.projections) {
            assert!(matches!(matrix, Matrix::Stored(_)));
            let values = matrix.pin().view().values().into_owned();
            *matrix = Matrix::full(values, matrix.dims());
        }
        let adapter = Adapter::load_peft(&folder.join("adapter"), &full).unwrap();
        assert_eq!(results(&stored, &adapter), results(&full, &adapter), "{family}");
        assert_eq!(generated(&stored, &adapter), generated(&full, &adapter), "{family}");
    }
}

#[test]
fn tokens_are_the_same_with_and_without_room_for_f32() {
    let [stored, full] = rounded("qwen2").map(|dir| Model::load(dir.path()).unwrap());
    let adapter = Adapter::load_peft(&fixture("qwen2/adapter"), &full).unwrap();
    let stored = as_in_a_large_model(stored);
    let cramped = PackedWeights::with_layers(&stored, &stored.pin(), false);
    assert!(cramped.layers.is_empty());
    assert!(stored.packed.set(cramped).is_ok());
    assert_eq!(generated(&stored, &adapter), generated(&full, &adapter));
}

/// Of a ragged batch, with rows that end before, on and far past Gemma-2's window of 16.
#[test]
fn fixture_cached_decoding_gives_the_logits_of_the_full_pass() {
    for family in ["llama", "qwen2", "gemma2"] {
        let model = Model::load(&fixture(&format!("{family}/f32"))).unwrap();
        let adapter = Adapter::load_peft(&fixture(&format!("{family}/adapter")), &model).unwrap();
        let prompts = [vec![5], vec![9; 15], (0..60).map(|i| i * 7 % 500).collect::<Vec<u32>>()];
        let options = GenerateOptions { max_new_tokens: 24, end_tokens: vec![], batch_size: 3 };
        for adapter in [None, Some(&adapter)] {
            let pinned = model.pin();
            let packed = PackedWeights::new(&model, &pinned);
            let packed_adapter = adapter.map(|a| PackedAdapter::new(&model, a));
            let decoder = Decoder {
                model: &model,
                pinned: &pinned,
                packed: &packed,
                adapter: packed_adapter.as_ref(),
            };
            let mut rows = model.prefill(adapter, &pinned, &prompts, &[0, 1, 2], &options);
            for step in 1..options.max_new_tokens {
                let cached = decoder.logits(&mut rows);
                for (row, cached) in rows.iter_mut().zip(cached.chunks(model.config.vocab_size)) {
                    let seen = prompts[row.prompt].iter().chain(&row.tokens);
                    let seen: Vec<i32> = seen.map(|t| *t as i32).collect();
                    let full = model.logits(adapter, &seen, &[0, seen.len() as i32]).unwrap();
                    let full = &full[full.len() - cached.len()..];
                    let off = cached.iter().zip(full).map(|(a, b)| (a - b).abs());
                    let off = off.fold(0.0, f32::max);
                    assert!(off < 1e-4, "{family}, prompt {}, step {step}: {off}", row.prompt);
                    row.tokens.push(elementwise::argmax(cached) as u32);
                    row.position += 1;
                }
            }
        }
    }
}
