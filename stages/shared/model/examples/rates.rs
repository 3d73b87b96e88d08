//! Prints the rates of prefill, a LoRA training step and batch-16 decoding:
//! `cargo run --release -p model --example rates -- MODEL.gguf [prefill] [train] [decode]`.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "an example")]

use std::path::Path;
use std::time::Instant;

use model::{GenerateOptions, LoraConfig, MicroBatch, Model};

fn tokens(n: usize) -> Vec<i32> {
    (0..n).map(|i| 3 + (i * 7919 % 49000) as i32).collect()
}

/// Seconds on the clock and of all processors together, the best of three runs after one to warm
/// up. On a machine that others use too, only the processor time says much.
fn best(mut run: impl FnMut()) -> [f64; 2] {
    run();
    let mut best = [f64::MAX; 2];
    for _ in 0..3 {
        let (start, used) = (Instant::now(), processor_seconds());
        run();
        best[0] = best[0].min(start.elapsed().as_secs_f64());
        best[1] = best[1].min(processor_seconds() - used);
    }
    best
}

/// Processor time of this process, in steps of 10 ms (Linux).
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    fields.iter().skip(11).take(2).filter_map(|f| f.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn show(what: &str, tokens: f64, [clock, processor]: [f64; 2]) {
    let (rate, own) = (tokens / clock, tokens / processor);
    println!("{what}: {rate:.0} tok/s, {own:.0} tok per processor second");
}

fn main() {
    let mut args = std::env::args().skip(1);
    let path = args.next().unwrap();
    let only: Vec<String> = args.collect();
    let wanted = |name: &str| only.is_empty() || only.iter().any(|o| o == name);
    let start = Instant::now();
    let model = Model::load(Path::new(&path)).unwrap();
    println!("load {:.2} s, {:?}", start.elapsed().as_secs_f64(), model.backend());
    if wanted("prefill") {
        let prompt = vec![tokens(512).iter().map(|t| *t as u32).collect::<Vec<_>>()];
        let none = GenerateOptions { max_new_tokens: 1, end_tokens: vec![], batch_size: 1 };
        let seconds = best(|| {
            model.generate(None, &prompt, &none, &mut |_| true).unwrap();
        });
        show("prefill 1 x 512", 512.0, seconds);
    }
    if wanted("train") {
        train(&model);
    }
    if wanted("decode") {
        decode(&model);
    }
}

fn train(model: &Model) {
    let adapter = model.new_adapter(&LoraConfig::default(), 1).unwrap();
    let ids = tokens(1024);
    let cu = [0, 256, 512, 768, 1024];
    let mut targets: Vec<i32> = ids[1..].to_vec();
    targets.push(-100);
    for last in &cu[1..] {
        targets[*last as usize - 1] = -100;
    }
    let mut grad = vec![0.0; adapter.values.len()];
    let seconds = best(|| {
        let batch = MicroBatch { tokens: &ids, cu_seqlens: &cu, targets: &targets };
        model.loss_and_grad(&adapter, batch, 1e-3, None, &mut grad).unwrap();
    });
    show("train 4 x 256, loss on all", 1024.0, seconds);
}

fn decode(model: &Model) {
    let prompts: Vec<Vec<u32>> =
        (0..16).map(|i| tokens(256 + i)[i..].iter().map(|t| *t as u32).collect()).collect();
    let run = |new: usize| {
        let options = GenerateOptions { max_new_tokens: new, end_tokens: vec![], batch_size: 16 };
        best(|| {
            model.generate(None, &prompts, &options, &mut |_| true).unwrap();
        })
    };
    let (short, long) = (run(1), run(33));
    show("batch-16 prefill", 16.0 * 256.0, short);
    show("batch-16 decode", 16.0 * 32.0, [long[0] - short[0], long[1] - short[1]]);
}
