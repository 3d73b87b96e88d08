//! The GPU against transformers and PEFT, on stored reference outputs; needs a GPU, else it is skipped.
//!
//! In f32 with five times the CPU's tolerances. `PIPE_PARITY=FOLDER` also keeps what the GPU gives in
//! every type, for `benches/peers/parity.py`, which sets it beside PyTorch's own distances.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

use std::collections::HashMap;
use std::path::PathBuf;

use checkpoint::{ModelConfig, ModelFolder};
use cuda::{Activations, AdamSettings, Device, Dtype, Frozen, Lora, Optimizer, Step};
use model::{Adapter, MicroBatch};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as Stored, SafeTensors};

struct Expected(Vec<u8>);

impl Expected {
    fn read(path: &str) -> Self {
        Self(std::fs::read(fixtures::path(&format!("tiny-models/{path}"))).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        Dtype::F32.decode(&self.bytes(name))
    }

    fn doubles(&self, name: &str) -> Vec<f64> {
        self.bytes(name).as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect()
    }

    fn ints(&self, name: &str) -> Vec<i32> {
        self.bytes(name).as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as i32).collect()
    }
}

/// A tiny model with its adapter on the GPU.
struct Rig {
    family: &'static str,
    expected: Expected,
    adapter: Adapter,
    lora: Lora,
    frozen: Frozen,
    device: Device,
}

/// Scale of the loss in f16.
const SCALE: f32 = 1024.0;

impl Rig {
    fn new(family: &'static str, weights: &str, adapted: bool, dtype: Dtype) -> Option<Self> {
        // First, so that a missing fixture fails without a GPU too.
        let folder = fixtures::path(&format!("tiny-models/{family}"));
        let expected = Expected::read(&format!("{family}/expected.safetensors"));
        let device = Device::open(0, dtype).map_err(fixtures::skipped).ok()?;
        let model = ModelFolder::open(&folder.join(weights)).unwrap();
        let config = ModelConfig::read(&model).unwrap();
        let mut adapter = Adapter::load_peft_of(&folder.join("adapter"), &config).unwrap();
        if !adapted {
            (adapter.factors, adapter.values) = (Vec::new(), Vec::new());
        }
        let frozen = Frozen::load(&device, &folder.join(weights)).unwrap();
        let lora = Lora::new(&device, &config, &adapter).unwrap();
        Some(Self { family, expected, adapter, lora, frozen, device })
    }

    fn step(&self, activations: Activations) -> Step {
        Step::new(&self.device, &self.frozen, &self.lora, 128, activations).unwrap()
    }

    /// Tokens, segment bounds and targets of the packed row.
    fn packed(&self) -> (Vec<i32>, Vec<i32>, Vec<i32>) {
        let positions = self.expected.ints("packed_positions");
        let labels = self.expected.ints("packed_labels");
        let n = labels.len();
        let mut cu: Vec<i32> = (0..n).filter(|i| positions[*i] == 0).map(|i| i as i32).collect();
        cu.push(n as i32);
        let targets = (0..n).map(|i| labels.get(i + 1).copied().unwrap_or(-100)).collect();
        (self.expected.ints("input_ids")[..n].to_vec(), cu, targets)
    }

    /// Logits of all rows of `input_ids`.
    fn logits(&self) -> Vec<f32> {
        let ids = self.expected.ints("input_ids");
        let targets = vec![0; ids.len()];
        let batch = MicroBatch { tokens: &ids, cu_seqlens: &[0, 48, 96], targets: &targets };
        let step = self.step(Activations::Keep);
        step.logits(&self.device, &self.frozen, &self.lora, batch).unwrap()
    }
}

