//! Checks the training step against the CPU's and times it:
//! `step check FOLDER...` (folders with `f32`, `nf4` and `adapter`), `step same SHAPE` or
//! `step time SHAPE keep|keep-4bit|recompute|offload STEPS [f16]` (SHAPE: qwen2.5-3b, gemma-2-2b, smollm2-135m).
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "an example")]

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use cuda::{Activations, AdamSettings, Device, Dtype, Frozen, Lora, Optimizer, Step};
use model::{Adapter, LoraConfig, MicroBatch, Model};

mod shapes;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args[0].as_str() {
        "check" => {
            let mut launched = BTreeSet::new();
            for folder in &args[1..] {
                for weights in ["f32", "nf4"] {
                    check(Path::new(folder), weights, &mut launched);
                }
            }
            println!("launched: {}", Vec::from_iter(launched).join(" "));
        }
        "same" => same(&args[1]),
        _ => {
            let dtype = if args.len() > 4 { Dtype::F16 } else { Dtype::Bf16 };
            time(&args[1], &args[2], args[3].parse().unwrap(), dtype);
        }
    }
}

/// Digests of the adapter after two steps of three micro-batches: kept, recomputed and offloaded
/// activations, weights decoded once or for every product, replayed graphs and plain launches, once
/// and again.
fn same(name: &str) {
    let config = shapes::shape(name);
    let adapter = Adapter::fresh(&config, &LoraConfig::default(), 1).unwrap();
    let n = 2048usize;
    let modes = ["keep", "keep-4bit", "recompute", "offload"];
    for (mode, is_plain) in modes.into_iter().flat_map(|m| [(m, false), (m, false), (m, true)]) {
        let device = Device::open(0, Dtype::Bf16).unwrap();
        let frozen = Frozen::random(&device, config.clone(), 1).unwrap();
        let lora = Lora::new(&device, &config, &adapter).unwrap();
        let step = make(mode, &device, &frozen, &lora, n);
        let settings = AdamSettings::default();
        let all = 0..adapter.values.len();
        let mut optimizer =
            Optimizer::new(&device, settings, &[all], &[], Some(step.spare())).unwrap();
        if is_plain {
            // A profile keeps to one stream and records nothing.
            device.start_profile();
        }
        let mut losses = Vec::new();
        for index in 0..6usize {
            let token = |i: usize| ((i * 7919 + index * 31) % config.vocab_size) as i32;
            let tokens: Vec<i32> = (0..n).map(token).collect();
            let targets: Vec<i32> = (0..n).map(|i| token(i + 1)).collect();
            let cu = [0, 100, 1000, n as i32];
            let batch = MicroBatch { tokens: &tokens, cu_seqlens: &cu, targets: &targets };
            step.run(&device, &frozen, &lora, batch, 1.0 / (3 * n) as f32).unwrap();
            if index % 3 == 2 {
                optimizer.collect(&device, &lora, 1.0).unwrap();
                losses.push(optimizer.read_norm(&device).unwrap());
                optimizer.update(&device, &lora, 2e-4).unwrap();
            }
        }
        let loss = step.take_loss(&device).unwrap() / (6 * n) as f64;
        let values = lora.read_values(&device).unwrap();
        let digest = values.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, v| {
            (h ^ u64::from(v.to_bits())).wrapping_mul(0x100_0000_01b3)
        });
        println!("{name} {mode} plain {is_plain}: {digest:016x} norms {losses:?} loss {loss}");
    }
}

/// A step for up to `n` tokens.
fn make(mode: &str, device: &Device, frozen: &Frozen, lora: &Lora, n: usize) -> Step {
    let activations = match mode {
        "keep" | "keep-4bit" => Activations::Keep,
        "recompute" => Activations::Recompute,
        _ => Activations::Offload,
    };
    let mut step = Step::new(device, frozen, lora, n, activations).unwrap();
    if mode == "keep" {
        assert!(step.keep_weights(device, frozen, lora).unwrap(), "memory for decoded weights");
    }
    step
}

