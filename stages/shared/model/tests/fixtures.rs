//! The fast path against transformers and PEFT, on stored reference outputs.
#![allow(clippy::unwrap_used, reason = "tests")]

use model::{Adapter, MicroBatch, Model, reference};
use safetensors::SafeTensors;

struct Expected(Vec<u8>);

impl Expected {
    fn read(path: &str) -> Self {
        Self(std::fs::read(fixtures::path(path)).unwrap())
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
        let model = Model::load(&fixtures::path(&format!("tiny-models/{family}/f32"))).unwrap();
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
    for family in ["llama", "qwen2", "gemma2"] {
        let folder = fixtures::path(&format!("tiny-models/{family}"));
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
fn fixture_hand_written_gradients_equal_burns_autodiff() {
    for family in ["llama", "qwen2", "gemma2"] {
        let expected = Expected::read(&format!("tiny-models/{family}/expected.safetensors"));
        let model = Model::load(&fixtures::path(&format!("tiny-models/{family}/f32"))).unwrap();
        let folder = fixtures::path(&format!("tiny-models/{family}/adapter"));
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

/// A tiny model in four bits, which the reference trains on, with its adapter and the packed row.
fn training(family: &str) -> (Model, Adapter, Expected) {
    let folder = fixtures::path(&format!("tiny-models/{family}"));
    let model = Model::load(&folder.join("nf4")).unwrap();
    let adapter = Adapter::load_peft(&folder.join("adapter"), &model).unwrap();
    (model, adapter, Expected::read(&format!("tiny-models/{family}/expected.safetensors")))
}

fn norm(x: impl IntoIterator<Item = f32>) -> f64 {
    x.into_iter().map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn fixture_loss_and_gradients_are_those_of_peft() {
    for family in ["llama", "qwen2", "gemma2"] {
        let (model, adapter, expected) = training(family);
        let (cu, targets) = packed(&expected);
        let ids = expected.ints("input_ids")[..targets.len()].to_vec();
        let batch = MicroBatch { tokens: &ids, cu_seqlens: &cu, targets: &targets };
        let count = targets.iter().filter(|t| **t != -100).count();
        let mut grad = vec![0.0; adapter.values.len()];
        let scale = 1.0 / count as f32;
        let loss = model.loss_and_grad(&adapter, batch, scale, None, &mut grad).unwrap();
        let wanted = f64::from(expected.floats("packed_loss")[0]);
        let off = (loss.sum / loss.targets as f64 - wanted).abs() / wanted;
        assert!(off < 1e-5, "{family}: packed loss {off}");
        let grads = Expected::read(&format!("tiny-models/{family}/lora_grads.safetensors"));
        for factor in &adapter.factors {
            for (range, part) in [(&factor.a, "lora_A"), (&factor.b, "lora_B")] {
                let wanted = grads.floats(&format!("{}.{part}.weight", factor.name));
                let found = &grad[range.clone()];
                let off = norm(found.iter().zip(&wanted).map(|(a, b)| a - b)) / norm(wanted);
                assert!(off < 1e-4, "{family} {} {part}: {off}", factor.name);
            }
        }
    }
}

#[test]
fn fixture_packed_rows_have_the_losses_of_their_segments_alone() {
    for family in ["llama", "qwen2", "gemma2"] {
        let expected = Expected::read(&format!("tiny-models/{family}/expected.safetensors"));
        let folder = fixtures::path(&format!("tiny-models/{family}"));
        let model = Model::load(&folder.join("f32")).unwrap();
        let adapter = Adapter::load_peft(&folder.join("adapter"), &model).unwrap();
        let (cu, targets) = packed(&expected);
        let ids = expected.ints("input_ids")[..targets.len()].to_vec();
        for position in (0..targets.len()).filter(|p| targets[*p] != -100) {
            let loss = |span: std::ops::Range<usize>, cu: &[i32]| {
                let mut one = vec![-100; span.len()];
                one[position - span.start] = targets[position];
                let batch = MicroBatch { tokens: &ids[span], cu_seqlens: cu, targets: &one };
                model.loss(Some(&adapter), batch).unwrap().sum
            };
            let segment = cu.windows(2).find(|w| position < w[1] as usize).unwrap();
            let whole = loss(0..ids.len(), &cu);
            let alone =
                loss(segment[0] as usize..segment[1] as usize, &[0, segment[1] - segment[0]]);
            assert!((whole - alone).abs() < 1e-5, "{family} {position}: {whole} {alone}");
        }
    }
}

/// One step of decoupled AdamW in f64, after clipping to a norm of 1: the recipe of the reference.
fn adamw(values: &mut [f32], grad: &[f32], moments: &mut [[f64; 2]], step: i32, rate: f64) {
    let clip = (1.0 / (norm(grad.iter().copied()) + 1e-6)).min(1.0);
    for ((x, g), [m, v]) in values.iter_mut().zip(grad).zip(moments) {
        let g = f64::from(*g) * clip;
        *m = 0.9 * *m + 0.1 * g;
        *v = 0.999 * *v + 0.001 * g * g;
        let denominator = (*v / (1.0 - 0.999f64.powi(step))).sqrt() + 1e-8;
        let update = *m / (1.0 - 0.9f64.powi(step)) / denominator;
        *x = (f64::from(*x) * (1.0 - rate * 0.01) - rate * update) as f32;
    }
}

#[test]
fn fixture_ten_steps_of_adamw_follow_torch() {
    for family in ["llama", "qwen2", "gemma2"] {
        let (model, mut adapter, expected) = training(family);
        let file = SafeTensors::deserialize(&expected.0).unwrap();
        let doubles = |name: &str| -> Vec<f64> {
            let bytes = file.tensor(name).unwrap().data().to_vec();
            bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let (losses, norms) = (doubles("adamw_losses"), doubles("adamw_grad_norms"));
        let (cu, targets) = packed(&expected);
        let ids = expected.ints("input_ids")[..targets.len()].to_vec();
        let batch = MicroBatch { tokens: &ids, cu_seqlens: &cu, targets: &targets };
        let count = targets.iter().filter(|t| **t != -100).count() as f32;
        let mut moments = vec![[0.0; 2]; adapter.values.len()];
        for step in 0..10i32 {
            let mut grad = vec![0.0; adapter.values.len()];
            let loss = model.loss_and_grad(&adapter, batch, 1.0 / count, None, &mut grad).unwrap();
            let found = [loss.sum / f64::from(count), norm(grad.iter().copied())];
            for (found, wanted) in found.iter().zip([losses[step as usize], norms[step as usize]]) {
                let off = (found - wanted).abs() / wanted;
                assert!(off < 1e-4, "{family} step {step}: {found} instead of {wanted}");
            }
            let s = f64::from(step);
            let rate = 1e-2 * if step < 3 { s / 3.0 } else { (10.0 - s) / 7.0 };
            adamw(&mut adapter.values, &grad, &mut moments, step + 1, rate);
        }
    }
}
