//! Checks generation against the CPU's and times it:
//! `generate check FOLDER...` (folders with `f32`, `nf4` and `adapter`) or
//! `generate time SHAPE BATCH PROMPT NEW` (SHAPE: qwen2.5-3b, gemma-2-2b, smollm2-135m).
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "an example")]

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use cuda::{Device, Dtype, Frozen, Generator};
use model::{Adapter, GenerateOptions, Generated, LoraConfig, Model};

mod shapes;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| args[index].parse().unwrap();
    match args[0].as_str() {
        "check" => {
            let mut launched = BTreeSet::new();
            args[1..].iter().for_each(|folder| check(Path::new(folder), &mut launched));
            println!("launched: {}", Vec::from_iter(launched).join(" "));
        }
        _ => time(&args[1], number(2), number(3), number(4)),
    }
}

/// Greedy tokens of a ragged batch, with and without adapter, by batch size and alone.
fn check(folder: &Path, launched: &mut BTreeSet<&'static str>) {
    for weights in ["f32", "nf4"] {
        let model = Model::load(&folder.join(weights)).unwrap();
        let tuned = Adapter::load_peft(&folder.join("adapter"), &model).unwrap();
        let none = Adapter { factors: Vec::new(), values: Vec::new(), ..tuned.clone() };
        let vocabulary = model.config().vocab_size;
        let prompts: Vec<Vec<u32>> = (0..37usize)
            .map(|p| {
                let length = 1 + (p * 53) % 190;
                (0..length).map(|i| ((i * 7919 + p * 31) % vocabulary) as u32).collect()
            })
            .collect();
        for (name, adapter) in [("tuned", &tuned), ("base", &none)] {
            let options =
                GenerateOptions { max_new_tokens: 24, end_tokens: vec![3], batch_size: 16 };
            let mut expected = Vec::new();
            let own = (!adapter.factors.is_empty()).then_some(adapter);
            model.generate(own, &prompts, &options, &mut |g| collect(&mut expected, g)).unwrap();
            for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
                let device = Device::open(0, dtype).unwrap();
                device.start_profile();
                let generator = Generator::load(device, &folder.join(weights), adapter).unwrap();
                let mut all = Vec::new();
                for batch_size in [16, 5] {
                    let options = GenerateOptions { batch_size, ..options.clone() };
                    let mut got = Vec::new();
                    generator.generate(&prompts, &options, &mut |g| collect(&mut got, g)).unwrap();
                    all.push(got);
                }
                let mut alone = Vec::new();
                let single = &prompts[20..21];
                generator.generate(single, &options, &mut |g| collect(&mut alone, g)).unwrap();
                launched.extend(generator.device().finish_profile().unwrap().into_keys());
                let same = all[0].iter().zip(&expected).filter(|(a, b)| a == b).count();
                println!(
                    "{} {weights} {name} {dtype:?}: {same} of {} rows as on the CPU, batches alike {}, alone alike {}",
                    folder.file_name().unwrap().to_string_lossy(),
                    prompts.len(),
                    all[0] == all[1],
                    alone[0].tokens == all[0][20].tokens
                );
            }
        }
    }
}

/// Keeps answers in the order of the prompts.
fn collect(all: &mut Vec<Generated>, generated: Generated) -> bool {
    let at = all.partition_point(|g| g.prompt < generated.prompt);
    all.insert(at, generated);
    true
}

fn time(name: &str, batch: usize, prompt: usize, new: usize) {
    let config = shapes::shape(name);
    let device = Device::open(0, Dtype::Bf16).unwrap();
    let frozen = Frozen::random(&device, config.clone(), 1).unwrap();
    let adapter = Adapter::fresh(&config, &LoraConfig::default(), 1).unwrap();
    let generator = Generator::new(device, frozen, &adapter).unwrap();
    let text =
        |p: usize| (0..prompt).map(|i| ((i * 7919 + p * 31) % config.vocab_size) as u32).collect();
    let prompts: Vec<Vec<u32>> = (0..batch).map(text).collect();
    let run = |new: usize| {
        let options =
            GenerateOptions { max_new_tokens: new, end_tokens: Vec::new(), batch_size: batch };
        let start = Instant::now();
        generator.generate(&prompts, &options, &mut |_| true).unwrap();
        start.elapsed().as_secs_f64()
    };
    run(new);
    let (all, first) = (run(new), run(1));
    println!(
        "{name}, batch {batch}, {prompt} + {new} tokens: {:.0} tok/s, of which up to the first token {:.3} s, \
         then {:.2} ms a step; peak {:.2} GiB",
        (batch * new) as f64 / all,
        first,
        (all - first) / (new - 1) as f64 * 1e3,
        generator.device().peak_bytes() as f64 / f64::from(1u32 << 30)
    );
}