fn norm(x: impl Iterator<Item = f32>) -> f64 {
    x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

/// Loss and every factor's gradient, on ragged segments with holes in the targets.
fn check(folder: &Path, weights: &str, launched: &mut BTreeSet<&'static str>) {
    let model = Model::load(&folder.join(weights)).unwrap();
    let adapter = Adapter::load_peft(&folder.join("adapter"), &model).unwrap();
    let config = model.config().clone();
    let cu = [0, 1, 40, 47, 120, 200];
    let n = 200usize;
    let vocabulary = config.vocab_size;
    let tokens: Vec<i32> = (0..n).map(|i| (i * 7919 % vocabulary) as i32).collect();
    let targets: Vec<i32> = (0..n)
        .map(|i| {
            let last = cu.contains(&(i as i32 + 1));
            if last || i % 5 == 0 { -100 } else { (i * 104_729 % vocabulary) as i32 }
        })
        .collect();
    let batch = MicroBatch { tokens: &tokens, cu_seqlens: &cu, targets: &targets };
    let mut expected = vec![0.0; adapter.values.len()];
    let loss = model.loss_and_grad(&adapter, batch, 0.25, None, &mut expected).unwrap().sum;
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        // Gradients of f16 are scaled, as in training.
        let factor = if dtype == Dtype::F16 { 1024.0 } else { 1.0 };
        let mut bits: Option<Vec<u32>> = None;
        for activations in [Activations::Keep, Activations::Recompute, Activations::Offload] {
            let device = Device::open(0, dtype).unwrap();
            device.start_profile();
            let frozen = Frozen::load(&device, &folder.join(weights)).unwrap();
            let lora = Lora::new(&device, &config, &adapter).unwrap();
            let step = Step::new(&device, &frozen, &lora, 256, activations).unwrap();
            step.run(&device, &frozen, &lora, batch, 0.25 * factor).unwrap();
            let got = step.take_loss(&device).unwrap();
            let mut gradient = lora.read_gradient(&device).unwrap();
            gradient.iter_mut().for_each(|g| *g /= factor);
            launched.extend(device.finish_profile().unwrap().into_keys());
            let mut worst = (0.0, "");
            for factor in &adapter.factors {
                for range in [&factor.a, &factor.b] {
                    let off = expected[range.clone()].iter().zip(&gradient[range.clone()]);
                    let off = norm(off.map(|(a, b)| a - b))
                        / norm(expected[range.clone()].iter().copied()).max(1e-30);
                    if off > worst.0 || off.is_nan() {
                        worst = (off, factor.name.as_str());
                    }
                }
            }
            let own: Vec<u32> = gradient.iter().map(|g| g.to_bits()).collect();
            let same = bits.as_ref().is_none_or(|b| *b == own);
            println!(
                "{} {weights} {dtype:?} {activations:?}: loss off {:.1e}, gradients at worst {:.1e} ({}), same bits {same}",
                folder.file_name().unwrap().to_string_lossy(),
                (got - loss).abs() / loss,
                worst.0,
                worst.1
            );
            bits = Some(own);
        }
    }
}

fn time(name: &str, mode: &str, steps: usize, dtype: Dtype) {
    let start = Instant::now();
    let config = shapes::shape(name);
    let device = Device::open(0, dtype).unwrap();
    let frozen = Frozen::random(&device, config.clone(), 1).unwrap();
    let adapter = Adapter::fresh(&config, &LoraConfig::default(), 1).unwrap();
    let lora = Lora::new(&device, &config, &adapter).unwrap();
    let (rows, length, accumulation) = (2usize, 2048usize, 4usize);
    let n = rows * length;
    let step = make(mode, &device, &frozen, &lora, n);
    let tensors: Vec<_> = adapter.factors.iter().map(|f| f.a.clone()).collect();
    let tensors: Vec<_> =
        tensors.into_iter().chain(adapter.factors.iter().map(|f| f.b.clone())).collect();
    let mut tensors = tensors;
    tensors.sort_by_key(|r| r.start);
    let settings = AdamSettings { eight_bit: true, ..AdamSettings::default() };
    let maps: Vec<f32> = (0..512).map(|i| (i % 256) as f32 / 128.0 - 1.0).collect();
    let mut optimizer =
        Optimizer::new(&device, settings, &tensors, &maps, Some(step.spare())).unwrap();
    let tokens: Vec<i32> = (0..n).map(|i| (i * 7919 % config.vocab_size) as i32).collect();
    let cu: Vec<i32> = (0..=rows).map(|r| (r * length) as i32).collect();
    let mut labels: Vec<i32> = tokens[1..].to_vec();
    labels.push(-100);
    for end in &cu[1..] {
        labels[*end as usize - 1] = -100;
    }
    let batch = MicroBatch { tokens: &tokens, cu_seqlens: &cu, targets: &labels };
    let mut times = Vec::new();
    for index in 0..steps {
        let begin = Instant::now();
        if index + 1 == steps {
            device.start_profile();
        }
        for _ in 0..accumulation {
            step.run(&device, &frozen, &lora, batch, 1.0 / (n * accumulation) as f32).unwrap();
        }
        optimizer.collect(&device, &lora, 1.0).unwrap();
        optimizer.update(&device, &lora, 2e-4).unwrap();
        let loss = step.take_loss(&device).unwrap() / (accumulation * (n - rows)) as f64;
        times.push(begin.elapsed().as_secs_f64());
        if index < 2 {
            println!(
                "step {index}: loss {loss:.4}, {:.2} s since start",
                start.elapsed().as_secs_f64()
            );
        }
    }
    let table = device.finish_profile().unwrap();
    let mut classes: Vec<_> = table.into_iter().collect();
    classes.sort_by(|a, b| b.1.0.total_cmp(&a.1.0));
    let timed = &mut times[2..steps - 1];
    timed.sort_by(f64::total_cmp);
    let median = timed[timed.len() / 2];
    let gib = |bytes: u64| bytes as f64 / f64::from(1u32 << 30);
    println!(
        "{name} {dtype:?} {mode}: {:.0} tok/s, step {:.1} ms, peak {:.2} GiB (NVML: {:.2})",
        (n * accumulation) as f64 / median,
        median * 1e3,
        gib(device.peak_bytes()),
        device.nvml_bytes().map_or(f64::NAN, gib)
    );
    for (class, (milliseconds, count)) in classes {
        println!("  {class:26} {milliseconds:8.2} ms {count:6}");
    }
}
