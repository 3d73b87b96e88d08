//! The fast path against transformers and PEFT, on stored reference outputs.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

use std::path::PathBuf;

use model::{Adapter, MicroBatch, Model, reference};
use safetensors::SafeTensors;

/// Folder of reference outputs: `PIPE_FIXTURES`, else the trimmed copy in the repository.
fn fixtures() -> PathBuf {
    std::env::var_os("PIPE_FIXTURES").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../tests/fixtures"),
        PathBuf::from,
    )
}

struct Expected(Vec<u8>);

impl Expected {
    fn read(path: &str) -> Self {
        let path = fixtures().join(path);
        Self(std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap();
        checkpoint::to_f32(view.dtype(), view.data()).unwrap()
    }

    fn ints(&self, name: &str) -> Vec<i32> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap();
        let size = view.data().len() / view.shape().iter().product::<usize>();
        view.data()
            .chunks_exact(size)
            .map(|b| {
                if size == 8 {
                    i64::from_le_bytes(b.try_into().unwrap()) as i32
                } else {
                    i32::from_le_bytes(b.try_into().unwrap())
                }
            })
            .collect()
    }
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// `(segment bounds, targets)` of the packed row of a tiny model.
fn packed(expected: &Expected) -> (Vec<i32>, Vec<i32>) {
    let positions = expected.ints("packed_positions");
    let labels = expected.ints("packed_labels");
    let n = labels.len();
    let mut cu: Vec<i32> = (0..n).filter(|i| positions[*i] == 0).map(|i| i as i32).collect();
    cu.push(n as i32);
    let targets = (0..n).map(|i| labels.get(i + 1).copied().unwrap_or(-100)).collect();
    (cu, targets)
}

#[test]
fn fixture_tiny_models_give_transformers_logits() {
    for family in ["llama", "qwen2", "gemma2"] {
        let expected = Expected::read(&format!("tiny-models/{family}/expected.safetensors"));
        let model = Model::load(&fixtures().join(format!("tiny-models/{family}/f32"))).unwrap();
        let ids = expected.ints("input_ids");
        let cu = [0, 48, 96];
        let logits = model.logits(None, &ids, &cu).unwrap();
        let off = max_difference(&logits, &expected.floats("logits_f32"));
        assert!(off < 2e-4, "{family}: {off}");
        let twin = reference::logits(&model, None, &ids, &cu);
        assert!(max_difference(&logits, &twin) < 2e-4, "{family}: twin");
    }
}

#[test]
fn fixture_nf4_checkpoints_give_transformers_logits() {
    // The repository's copy holds no quantised checkpoint.
    if std::env::var_os("PIPE_FIXTURES").is_none() {
        eprintln!("skipped: PIPE_FIXTURES is not set");
        return;
    }
    for family in ["llama", "qwen2", "gemma2"] {
        let folder = fixtures().join(format!("tiny-models/{family}"));
        let expected = Expected::read(&format!("tiny-models/{family}/expected.safetensors"));
        let model = Model::load(&folder.join("nf4")).unwrap();
        let adapter = Adapter::load_peft(&folder.join("adapter"), &model).unwrap();
        let ids = expected.ints("input_ids");
        for (adapter, name) in [(None, "logits_nf4"), (Some(&adapter), "logits_nf4_adapter")] {
            let logits = model.logits(adapter, &ids, &[0, 48, 96]).unwrap();
            let off = max_difference(&logits, &expected.floats(name));
            assert!(off < 2e-4, "{family} {name}: {off}");
        }
    }
}

#[test]
fn hand_written_gradients_equal_burns_autodiff() {
    for family in ["llama", "qwen2", "gemma2"] {
        let expected = Expected::read(&format!("tiny-models/{family}/expected.safetensors"));
        let model = Model::load(&fixtures().join(format!("tiny-models/{family}/f32"))).unwrap();
        let folder = fixtures().join(format!("tiny-models/{family}/adapter"));
        let adapter = Adapter::load_peft(&folder, &model).unwrap();
        let (cu, targets) = packed(&expected);

        let ids = expected.ints("input_ids")[..targets.len()].to_vec();
        let batch = MicroBatch { tokens: &ids, cu_seqlens: &cu, targets: &targets };
        let mut grad = vec![0.0; adapter.values.len()];
        let loss = model.loss_and_grad(&adapter, batch, 0.25, None, &mut grad).unwrap();
        let (twin_loss, twin) = reference::loss_and_grad(&model, &adapter, batch, 0.25);
        assert!((loss.sum - twin_loss.sum).abs() / twin_loss.sum < 1e-5);
        for factor in &adapter.factors {
            for range in [&factor.a, &factor.b] {
                let norm = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
                let difference: Vec<f32> = grad[range.clone()]
                    .iter()
                    .zip(&twin[range.clone()])
                    .map(|(a, b)| a - b)
                    .collect();
                let off = norm(&difference) / norm(&twin[range.clone()]);
                assert!(off < 1e-4, "{family} {}: {off}", factor.name);
            }
        }
    }
}