fn norm(x: impl IntoIterator<Item = f32>) -> f64 {
    x.into_iter().map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

/// Norm of the difference over that of `wanted`; NaN never passes.
fn off(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    norm(found.iter().zip(wanted).map(|(a, b)| a - b)) / norm(wanted.iter().copied())
}

/// What is found, compared where the type is f32, and kept for the other program.
struct Findings {
    dtype: Dtype,
    tensors: Vec<(String, Vec<f32>)>,
}

impl Findings {
    fn keep(&mut self, name: impl Into<String>, values: &[f32]) {
        self.tensors.push((name.into(), values.to_vec()));
    }

    fn below(&self, limit: f64, off: f64, what: &str) {
        if self.dtype == Dtype::F32 {
            eprintln!("{what}: {off:.1e}, at most {limit:.0e}");
            assert!(off < limit, "{what}: {off}");
        }
    }

    fn write(&self, family: &str) {
        let Some(folder) = std::env::var_os("PIPE_PARITY").map(PathBuf::from) else { return };
        let bytes: Vec<Vec<u8>> =
            self.tensors.iter().map(|(_, values)| Dtype::F32.encode(values)).collect();
        let views = self.tensors.iter().zip(&bytes).map(|((name, values), bytes)| {
            (name.clone(), TensorView::new(Stored::F32, vec![values.len()], bytes).unwrap())
        });
        let file: HashMap<String, TensorView<'_>> = views.collect();
        let name = format!("{family}-{:?}.safetensors", self.dtype).to_lowercase();
        safetensors::serialize_to_file(file, None, &folder.join(name)).unwrap();
    }
}

fn check_logits(rig: &Rig, name: &str, findings: &mut Findings) {
    let (found, wanted) = (rig.logits(), rig.expected.floats(name));
    let off = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(found.iter().all(|l| l.is_finite()));
    findings.below(1e-3, f64::from(off), &format!("{} {name}", rig.family));
    findings.keep(name, &found);
}

fn check_gradients(rig: &Rig, findings: &mut Findings) {
    let (ids, cu, targets) = rig.packed();
    let batch = MicroBatch { tokens: &ids, cu_seqlens: &cu, targets: &targets };
    let count = targets.iter().filter(|t| **t != -100).count() as f32;
    let factor = if findings.dtype == Dtype::F16 { SCALE } else { 1.0 };
    let mut all: Vec<Vec<u32>> = Vec::new();
    let modes = [Activations::Keep, Activations::Recompute, Activations::Offload];
    for (index, activations) in modes.into_iter().chain([Activations::Keep]).enumerate() {
        let mut step = rig.step(activations);
        if index == modes.len() {
            assert!(step.keep_weights(&rig.device, &rig.frozen, &rig.lora).unwrap());
        }
        rig.lora.zero_grad(&rig.device).unwrap();
        step.run(&rig.device, &rig.frozen, &rig.lora, batch, factor / count).unwrap();
        let loss = step.take_loss(&rig.device).unwrap() / f64::from(count);
        let mut gradient = rig.lora.read_gradient(&rig.device).unwrap();
        all.push(gradient.iter().map(|g| g.to_bits()).collect());
        if index > 0 {
            continue;
        }
        gradient.iter_mut().for_each(|g| *g /= factor);
        let wanted = f64::from(rig.expected.floats("packed_loss")[0]);
        findings.below(5e-5, (loss - wanted).abs() / wanted, &format!("{} loss", rig.family));
        findings.keep("packed_loss", &[loss as f32]);
        let grads = Expected::read(&format!("{}/lora_grads.safetensors", rig.family));
        let mut worst = 0.0f64;
        for factor in &rig.adapter.factors {
            for (range, part) in [(&factor.a, "lora_A"), (&factor.b, "lora_B")] {
                let name = format!("{}.{part}.weight", factor.name);
                worst = worst.max(off(&gradient[range.clone()], &grads.floats(&name)));
                findings.keep(format!("grad.{name}"), &gradient[range.clone()]);
            }
        }
        findings.below(5e-4, worst, &format!("{} gradients", rig.family));
    }
    assert_eq!(all[0], all[1], "kept and recomputed activations differ");
    assert_eq!(all[0], all[2], "kept and offloaded activations differ");
    assert_eq!(all[0], all[3], "weights decoded once and for every product differ");
    let step = rig.step(Activations::Keep);
    let logits = step.logits(&rig.device, &rig.frozen, &rig.lora, batch).unwrap();
    findings.keep("packed_logits", &logits);
    let vocabulary = 512;
    let losses: Vec<f32> = (0..64)
        .map(|row| {
            let token = |i: usize| ((i * 7919 + i * i * 31 + row * 104_729) % vocabulary) as i32;
            let ids: Vec<i32> = (0..ids.len()).map(token).collect();
            let target = |i: usize| if targets[i] == -100 { -100 } else { token(i + 1) };
            let targets: Vec<i32> = (0..ids.len()).map(target).collect();
            let batch = MicroBatch { tokens: &ids, cu_seqlens: &cu, targets: &targets };
            step.loss(&rig.device, &rig.frozen, &rig.lora, batch).unwrap();
            (step.take_loss(&rig.device).unwrap() / f64::from(count)) as f32
        })
        .collect();
    findings.keep("row_losses", &losses);
}

fn check_ten_steps(rig: &Rig, findings: &mut Findings) {
    let (ids, cu, targets) = rig.packed();
    let batch = MicroBatch { tokens: &ids, cu_seqlens: &cu, targets: &targets };
    let count = targets.iter().filter(|t| **t != -100).count() as f32;
    let factor = if findings.dtype == Dtype::F16 { SCALE } else { 1.0 };
    let settings = AdamSettings::default();
    let device = &rig.device;
    let step = rig.step(Activations::Keep);
    let tensors = rig.adapter.tensors();
    let mut optimizer =
        Optimizer::new(device, settings, &tensors, &[], Some(step.spare())).unwrap();
    rig.lora.zero_grad(device).unwrap();
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for index in 0..10u32 {
        step.run(device, &rig.frozen, &rig.lora, batch, factor / count).unwrap();
        optimizer.collect(device, &rig.lora, factor).unwrap();
        losses.push((step.take_loss(device).unwrap() / f64::from(count)) as f32);
        norms.push(optimizer.read_norm(device).unwrap());
        let s = f64::from(index);
        let rate = 1e-2 * if index < 3 { s / 3.0 } else { (10.0 - s) / 7.0 };
        optimizer.update(device, &rig.lora, rate).unwrap();
    }
    for (name, found) in [("adamw_losses", &losses), ("adamw_grad_norms", &norms)] {
        let wanted = rig.expected.doubles(name);
        let off = found.iter().zip(&wanted).map(|(a, b)| (f64::from(*a) - b).abs() / b);
        findings.below(5e-4, off.fold(0.0, f64::max), &format!("{} {name}", rig.family));
        findings.keep(name, found);
    }
    let values = rig.lora.read_values(device).unwrap();
    let folder = fixtures::path(&format!("tiny-models/{}", rig.family));
    let model = ModelFolder::open(&folder.join("nf4")).unwrap();
    let config = ModelConfig::read(&model).unwrap();
    let after = Adapter::load_peft_of(&folder.join("adapter_after_10_steps"), &config).unwrap();
    let name = format!("{} factors after ten steps", rig.family);
    findings.below(5e-3, off(&values, &after.values), &name);
    for factor in &rig.adapter.factors {
        for (range, part) in [(&factor.a, "lora_A"), (&factor.b, "lora_B")] {
            let name = format!("factor.{}.{part}.weight", factor.name);
            findings.keep(name, &values[range.clone()]);
        }
    }
}

#[test]
fn fixture_the_gpu_follows_transformers_and_peft() {
    for family in ["llama", "qwen2", "gemma2"] {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            let mut findings = Findings { dtype, tensors: Vec::new() };
            let Some(plain) = Rig::new(family, "f32", false, dtype) else { return };
            check_logits(&plain, "logits_f32", &mut findings);
            let Some(base) = Rig::new(family, "nf4", false, dtype) else { return };
            check_logits(&base, "logits_nf4", &mut findings);
            let Some(tuned) = Rig::new(family, "nf4", true, dtype) else { return };
            check_logits(&tuned, "logits_nf4_adapter", &mut findings);
            check_gradients(&tuned, &mut findings);
            check_ten_steps(&tuned, &mut findings);
            findings.write(family);
        }
    }
}
